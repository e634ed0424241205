package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/nbd"
)

// TestOperators fills a COW device at a known rate, with a page, metrics, alerts and a log of JSON: the forecast is right
// within 20 percent, and the alerts say what happened, that of a full device at once. A second receiver of the alerts hangs.
func TestOperators(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes some ten seconds")
	}
	p := newPair(t)
	const size = 20 << 20
	if err := os.Truncate(p.origin, 4*size); err != nil {
		t.Fatal(err)
	}
	if _, err := cowfile.Create(p.origin, p.cow, cowfile.Options{Size: size}); err != nil {
		t.Fatal(err)
	}
	alerts := filepath.Join(p.dir, "alerts")
	socket := filepath.Join(p.dir, "s")
	var hanging atomic.Int32
	hangs := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		hanging.Add(1)
		io.Copy(io.Discard, r.Body) // only then the end of the connection ends the context
		<-r.Context().Done()
	}))
	defer hangs.Close()
	s := launch(t, "serve", p.origin, "vm1="+p.cow, "--socket", socket, "--http", "127.0.0.1:0", "--log-format", "json", "--notify", hangs.URL+"/secret",
		"--notify-exec", "cat >>"+alerts+"; echo >>"+alerts, "--notify-time", "5s")
	var url string
	for url == "" {
		line, err := s.stdout.ReadString('\n')
		if err != nil {
			t.Fatalf("%v: %s", err, &s.stderr)
		}
		url, _ = strings.CutPrefix(strings.TrimSpace(line), "page  ")
		if !strings.HasPrefix(url, "http") {
			url = ""
		}
	}
	base, token, _ := strings.Cut(url, "?token=")
	if status := get(t, base+"v1/tree", ""); status.code != http.StatusUnauthorized {
		t.Errorf("without the token: %d", status.code)
	}
	if a := get(t, base+"v1/tree", token); a.code != 200 || !strings.Contains(a.body, `"name":"vm1"`) {
		t.Errorf("with the token: %d %s", a.code, a.body)
	}

	c, err := nbd.Dial(t.Context(), "nbd+unix:///vm1?socket="+socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const rate = 2 << 20 // bytes a second: full after about 10 s
	began := time.Now()
	var forecast time.Time
	p64 := make([]byte, 64<<10)
	var full time.Time
	for off := int64(0); full.IsZero(); off += int64(len(p64)) {
		time.Sleep(time.Until(began.Add(time.Duration(float64(off) / rate * float64(time.Second)))))
		if _, err := c.WriteAt(p64, off); err != nil {
			full = time.Now()
		}
		if passed := time.Since(began); forecast.IsZero() && passed > 6*time.Second {
			m := regexp.MustCompile(`dmsnap_time_to_full_seconds\{[^}]*name="vm1"\} (\S+)`).FindStringSubmatch(get(t, base+"metrics", "").body)
			if m == nil {
				t.Fatalf("no forecast after %v", passed)
			}
			left, err := strconv.ParseFloat(m[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			forecast = time.Now().Add(time.Duration(left * float64(time.Second)))
		}
	}
	lasted, said := full.Sub(began).Seconds(), forecast.Sub(began).Seconds()
	t.Logf("full after %.1f s; forecast after 6 s: %.1f s", lasted, said)
	if said < 0.8*lasted || said > 1.2*lasted {
		t.Errorf("full after %.1f s, the forecast was %.1f s", lasted, said)
	}
	var kinds string
	var alerted time.Time
	for end := time.Now().Add(20 * time.Second); !strings.Contains(kinds, " full:firing"); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("alerts: %s", kinds)
		}
		kinds = ""
		b, _ := os.ReadFile(alerts)
		for line := range strings.Lines(string(b)) {
			var a monitor.Alert
			if err := json.Unmarshal([]byte(line), &a); err != nil {
				break // it is being written
			}
			if a.Name != "vm1" || a.Disk != "origin" || a.Message == "" {
				t.Errorf("alert %+v", a)
			}
			kinds += " " + string(a.Kind) + ":" + a.State
			if a.Kind == monitor.AlertFull {
				alerted = a.Time
			}
		}
	}
	if strings.Count(kinds, "fill:firing") != 3 || !strings.Contains(kinds, "time_to_full:firing") {
		t.Errorf("alerts:%s", kinds)
	}
	if late := alerted.Sub(full); late > 3*time.Second { // reports are 5 seconds apart
		t.Errorf("the alert came %v after the write that failed", late)
	}
	if hanging.Load() == 0 {
		t.Error("the receiver that hangs got nothing")
	}
	s.Process.Signal(syscall.SIGTERM)
	if status := s.end(t); status != exitDone {
		t.Errorf("status %d: %s", status, &s.stderr)
	}
	for line := range strings.Lines(s.stderr.String()) {
		var record map[string]any
		if err := json.Unmarshal([]byte(line), &record); err != nil || record["msg"] == nil || record["level"] == nil {
			t.Errorf("log line %q: %v", line, err)
		}
		if strings.Contains(line, token) || strings.Contains(line, "/secret") {
			t.Errorf("the log has a secret: %s", line)
		}
	}
	if !strings.Contains(s.stderr.String(), `"snapshot":"vm1"`) {
		t.Errorf("the log says nothing of the full COW device: %s", &s.stderr)
	}
	mustRun(t, "check", p.cow)
}

type answer struct {
	code int
	body string
}

// get asks for a URL.
func get(t *testing.T, url, token string) answer {
	t.Helper()
	q, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		q.Header.Set("Authorization", "Bearer "+token)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	a, err := client.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Body.Close()
	body, err := io.ReadAll(a.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{a.StatusCode, string(body)}
}

func TestOperatorFlagsRefused(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	for _, bad := range [][]string{{"--log-format", "xml"}, {"--notify", "ftp://x/"}, {"--notify-fill", "101"}, {"--notify-fill", "0"}, {"--http", "nonsense"}} {
		dmsnap(append([]string{"serve", p.origin, p.cow, "--socket", filepath.Join(p.dir, "s")}, bad...)...).wantRefused(t, bad[0])
	}
}
