package notify

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block/blocktest"
)

func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }

var short = limits{queue: 4, attempt: 100 * time.Millisecond, first: time.Millisecond, longest: 10 * time.Millisecond, giveUp: time.Hour}

// receiver is a server that notes the bodies it gets; answer decides what it does.
type receiver struct {
	*httptest.Server
	mu     sync.Mutex
	bodies []string
	answer func(n int, w http.ResponseWriter, r *http.Request)
}

func newReceiver(t *testing.T, answer func(n int, w http.ResponseWriter, r *http.Request)) *receiver {
	v := &receiver{answer: answer}
	var n atomic.Int64
	v.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		v.mu.Lock()
		v.bodies = append(v.bodies, string(body))
		v.mu.Unlock()
		if v.answer != nil {
			v.answer(int(n.Add(1)), w, r)
		}
	}))
	t.Cleanup(v.Close)
	return v
}

func (v *receiver) received() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return append([]string{}, v.bodies...)
}

type logged struct {
	mu    sync.Mutex
	lines []string
}

func (l *logged) log(s string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, s)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "\n")
}

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func event(key string, n int) Event {
	return Event{Key: key, Body: json.RawMessage(fmt.Sprintf(`{"n":%d}`, n)), Env: []string{fmt.Sprintf("NUMBER=%d", n)}}
}

func TestDeliveryIsRepeated(t *testing.T) {
	v := newReceiver(t, func(n int, w http.ResponseWriter, r *http.Request) {
		if n <= 3 {
			w.WriteHeader(503)
		}
	})
	var l logged
	n, err := newNotifier(Options{URL: v.URL + "/secret?token=abc", Log: l.log}, short)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.Send(event("a", 1))
	until(t, "the fourth attempt", func() bool { return len(v.received()) == 4 })
	for _, body := range v.received() {
		if body != `{"n":1}` {
			t.Errorf("body %s", body)
		}
	}
	if s := l.String(); !strings.Contains(s, "503") || strings.Contains(s, "secret") || strings.Contains(s, "abc") {
		t.Errorf("log %q", s)
	}
}

// A server that hangs makes nobody wait, and the latest event of each key is delivered when it answers again.
func TestServerThatHangs(t *testing.T) {
	var hang atomic.Bool
	hang.Store(true)
	v := newReceiver(t, func(n int, w http.ResponseWriter, r *http.Request) {
		if hang.Load() {
			<-r.Context().Done()
		}
	})
	var l logged
	n, err := newNotifier(Options{URL: v.URL, Log: l.log}, short)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.Send(event("first", 0))
	until(t, "the first request", func() bool { return len(v.received()) > 0 })
	began := time.Now()
	for i := range 1000 {
		n.Send(event(fmt.Sprint("key", i%3), i))
	}
	for i := range 6 { // more keys than there is space for
		n.Send(event(fmt.Sprint("more", i), 5000+i))
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("Send waited: %v", d)
	}
	hang.Store(false)
	until(t, "the last event", func() bool { r := v.received(); return r[len(r)-1] == `{"n":5005}` })
	all := strings.Join(v.received(), " ")
	for _, want := range []string{`{"n":5002}`, `{"n":5003}`, `{"n":5004}`} {
		if !strings.Contains(all, want) {
			t.Errorf("%s was not delivered", want)
		}
	}
	if strings.Contains(all, `{"n":997}`) {
		t.Error("an event was delivered that should have been dropped")
	}
	until(t, "what was logged", func() bool { return strings.Contains(l.String(), "dropped") })
}

// While an event is repeated, a later one of the same key takes its place.
func TestLatestStateIsDelivered(t *testing.T) {
	var fail atomic.Bool
	fail.Store(true)
	v := newReceiver(t, func(n int, w http.ResponseWriter, r *http.Request) {
		if fail.Load() {
			w.WriteHeader(500)
		}
	})
	n, err := newNotifier(Options{URL: v.URL}, short)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.Send(event("a", 1))
	until(t, "an attempt", func() bool { return len(v.received()) > 0 })
	n.Send(event("a", 2))
	until(t, "the later event", func() bool { r := v.received(); return r[len(r)-1] == `{"n":2}` })
	fail.Store(false)
}

// An event that a receiver always refuses delays no other event, of that receiver or of the other one.
func TestRefusedEventDelaysNothing(t *testing.T) {
	limits := short
	limits.first, limits.longest = time.Hour, time.Hour // what waits for another attempt waits too long
	limits.giveUp = 24 * time.Hour
	refuse := func(body string) bool { return strings.Contains(body, `"n":1`) }
	v := newReceiver(t, nil)
	v.answer = func(n int, w http.ResponseWriter, r *http.Request) {
		if r := v.received(); refuse(r[len(r)-1]) {
			w.WriteHeader(400)
		}
	}
	out := filepath.Join(t.TempDir(), "out")
	n, err := newNotifier(Options{URL: v.URL, Command: `echo "$NUMBER" >>` + out}, limits)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	for i := range 3 {
		n.Send(event(fmt.Sprint("key", i), i+1))
	}
	until(t, "what the URL accepts", func() bool { return len(v.received()) == 3 })
	until(t, "what the command gets", func() bool { b, _ := os.ReadFile(out); return strings.Count(string(b), "\n") == 3 })
	if got := strings.Join(v.received(), ""); got != `{"n":1}{"n":2}{"n":3}` {
		t.Errorf("received %s", got)
	}
	n.Send(event("key0", 4)) // the later state of what was refused is not delayed either
	until(t, "the later event", func() bool { return len(v.received()) == 4 })
}

func TestGivenUp(t *testing.T) {
	v := newReceiver(t, func(n int, w http.ResponseWriter, r *http.Request) { w.WriteHeader(404) })
	var l logged
	limits := short
	limits.giveUp = 20 * time.Millisecond
	n, err := newNotifier(Options{URL: v.URL, Log: l.log}, limits)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.Send(event("a", 1))
	until(t, "giving up", func() bool { return strings.Contains(l.String(), "given up") })
}

func TestCommand(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	n, err := newNotifier(Options{Command: `{ cat; echo " $NUMBER"; } >>` + out}, defaults)
	if err != nil {
		t.Fatal(err)
	}
	n.Send(event("a", 7))
	n.Close() // delivers what is queued
	if b, err := os.ReadFile(out); err != nil || string(b) != "{\"n\":7} 7\n" {
		t.Errorf("%q, %v", b, err)
	}
}

// A command that does not end is killed with all its processes.
func TestCommandThatHangs(t *testing.T) {
	dir := t.TempDir()
	var l logged
	limits := short
	limits.giveUp = 0
	n, err := newNotifier(Options{Command: `sleep 1000 & echo $! >` + dir + `/pid; wait`, Log: l.log}, limits)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.Send(event("a", 1))
	until(t, "giving up", func() bool { return strings.Contains(l.String(), "given up") })
	pid, err := os.ReadFile(dir + "/pid")
	if err != nil {
		t.Skip("the machine was too slow to start the command:", err)
	}
	until(t, "the end of the process", func() bool {
		state, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/stat")
		return err != nil || strings.Contains(string(state), ") Z ")
	})
}

func TestRefusedURLs(t *testing.T) {
	for _, u := range []string{"ftp://host/x", "http://", "nonsense", "http://a b/", "file:///etc/passwd"} {
		if n, err := New(Options{URL: u}); err == nil {
			n.Close()
			t.Errorf("%q was taken", u)
		}
	}
	n, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	n.Send(event("nowhere", 1))
	n.Close()
}

func Example() {
	v := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Printf("%s %s\n", r.Method, body)
	}))
	defer v.Close()
	n, err := New(Options{URL: v.URL})
	if err != nil {
		panic(err)
	}
	n.Send(Event{Key: "vm1 fill", Body: json.RawMessage(`{"name":"vm1","kind":"fill"}`)})
	n.Close()
	// Output: POST {"name":"vm1","kind":"fill"}
}
