package top

import (
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/fleet/daemon"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

func report() monitor.Report {
	left := 7200.0
	return monitor.Report{At: time.Now(), Server: api.ServerOfFleet, Elements: []monitor.Element{
		{Element: api.Element{Name: "golden", Kind: api.KindDisk, Disk: "golden"}},
		{Element: api.Element{Name: "vm2", Kind: api.KindNode, Parent: "golden", Disk: "golden", State: api.ElementFailed, Error: "no\ndisk"}},
		{Element: api.Element{Name: "vm1@a", Kind: api.KindCheckpoint, Parent: "golden", Disk: "golden", Figures: &api.Figures{Percent: 3, TotalSectors: 10}}},
		{Element: api.Element{Name: "vm1", Kind: api.KindNode, Parent: "vm1@a", Disk: "golden", Figures: &api.Figures{Percent: 47.2, TotalSectors: 10}},
			Rates: monitor.Rates{ReadBytes: 1 << 20, WrittenBytes: 512, SecondsToFull: &left}},
		{Element: api.Element{Name: "vm3", Kind: api.KindNode, Parent: "vm1@a", Disk: "golden", Figures: &api.Figures{Percent: 100, TotalSectors: 10, Full: true}}},
	}, FileSystems: []monitor.FileSystem{{Path: "/srv", FreeBytes: 3 << 30}}}
}

const shown = `1 disk, 1 checkpoint, 3 nodes; reads 1 MiB/s; writes 512 B/s; 3 GiB free on /srv
NAME                 KIND       FILL                     READ       WRITE   FULL IN STATE
golden               disk                                                           ok
  vm2                node                                                           FAILED: n…
  vm1@a              checkpoint [----------]   3%                                   ok
    vm1              node       [####------]  47%     1 MiB/s     512 B/s     2.0 h ok
    vm3              node       [##########] 100%                                   FULL
`

func TestText(t *testing.T) {
	if got := Text(report(), 94); got != shown {
		t.Errorf("shown:\n%s\nwant:\n%s", got, shown)
	}
	for _, width := range []int{1, 20, 60, 80, 300} {
		for line := range strings.Lines(Text(report(), width)) {
			if n := len([]rune(strings.TrimRight(line, "\n"))); n > width {
				t.Errorf("%d columns: a line of %d: %s", width, n, line)
			}
		}
	}
}

// A tree whose parents are missing, or lead in a circle, is shown whole or in part, and ends.
func TestOddTrees(t *testing.T) {
	r := monitor.Report{Elements: []monitor.Element{
		{Element: api.Element{Name: "a", Parent: "b"}}, {Element: api.Element{Name: "b", Parent: "a"}},
		{Element: api.Element{Name: "c", Parent: "gone"}}, {Element: api.Element{Name: "d", Parent: "d"}}, {Element: api.Element{Name: "", Parent: ""}}}}
	if got := inOrder(r); len(got) < 3 || len(got) > 5 {
		t.Errorf("%d elements", len(got))
	}
}

// serve serves a fleet with the disk golden.
func serve(t *testing.T) *api.Client {
	t.Helper()
	dir := testhost.ShortDir(t)
	golden := filepath.Join(dir, "golden.img")
	if err := os.WriteFile(golden, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	config := daemon.Config{Dir: filepath.Join(dir, "fleet"), Control: filepath.Join(dir, "c"), Socket: filepath.Join(dir, "s"), AllowPaths: []string{dir}, Group: -1}
	ready, served := make(chan struct{}), make(chan error, 1)
	config.Beside = func(context.Context, *daemon.Daemon, http.Handler) (func() error, error) {
		close(ready)
		return func() error { return nil }, nil
	}
	ctx, stop := context.WithCancel(context.Background())
	go func() { served <- config.Serve(ctx, nil, fleet.Options{}, nil) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-ready:
	case err := <-served:
		served <- nil
		t.Fatal(err)
	}
	c := api.NewClient(config.Control)
	if _, err := c.AddDisk(t.Context(), api.AddDiskRequest{Name: "golden", Source: golden, Raw: true}); err != nil {
		t.Fatal(err)
	}
	return c
}

// screen is a model that a test drives by keys.
type screen struct {
	*model
	t *testing.T
}

// do runs a command and handles its message; the next report is not waited for.
func (s screen) do(cmd tea.Cmd) (quit bool) {
	if cmd == nil {
		return false
	}
	msg := cmd()
	if _, ok := msg.(tea.QuitMsg); ok {
		return true
	}
	s.Update(msg)
	return false
}

func (s screen) keys(keys ...string) (quit bool) {
	for _, k := range keys {
		key := tea.Key{Text: k, Code: []rune(k)[0]}
		switch k {
		case "down":
			key = tea.Key{Code: tea.KeyDown}
		case "up":
			key = tea.Key{Code: tea.KeyUp}
		case "enter":
			key = tea.Key{Code: tea.KeyEnter}
		case "esc":
			key = tea.Key{Code: tea.KeyEscape}
		case "backspace":
			key = tea.Key{Code: tea.KeyBackspace}
		}
		_, cmd := s.Update(tea.KeyPressMsg(key))
		quit = s.do(cmd) || quit
	}
	return quit
}

func (s screen) refresh() { s.do(s.ask(0)) }

func (s screen) shows(words ...string) {
	s.t.Helper()
	text := s.screen()
	for _, w := range words {
		if !strings.Contains(text, w) {
			s.t.Errorf("%q is not shown:\n%s", w, text)
		}
	}
}

// TestKeys forks, checkpoints, rolls back and drops by keys, against a fleet.
func TestKeys(t *testing.T) {
	c := serve(t)
	s := screen{&model{ctx: t.Context(), client: c, width: 100, height: 12}, t}
	s.do(s.Init())
	s.shows("> golden", "f: fork", "q: quit")
	s.keys("f", "v", "m", "1", "2", "backspace")
	s.shows("name of the new node: vm1_")
	s.keys("enter")
	s.shows("fork golden: done")
	s.refresh()
	s.keys("down")
	s.shows(">   vm1", "c: checkpoint", "d: drop")
	s.keys("c", "a", "enter")
	s.refresh()
	s.shows("vm1@a")
	for _, e := range s.report.Elements {
		if e.Kind == api.KindNode && s.selected != e.Name {
			t.Errorf("%s is selected", s.selected)
		}
	}
	// A rollback asks for the checkpoint and then for a confirmation.
	s.keys("r", "v", "m", "1", "@", "a", "enter")
	s.shows("roll vm1 back?", "is lost", "(y/n)")
	s.keys("x", "n")
	s.shows("rollback vm1: cancelled")
	s.keys("r", "v", "m", "1", "@", "a", "enter", "y")
	s.shows("rollback vm1: done")
	// An error of the server is shown.
	s.keys("r", "x", "enter", "y")
	if s.shows("rollback vm1: "); strings.Contains(s.message, "done") {
		t.Errorf("message %q", s.message)
	}
	s.keys("d")
	s.shows("drop vm1? Its file is deleted")
	s.keys("y")
	s.refresh()
	if text := s.screen(); strings.Contains(text, "vm1 ") && strings.Contains(text, "node ") {
		t.Errorf("it is there still:\n%s", text)
	}
	if !s.keys("q") {
		t.Error("q does not quit")
	}
}

// A small window shows the selected element, wherever that is.
func TestScrolling(t *testing.T) {
	var r monitor.Report
	r.At = time.Now()
	for i := range 50 {
		r.Elements = append(r.Elements, monitor.Element{Element: api.Element{Name: "disk" + string(rune('A'+i/10)) + string(rune('0'+i%10)), Kind: api.KindDisk}})
	}
	s := screen{&model{ctx: t.Context(), report: r, width: 60, height: 10, selected: "diskA0"}, t}
	for range 70 {
		s.keys("down")
		s.shows("> " + s.selected)
		if n := strings.Count(s.screen(), "\n"); n != 9 {
			t.Fatalf("%d lines", n+1)
		}
	}
	if s.selected != "diskE9" {
		t.Errorf("%s is selected", s.selected)
	}
	for range 70 {
		s.keys("up")
		s.shows("> " + s.selected)
	}
}

func TestOnce(t *testing.T) {
	c := serve(t)
	r, err := Once(t.Context(), c, 10*time.Millisecond)
	if err != nil || len(r.Elements) != 1 || r.Server != api.ServerOfFleet {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := Once(t.Context(), api.NewClient(filepath.Join(t.TempDir(), "none")), 0); err == nil {
		t.Error("a report of no server")
	}
}

// A merge that failed can be taken back, and only such a one.
func TestTakeBackIsOffered(t *testing.T) {
	m := &model{report: monitor.Report{Server: api.ServerOfFleet}}
	offered := func(merge *api.TreeMerge) bool {
		e := monitor.Element{Element: api.Element{Name: "vm1", Disk: "golden", Kind: api.KindNode, Merge: merge}}
		for _, a := range m.actions(&e) {
			if a.key == "t" {
				if text := a.loses(&e); !strings.Contains(text, "golden gets what it had before") {
					t.Errorf("it asks %q", text)
				}
				return true
			}
		}
		return false
	}
	if offered(nil) || offered(&api.TreeMerge{State: api.MergeRunning}) || !offered(&api.TreeMerge{State: api.MergeFailed}) {
		t.Error("taking back is offered without a failed merge, or not of one")
	}
}

// A merge is paused while it runs and resumed otherwise, of a fleet's node and of a served origin.
func TestPauseAndResume(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var asked string
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.Method + " " + r.URL.Path
		w.Write([]byte("{}"))
	})}
	go srv.Serve(l)
	defer srv.Close()
	client := api.NewClient(socket)
	for _, c := range []struct {
		server api.ServerKind
		state  api.MergeState
		want   string
	}{
		{api.ServerOfFleet, api.MergeRunning, "POST /v1/nodes/vm1/merge/pause"},
		{api.ServerOfFleet, api.MergePaused, "POST /v1/nodes/vm1/merge/resume"},
		{api.ServerOfFleet, api.MergeFailed, "POST /v1/nodes/vm1/merge/resume"},
		{api.ServerOfFleet, api.MergeDone, ""},
		{api.ServerOfOne, api.MergeRunning, "POST /v1/merge/pause"},
		{api.ServerOfOne, api.MergePaused, "POST /v1/merge/resume"},
	} {
		m := &model{report: monitor.Report{Server: c.server}}
		e := monitor.Element{Element: api.Element{Name: "vm1", Kind: api.KindNode, Merge: &api.TreeMerge{State: c.state}}}
		asked = ""
		for _, a := range m.actions(&e) {
			if a.key != "p" {
				continue
			}
			if err := a.do(t.Context(), client, &e, ""); err != nil {
				t.Error(err)
			}
		}
		if asked != c.want {
			t.Errorf("server %q, merge %s: %q, want %q", c.server, c.state, asked, c.want)
		}
	}
}
