package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/snapshot"
)

// killRounds is how often a server is killed: DMSNAP_DEEP=1 makes it hundreds of times.
func killRounds(t *testing.T) int {
	if testing.Short() {
		t.Skip("long")
	}
	if os.Getenv("DMSNAP_DEEP") != "" {
		return 400
	}
	return 6
}

// killed is a pair whose servers are killed.
func killed(t *testing.T, rounds int, more ...string) (p pair, k blocktest.Kills) {
	t.Helper()
	const sectors = 8192
	p = newShortPair(t)
	writeFile(t, p.origin, make([]byte, sectors*512))
	if err := os.Remove(p.cow); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "create", p.origin, p.cow, "--chunk-size", "2KiB")
	args := append([]string{"serve", p.origin, p.cow, "--export-origin", "--socket", filepath.Join(p.dir, "s")}, more...)
	return p, blocktest.Kills{
		Rounds: rounds, Sectors: sectors,
		Start: func(t *testing.T, round int) (kill func()) {
			t.Helper()
			s := launch(t, append(args, "--sync", []string{"flush", "always"}[round%2])...)
			for line := ""; !strings.HasPrefix(line, "origin  "); {
				var err error
				if line, err = s.stdout.ReadString('\n'); err != nil {
					t.Fatalf("%v: %s", err, &s.stderr)
				}
			}
			return func() {
				s.Process.Kill()
				if status := s.end(t); status != -1 {
					t.Fatalf("it ended by itself, with %d: %s", status, &s.stderr)
				}
			}
		},
		Look: func(t *testing.T) (_, _ block.Device, done func()) {
			t.Helper()
			origin, cow := openFile(t, p.origin, true), openFile(t, p.cow, true)
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
}

// sound wants that what is left is a store like any other.
func (p pair) sound(t *testing.T) {
	t.Helper()
	mustRun(t, "check", p.cow, "--origin", p.origin)
	mustRun(t, "merge", p.origin, p.cow)
	if st := mustJSON[inspect.Status](t, "status", p.cow); st.Exceptions != 0 || !st.Valid {
		t.Errorf("merged: %+v", st)
	}
}

// exportOf is the name of an export of a pair.
func exportOf(origin bool) string {
	if origin {
		return "origin"
	}
	return "disk"
}

// TestKillLoop kills a server that clients keep busy over NBD; see blocktest.RunKills.
func TestKillLoop(t *testing.T) {
	p, k := killed(t, killRounds(t))
	k.Connect = func(origin bool) (block.Device, func(), error) {
		c, err := nbd.Dial(t.Context(), "nbd+unix:///"+exportOf(origin)+"?socket="+filepath.Join(p.dir, "s"))
		return c, func() { c.Close() }, err
	}
	blocktest.RunKills(t, k)
	p.sound(t)
}

// TestFuseKillLoop does the same through files.
func TestFuseKillLoop(t *testing.T) {
	rounds := killRounds(t)
	if err := mountable(); err != nil {
		t.Skip("SKIPPED: no FUSE file system can be mounted: ", err)
	}
	for _, cache := range []string{"--fuse-cache=false", "--fuse-cache"} {
		t.Run(cache, func(t *testing.T) {
			serveFiles(t, newShortPair(t)).stop(t) // skips the test where it can't
			dir := filepath.Join(t.TempDir(), "files")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
			p, k := killed(t, rounds, "--fuse", dir, cache)
			k.Connect = func(origin bool) (block.Device, func(), error) {
				f, err := block.Open(filepath.Join(dir, exportOf(origin)), block.Options{Lock: block.LockNone})
				return f, func() { f.Close() }, err
			}
			blocktest.RunKills(t, k)
			p.sound(t)
		})
	}
}
