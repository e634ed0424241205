package daemon

import (
	"bufio"
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
)

// Each request is refused with fewer rights than its route has, and no other code shows what exists.
func TestRights(t *testing.T) {
	s := newFakeServer(t)
	for _, r := range routes() {
		s.rights = r.rights - 1
		status, body := s.do(t, r.method, strings.ReplaceAll(r.path, "{name}", "a"), "{}")
		var e api.ErrorReply
		if err := json.Unmarshal(body, &e); err != nil || status != http.StatusForbidden || e.Error.Code != api.CodeForbidden {
			t.Errorf("%s %s with the right %s: status %d, %s", r.method, r.path, s.rights, status, body)
		}
	}
	if got := rightsOfUser(0, 7); got != RightAdmin {
		t.Errorf("root has %s", got)
	}
	if got := rightsOfUser(7, 7); got != RightAdmin {
		t.Errorf("the daemon's user has %s", got)
	}
	if got := rightsOfUser(8, 7); got != RightWrite {
		t.Errorf("another user has %s", got)
	}
}

// The peer of a unix socket is known by its user; that of another connection has no rights.
func TestPeer(t *testing.T) {
	path := filepath.Join(testhost.ShortDir(t), "s")
	l, err := ListenUnix(path, os.Getgid(), 0o660)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	nc, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if uid, err := peerUID(nc); err != nil || int(uid) != os.Getuid() {
		t.Errorf("uid %d, %v", uid, err)
	}
	if r := RightsOf(connContext(t.Context(), nc)); r != RightAdmin {
		t.Errorf("its own user has %s", r)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if r := RightsOf(connContext(t.Context(), a)); r != RightNone {
		t.Errorf("a pipe has %s", r)
	}
}

// Paths in requests lie below allowed directories, whatever links lead out of them.
func TestAllowedPaths(t *testing.T) {
	s := newFakeServer(t)
	dir, outside := filepath.Dir(s.file), filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(outside, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link, good := filepath.Join(dir, "link"), filepath.Join(dir, "good")
	for at, to := range map[string]string{link: outside, good: s.file} {
		if err := os.Symlink(to, at); err != nil {
			t.Fatal(err)
		}
	}
	for source, code := range map[string]api.Code{
		s.file: "", good: "", s.file + "#p1": "", "nbd://host/x": "", "nbd+unix:///x?socket=" + s.file: "",
		outside: api.CodeForbidden, link: api.CodeForbidden, dir + "/../secret": api.CodeForbidden, dir: api.CodeForbidden,
		outside + ".missing": api.CodeForbidden, link + "#p1": api.CodeForbidden, "nbd+unix:///x?socket=" + outside: api.CodeForbidden,
		"disk.img": api.CodeBadRequest, dir + "/missing": api.CodeFailed,
	} {
		_, err := s.daemon.allowSource(source)
		var e *api.Error
		if code == "" && err != nil || code != "" && (!errors.As(err, &e) || e.Code != code) {
			t.Errorf("%s: %v, want %q", source, err, code)
		}
	}
	// A request gets there too.
	for _, q := range []struct{ path, body string }{{"/v1/disks", `{"name":"x","source":"` + outside + `"}`}, {"/v1/adopt", `{"node":"x","disk":"base","cow":"` + outside + `"}`}} {
		if status, body := s.do(t, "POST", q.path, q.body); status != http.StatusForbidden {
			t.Errorf("%s: status %d, %s", q.path, status, body)
		}
	}
}

func TestRules(t *testing.T) {
	rules, err := ParseRules(strings.NewReader("# comment\n\nCN=host1 debian write\nhost1.example * read\n* public read\nops * admin\n"))
	if err != nil {
		t.Fatal(err)
	}
	a := &Access{DiskOf: func(export string) string { return strings.TrimSuffix(export, "-node") }}
	of := func(name string, dns ...string) nbd.ClientInfo {
		return nbd.ClientInfo{Addr: &net.TCPAddr{}, TLS: tlsState(&x509.Certificate{Subject: pkix.Name{CommonName: name}, DNSNames: dns})}
	}
	if got := a.Authorize(nbd.ClientInfo{Addr: &net.TCPAddr{}}, "debian-node"); got != nbd.AccessWrite {
		t.Errorf("without rules: %v", got)
	}
	a.SetRules(rules)
	for _, c := range []struct {
		client nbd.ClientInfo
		export string
		want   nbd.Access
	}{
		{of("host1"), "debian-node", nbd.AccessWrite}, {of("host1"), "fedora-node", nbd.AccessNone},
		{of("host1"), "public-node", nbd.AccessRead}, {of("x", "host1.example"), "fedora-node", nbd.AccessRead},
		{of("ops"), "fedora-node", nbd.AccessWrite}, {of("stranger"), "debian-node", nbd.AccessNone},
		{nbd.ClientInfo{Addr: &net.TCPAddr{}}, "public-node", nbd.AccessNone},
		{nbd.ClientInfo{Addr: &net.UnixAddr{Net: "unix"}}, "debian-node", nbd.AccessWrite},
	} {
		if got := a.Authorize(c.client, c.export); got != c.want {
			t.Errorf("%+v, %s: %v, want %v", c.client, c.export, got, c.want)
		}
	}
	for _, bad := range []string{"a b", "a b c", "a b none", "a b read more"} {
		if _, err := ParseRules(strings.NewReader(bad)); err == nil || !strings.Contains(err.Error(), "line 1") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// A reader gets events as they happen, and the end of the daemon ends it.
func TestEvents(t *testing.T) {
	s := newFakeServer(t)
	s.rights = RightRead
	r, err := http.NewRequestWithContext(t.Context(), "GET", s.url+"/v1/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Body.Close()
	if kind := got.Header.Get("Content-Type"); kind != "text/event-stream" {
		t.Errorf("content type %s", kind)
	}
	s.fleet.events <- api.Event{Seq: 5, Kind: api.EventForked, Name: "b"}
	close(s.fleet.events)
	var lines []string
	for in := bufio.NewScanner(got.Body); in.Scan(); {
		lines = append(lines, in.Text())
	}
	want := []string{": events follow", "", "id: 5", "event: forked", `data: {"seq":5,"time":"0001-01-01T00:00:00Z","kind":"forked","name":"b"}`, ""}
	if fmt.Sprint(lines) != fmt.Sprint(want) {
		t.Errorf("%q", lines)
	}
}

// Run serves both sockets until its context ends.
func TestRun(t *testing.T) {
	f := newFakeFleet()
	d, err := New(f, Options{PolicyInterval: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	dir := testhost.ShortDir(t)
	l, err := ListenUnix(dir+"/n", -1, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	control, err := ListenUnix(dir+"/c", -1, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx, control, l) }()
	c := api.NewClient(dir + "/c")
	st, err := c.Daemon(t.Context())
	if err != nil || st.Nodes != 1 || st.Rights != "admin" {
		t.Errorf("%+v, %v", st, err)
	}
	got := make(chan api.Event, 1)
	watching := make(chan error, 1)
	go func() {
		watching <- c.Events(t.Context(), func(e api.Event) error { got <- e; return nil })
	}()
	f.events <- api.Event{Kind: api.EventDropped, Name: "x"}
	if e := <-got; e.Name != "x" {
		t.Errorf("%+v", e)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := <-watching; err != nil {
		t.Error(err)
	}
}

func TestFreezeCommand(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	f := FreezeCommand{Command: fmt.Sprintf(`f() { echo "$1 $DMSNAP_ACTION $DMSNAP_NODES" >>%s; }; f`, out), Timeout: time.Minute}
	for _, thaw := range []bool{false, true} {
		if err := f.Run(t.Context(), thaw, []string{"a", "b"}); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(out); err != nil || string(b) != "freeze freeze a b\nthaw thaw a b\n" {
		t.Errorf("%q, %v", b, err)
	}
	if err := (FreezeCommand{Command: "echo broken >&2; false"}).Run(t.Context(), false, nil); err == nil || !strings.Contains(err.Error(), "freeze command: exit status 1: broken") {
		t.Error(err)
	}
	// A command that takes too long is killed, with what it started.
	began := time.Now()
	err := FreezeCommand{Command: "sleep 60 & sleep 60; :", Timeout: 50 * time.Millisecond}.Run(t.Context(), false, nil)
	if err == nil || !strings.Contains(err.Error(), "longer than 50ms") || time.Since(began) > 30*time.Second {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
}
