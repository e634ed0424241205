package main

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A process is the program in a process of its own.
type process struct {
	*exec.Cmd
	stdout *bufio.Reader
	stderr bytes.Buffer
}

// launch starts the program.
func launch(t *testing.T, args ...string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(program(t), args...)}
	p.run(t)
	return p
}

// run starts a process that has not been started.
func (p *process) run(t *testing.T) {
	t.Helper()
	pipe, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdout, p.Stderr = bufio.NewReader(pipe), &p.stderr
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Process.Kill() }) // an error: it has ended, as it should
}

// end waits for the process, at most ten seconds, and returns its exit status; -1 when a signal ended it.
func (p *process) end(t *testing.T) int {
	t.Helper()
	late := time.AfterFunc(10*time.Second, func() { p.Process.Kill() })
	io.Copy(io.Discard, p.stdout)
	p.Wait()
	if !late.Stop() {
		t.Fatal("it did not end within ten seconds")
	}
	return p.ProcessState.ExitCode()
}

func TestServeProcess(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		p := newPair(t)
		p.withStore(t)
		socket, control := filepath.Join(p.dir, "s"), filepath.Join(p.dir, "c")
		s := launch(t, "serve", p.origin, "a="+p.cow, "--export-origin", "--socket", socket, "--control", control)
		for _, want := range []string{"a  nbd+unix:///a?socket=" + socket + "\n", "origin  nbd+unix:///origin?socket=" + socket + "\n"} {
			if line, err := s.stdout.ReadString('\n'); line != want {
				t.Fatalf("it printed %q (%v), want %q; %s", line, err, want, &s.stderr)
			}
		}
		if st := mustJSON[api.Status](t, "status", "--control", control); st.Snapshots[0].Exceptions != 5 {
			t.Errorf("status %+v", st)
		}
		dmsnap("merge", p.origin, p.cow).wantRefused(t, p.origin, "in use")
		dmsnap("serve", p.origin, p.cow, "--socket", socket).wantRefused(t, p.origin, "in use")
		began := time.Now()
		s.Process.Signal(sig)
		if status := s.end(t); status != exitDone || s.stderr.Len() > 0 {
			t.Errorf("%v: status %d, %s", sig, status, &s.stderr)
		}
		if d := time.Since(began); d > 5*time.Second {
			t.Errorf("%v: it took %v to end", sig, d)
		}
		for _, path := range []string{socket, control} {
			if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left: %v", path, err)
			}
		}
		// A server that was killed leaves its sockets; the next one takes their place.
		for range 2 {
			s = launch(t, "serve", p.origin, p.cow, "--socket", socket, "--control", control)
			if _, err := s.stdout.ReadString('\n'); err != nil {
				t.Fatalf("%v: %s", err, &s.stderr)
			}
			s.Process.Kill()
			s.end(t)
		}
	}
}

// A server that was started with SIGHUP ignored goes on when its terminal goes away, and a second SIGHUP does not cut
// short the end that the first one began.
func TestHangUp(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	s := &process{Cmd: exec.Command("nohup", program(t), "serve", p.origin, p.cow, "--socket", filepath.Join(p.dir, "s"))}
	s.run(t)
	uri, err := s.stdout.ReadString('\n')
	if err != nil {
		t.Fatalf("%v: %s", err, &s.stderr)
	}
	s.Process.Signal(syscall.SIGHUP)
	c := dial(t, strings.TrimSpace(strings.TrimPrefix(uri, "disk")))
	writeAt(t, c, []byte("after"), 0) // it is served still
	s.Process.Signal(syscall.SIGTERM)
	if status := s.end(t); status != exitDone {
		t.Errorf("status %d, %s", status, &s.stderr)
	}
	s = launch(t, "serve", p.origin, p.cow, "--socket", filepath.Join(p.dir, "s"))
	if uri, err = s.stdout.ReadString('\n'); err != nil {
		t.Fatalf("%v: %s", err, &s.stderr)
	}
	writeAt(t, dial(t, strings.TrimSpace(strings.TrimPrefix(uri, "disk"))), []byte("acknowledged"), 300_000)
	for range 3 {
		s.Process.Signal(syscall.SIGHUP)
	}
	if status := s.end(t); status != exitDone {
		t.Errorf("status %d, %s", status, &s.stderr)
	}
	if st := mustJSON[inspect.Status](t, "status", p.cow); st.Exceptions != 6 {
		t.Errorf("%d exceptions, want 6: an acknowledged write is lost", st.Exceptions)
	}
}

// bigPair is a pair with 32 MiB of exceptions out of order, enough to be interrupted.
func bigPair(t *testing.T) (p pair, shown []byte) {
	t.Helper()
	const size, piece = 32 << 20, 64 << 10
	dir := testhost.ShortDir(t)
	p = pair{dir: dir, origin: filepath.Join(dir, "disk.img"), cow: filepath.Join(dir, "disk.cow")}
	writeFile(t, p.origin, make([]byte, size))
	mustRun(t, "create", p.origin, p.cow)
	origin, cow := openFile(t, p.origin, true), openFile(t, p.cow, false)
	snap, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	shown = make([]byte, size)
	r := rand.New(rand.NewPCG(5, 5))
	for _, i := range r.Perm(size / piece) {
		b := shown[i*piece : (i+1)*piece]
		for j := 0; j < len(b); j += 512 {
			b[j] = byte(r.Uint32()) | 1
		}
		writeAt(t, snap, b, int64(i*piece))
	}
	for _, err := range []error{snap.Close(), cow.Close(), origin.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return p, shown
}

// A merge that is killed, whenever, goes on when it is started again.
func TestMergeKilledAtAnyMomentGoesOn(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	p, shown := bigPair(t)
	killed := 0
	for delay := 2 * time.Millisecond; ; delay += delay / 2 {
		m := launch(t, "merge", p.origin, p.cow)
		time.Sleep(delay) // a moment is what this test is about
		m.Process.Kill()
		status := m.end(t)
		if status != -1 && status != exitDone {
			t.Fatalf("merge: status %d, %s", status, &m.stderr)
		}
		st := mustJSON[inspect.Status](t, "status", p.cow)
		if !st.Valid {
			t.Fatalf("killed after %v: %+v", delay, st)
		}
		if got := mustRun(t, "export", p.origin, p.cow, "-"); got != string(shown) {
			t.Fatalf("killed after %v, with %d exceptions left: the snapshot shows something else", delay, st.Exceptions)
		}
		if status == exitDone {
			break
		}
		killed++
	}
	if killed == 0 {
		t.Error("it was never killed in time")
	}
	mustRun(t, "merge", p.origin, p.cow)
	wantContent(t, p.origin, shown)
}

// The first signal ends a merge or an export between two steps, with a status that says so.
func TestInterruptedWork(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	p, shown := bigPair(t)
	out := filepath.Join(p.dir, "out.img")
	before := digests(t, p.dir)
	for _, c := range []struct {
		sig    syscall.Signal
		status int
		word   string
	}{{syscall.SIGINT, 130, "interrupted"}, {syscall.SIGTERM, 143, "terminated"}, {syscall.SIGHUP, 129, "hung up"}} {
		// The pipe is full and nobody reads: the export is certainly under way.
		e := launch(t, "export", p.origin, p.cow, "-")
		if _, err := e.stdout.ReadByte(); err != nil {
			t.Fatal(err)
		}
		e.Process.Signal(c.sig)
		if status := e.end(t); status != c.status || !strings.Contains(e.stderr.String(), c.word) {
			t.Errorf("export, %v: status %d, %s", c.sig, status, &e.stderr)
		}
		if c.sig == syscall.SIGHUP {
			continue // a shell repeats it
		}
		// A second one ends it where it stands.
		e = launch(t, "export", p.origin, p.cow, "-")
		e.stdout.ReadByte()
		ended := make(chan struct{})
		go func() { e.Process.Wait(); close(ended) }()
		for i := 0; ; i++ {
			e.Process.Signal(c.sig)
			select {
			case <-ended:
			case <-time.After(50 * time.Millisecond):
				if i < 100 {
					continue
				}
				t.Error("two signals did not end an export that nobody reads")
			}
			break
		}
		wantSame(t, p.dir, before)
	}
	// Into a file: whole under its name, or nothing at all.
	for delay := 2 * time.Millisecond; ; delay += delay / 2 {
		e := launch(t, "export", p.origin, p.cow, out)
		time.Sleep(delay)
		e.Process.Signal(syscall.SIGTERM)
		status := e.end(t)
		if status == exitDone {
			wantContent(t, out, shown)
			os.Remove(out)
			wantSame(t, p.dir, before)
			break
		}
		if wantSame(t, p.dir, before); status != -1 && status != 143 {
			t.Fatalf("export: status %d, %s", status, &e.stderr)
		}
	}
	m := launch(t, "merge", p.origin, p.cow)
	m.Process.Signal(syscall.SIGINT)
	// So early a signal may come before anybody listens for it (-1), in the middle, or not at all.
	if status := m.end(t); status != -1 && status != exitDone && (status != 130 || !strings.Contains(m.stderr.String(), "run the merge again to continue")) {
		t.Errorf("merge: status %d, %s", status, &m.stderr)
	}
	mustRun(t, "merge", p.origin, p.cow)
	wantContent(t, p.origin, shown)
}
