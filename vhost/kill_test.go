package vhost_test

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/snapshot"
)

// TestKillLoop kills a server whose virtual machines keep it busy; see blocktest.RunKills. DMSNAP_DEEP=1 makes it hundreds of times.
func TestKillLoop(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	rounds := 6
	if os.Getenv("DMSNAP_DEEP") != "" {
		rounds = 400
	}
	dir := testhost.ShortDir(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	if out, err := exec.Command("go", "build", "-o", at("dmsnap"), "../cmd/dmsnap").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const sectors = 8192
	if err := os.WriteFile(at("origin"), make([]byte, sectors*block.SectorSize), 0o600); err != nil {
		t.Fatal(err)
	}
	var guests shared
	k := blocktest.Kills{Rounds: rounds, Sectors: sectors,
		Start: func(t *testing.T, round int) (kill func()) {
			t.Helper()
			s := exec.Command(at("dmsnap"), "serve", at("origin"), "disk="+at("cow"), "--create", "--export-origin", "--socket", at("s"),
				"--vhost-user", dir, "--sync", []string{"flush", "always"}[round%2])
			var log strings.Builder
			s.Stderr = &log
			out, err := s.StdoutPipe()
			if err == nil {
				err = s.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Process.Kill() })
			ready := false
			for lines := bufio.NewScanner(out); !ready && lines.Scan(); {
				ready = strings.HasPrefix(lines.Text(), "origin  vhost-user")
			}
			if !ready {
				s.Wait()
				t.Fatal("the server did not start: ", log.String())
			}
			return func() {
				s.Process.Kill()
				s.Wait()
				guests.forget()
			}
		},
		Connect: func(origin bool) (block.Device, func(), error) {
			name := "disk.sock"
			if origin {
				name = "origin.sock"
			}
			return guests.connect(t, at(name))
		},
		Look: func(t *testing.T) (_, _ block.Device, done func()) {
			t.Helper()
			origin, err := block.Open(at("origin"), block.Options{})
			if err != nil {
				t.Fatal(err)
			}
			cow, err := block.Open(at("cow"), block.Options{})
			if err != nil {
				t.Fatal(err)
			}
			snap, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
			if err != nil {
				t.Fatal(err)
			}
			return origin, snap, func() {
				if err := errors.Join(snap.Close(), cow.Close(), origin.Close()); err != nil {
					t.Fatal(err)
				}
			}
		},
	}
	blocktest.RunKills(t, k)
	if out, err := exec.Command(at("dmsnap"), "check", at("cow"), "--origin", at("origin")).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// lost is the test of a front-end whose back-end may be gone: its failures are panics with errGone.
type lost struct{ testing.TB }

func (lost) Fatal(...any)          { panic(errGone) }
func (lost) Fatalf(string, ...any) { panic(errGone) }

// shared are the guests of a server, one for each socket, which several clients use.
type shared struct {
	mu     sync.Mutex
	guests map[string]*client
}

// forget ends the guests of a server that was killed.
func (s *shared) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.guests)
}

// connect returns the guest of a socket.
func (s *shared) connect(t *testing.T, path string) (dev block.Device, disconnect func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		if r := recover(); r == errGone {
			err = errGone
		} else if r != nil {
			panic(r)
		}
	}()
	c := s.guests[path]
	if c == nil {
		c = connect(lost{t}, path)
		go func() {
			c.c.SetReadDeadline(time.Time{})
			io.Copy(io.Discard, c.c) // nothing comes before the end
			c.gone.Store(true)
		}()
		if s.guests == nil {
			s.guests = map[string]*client{}
		}
		s.guests[path] = c
	}
	return c, func() {}, nil
}
