package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/server/api"
)

// TestTopInATerminal shows a server in tmux, drops a snapshot by keys, and ends with the terminal as it was.
func TestTopInATerminal(t *testing.T) {
	tmux, err := exec.LookPath("tmux")
	if err != nil {
		t.Skip("SKIPPED: no tmux (Debian: tmux)")
	}
	p := newPair(t)
	p.withStore(t)
	control := filepath.Join(p.dir, "c")
	s := launch(t, "serve", p.origin, "vm1="+p.cow, "--socket", filepath.Join(p.dir, "s"), "--control", control)
	if _, err := s.stdout.ReadString('\n'); err != nil {
		t.Fatalf("%v: %s", err, &s.stderr)
	}
	run := func(args ...string) string {
		t.Helper()
		out, err := exec.Command(tmux, append([]string{"-S", filepath.Join(p.dir, "tmux"), "-f", "/dev/null"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("tmux %q: %v: %s", args, err, out)
		}
		return string(out)
	}
	run("new-session", "-d", "-x", "100", "-y", "20", "sh -c '"+program(t)+" top --control "+control+"; echo ended with $?; exec sleep 1000'")
	t.Cleanup(func() { exec.Command(tmux, "-S", filepath.Join(p.dir, "tmux"), "kill-server").Run() })
	shows := func(words ...string) {
		t.Helper()
		var screen string
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			screen = run("capture-pane", "-p")
			missing := false
			for _, w := range words {
				missing = missing || !strings.Contains(screen, w)
			}
			if !missing {
				return
			}
		}
		t.Fatalf("%q is not shown:\n%s", words, screen)
	}
	shows("> origin", "vm1", "FULL IN", "q: quit")
	run("send-keys", "s")
	shows("path of a new COW file")
	run("send-keys", filepath.Join(p.dir, "late.cow"), "Enter")
	shows("snapshot origin: done", "late")
	run("send-keys", "Down")
	shows(">   vm1", "d: drop")
	run("send-keys", "d")
	shows("stop serving vm1?", "(y/n)")
	run("send-keys", "n")
	shows("cancelled")
	run("send-keys", "d", "y")
	shows("drop vm1: done")
	if st := mustJSON[api.Status](t, "status", "--control", control); len(st.Snapshots) != 1 || st.Snapshots[0].Name != "late" {
		t.Errorf("served: %+v", st.Snapshots)
	}
	run("send-keys", "q")
	shows("ended with 0")
	s.Process.Kill()
	s.end(t)
	mustRun(t, "check", p.cow)
	mustRun(t, "check", filepath.Join(p.dir, "late.cow"))
}

func TestTopWithoutATerminal(t *testing.T) {
	p := newPair(t)
	dmsnap("top", "--control", filepath.Join(p.dir, "none")).wantRefused(t, "terminal", "--once")
	dmsnap("top", "--once", "--control", filepath.Join(p.dir, "none")).wantRefused(t, "none")
}
