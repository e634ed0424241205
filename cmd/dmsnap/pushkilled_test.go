package main

import (
	"bytes"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testremote"
)

// A killer passes requests on, and kills a process at one of them: before it is passed on, or before its answer is.
type killer struct {
	mu     sync.Mutex
	next   http.Handler
	cmd    *exec.Cmd
	seen   int
	at     int // 0: never
	after  bool
	killed bool
}

func (k *killer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	k.mu.Lock()
	k.seen++
	next, now, after := k.next, k.seen == k.at, k.after
	k.mu.Unlock()
	if !now || after {
		next.ServeHTTP(w, r)
	}
	if now {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.killed = true
		k.cmd.Process.Kill()
		panic(http.ErrAbortHandler)
	}
}

// command is one that may be killed: its temporary files are removed at the end of the test.
func (k *killer) command(t *testing.T, args ...string) *exec.Cmd {
	c := exec.Command(program(t), args...)
	c.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
	return c
}

// atEach runs a command again and again, each time killed at a later request; the last time it is not killed. prepare is called before each run, check
// after each that was killed. It is killed before a request is passed on, and before its answer is; with -short at one of these, in turn.
func (k *killer) atEach(t *testing.T, prepare, check func(), args ...string) {
	t.Helper()
	for n := 2; !t.Failed(); n++ {
		if testing.Short() && n%2 != n/2%2 {
			continue
		}
		prepare()
		var out bytes.Buffer
		k.mu.Lock()
		k.cmd, k.seen, k.at, k.after, k.killed = k.command(t, args...), 0, n/2, n%2 == 1, false
		k.cmd.Stdout, k.cmd.Stderr = &out, &out
		err := k.cmd.Start()
		k.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		err = k.cmd.Wait()
		k.mu.Lock()
		killed := k.killed
		k.at = 0
		k.mu.Unlock()
		if !killed {
			if err != nil || n < 10 {
				t.Errorf("%s: %v after %d requests, %s", args, err, n/2, &out)
			}
			t.Logf("%s was killed at each of %d requests", args[0], n/2-1)
			return
		}
		if check(); t.Failed() {
			t.Errorf("%s was killed at request %d", args[0], n/2)
		}
	}
}

// atRandom runs a command that is killed at a random moment, also between requests.
func (k *killer) atRandom(t *testing.T, prepare, check func(), args ...string) {
	t.Helper()
	rounds := 3
	switch {
	case os.Getenv("DMSNAP_DEEP") != "":
		rounds = 200
	case testing.Short():
		rounds = 1
	}
	prepare()
	began := time.Now()
	mustRun(t, args...)
	took := time.Since(began)
	for n := 0; n < rounds && !t.Failed(); n++ {
		prepare()
		c := k.command(t, args...)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		after := rand.N(took)
		time.Sleep(after)
		c.Process.Kill()
		c.Wait()
		if check(); t.Failed() {
			t.Errorf("%s was killed after %v", args[0], after)
		}
	}
}

// Push and pull are killed at each of their requests, and at random moments. The reference names the old disk or the new one, whole; the folder has whole files
// and temporary ones; and the repeated command completes it.
func TestPushAndPullKilled(t *testing.T) {
	k := newKit(t)
	kills := &killer{next: testremote.NewRegistry()}
	ref := "oci://" + testremote.Start(t, kills) + "/golden/disk:1"
	old, cache := filepath.Join(k.out, "old.img"), filepath.Join(t.TempDir(), "cache")
	writeFile(t, old, blocktest.Pattern(1<<20, 1))
	mustRun(t, "export", k.path["ORIGIN"], k.path["COW"], k.path["OUT"])
	before, want := readFile(t, old), readFile(t, k.path["OUT"])
	shows := func() []byte {
		path := filepath.Join(t.TempDir(), "shown.img")
		mustRun(t, "export", ref, path, "--cache-dir", t.TempDir())
		return readFile(t, path)
	}
	push := []string{"push", k.path["ORIGIN"], k.path["COW"], ref}
	empty := func() {
		kills.mu.Lock()
		kills.next = testremote.NewRegistry()
		kills.mu.Unlock()
		mustRun(t, "push", old, ref)
	}
	pushed := func() {
		if got := shows(); !bytes.Equal(got, want) && !bytes.Equal(got, before) {
			t.Error("the reference names a disk that is neither the old one nor the new one")
		}
		if mustRun(t, push...); !bytes.Equal(shows(), want) {
			t.Error("the repeated push is not complete")
		}
	}
	kills.atEach(t, empty, pushed, push...)
	kills.atRandom(t, empty, pushed, push...)

	folder, whole := filepath.Join(t.TempDir(), "images"), t.TempDir()
	names := strings.Fields(mustRun(t, "pull", ref, whole, "--cache-dir", t.TempDir()))
	same := func(name string) {
		if !bytes.Equal(readFile(t, filepath.Join(folder, name)), readFile(t, filepath.Join(whole, name))) {
			t.Errorf("%s is not whole", name)
		}
	}
	pull := []string{"pull", ref, folder, "--cache-dir", cache}
	nothing := func() {
		os.RemoveAll(folder)
		os.RemoveAll(cache)
	}
	pulled := func() {
		found, err := os.ReadDir(folder)
		if err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
		for _, f := range found {
			if !strings.HasSuffix(f.Name(), ".part") { // what has no name of its own yet
				same(f.Name())
			}
		}
		mustRun(t, pull...)
		for _, name := range names {
			same(filepath.Base(name))
		}
		checkStores(t, filepath.Join(folder, "*.cow"))
		if left, err := filepath.Glob(filepath.Join(folder, ".*")); err != nil || len(left) > 0 {
			t.Errorf("%q is left, %v", left, err)
		}
	}
	kills.atEach(t, nothing, pulled, pull...)
	kills.atRandom(t, nothing, pulled, pull...)
}
