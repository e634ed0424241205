package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/snapshot"
)

// buildFolder holds the program, built once for the tests that need a process of their own.
var buildFolder string

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "dmsnap" {
		main() // a copy that build made
	}
	if signal.Ignored(syscall.SIGHUP) {
		// By nohup(1). The programs that the tests start would ignore it too; a handled signal they get at its default.
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	}
	var err error
	if buildFolder, err = os.MkdirTemp("", "dmsnap-test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status := blocktest.RunAll(m)
	os.RemoveAll(buildFolder)
	os.Exit(status)
}

// build makes the program: a copy of this test, which saves half a minute of compiling, or with the race detector, which would
// slow it down, a build of its own.
var build = sync.OnceValues(func() (string, error) {
	path := filepath.Join(buildFolder, "dmsnap")
	info, known := debug.ReadBuildInfo()
	own := !known || slices.ContainsFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "-race" && s.Value == "true" })
	if !own {
		self, err := os.Executable()
		if err != nil {
			return "", err
		}
		b, err := os.ReadFile(self)
		if err != nil {
			return "", err
		}
		return path, os.WriteFile(path, b, 0o755)
	}
	out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, err
})

// program returns the path of the built program.
func program(t *testing.T) string {
	t.Helper()
	path, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// outcome is what became of one call of the program.
type outcome struct {
	status      int
	out, stderr string
}

// dmsnap runs the program within this process.
func dmsnap(args ...string) outcome {
	var out, stderr bytes.Buffer
	status := run(args, strings.NewReader(""), &out, &stderr)
	return outcome{status, out.String(), stderr.String()}
}

// mustRun runs the program, which must succeed quietly, and returns what it printed.
func mustRun(t *testing.T, args ...string) string {
	t.Helper()
	o := dmsnap(args...)
	if o.status != exitDone || o.stderr != "" {
		t.Fatalf("dmsnap %q: status %d, %s", args, o.status, o.stderr)
	}
	return o.out
}

// mustMerge runs an offline merge beside stores that may be other snapshots of the origin: it may warn of them.
func mustMerge(t *testing.T, args ...string) {
	t.Helper()
	o := dmsnap(append([]string{"merge"}, args...)...)
	lines := strings.Split(strings.TrimSpace(o.stderr), "\n")
	if o.status != exitDone || len(lines) > 1 || o.stderr != "" && !strings.Contains(lines[0], "warning: if they are snapshots of") {
		t.Fatalf("dmsnap merge %q: status %d, %s", args, o.status, o.stderr)
	}
}

// mustJSON runs the program with --json and reads what it printed.
func mustJSON[T any](t *testing.T, args ...string) (v T) {
	t.Helper()
	out := mustRun(t, append(args, "--json")...)
	d := json.NewDecoder(strings.NewReader(out))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("dmsnap %q printed %s: %v", args, out, err)
	}
	return v
}

// wantRefused checks that the program refused with status 2 and an error that has all the words.
func (o outcome) wantRefused(t *testing.T, words ...string) {
	t.Helper()
	if o.status != exitTrouble {
		t.Errorf("status %d, want %d", o.status, exitTrouble)
	}
	if !strings.HasPrefix(o.stderr, "dmsnap: ") || strings.Count(o.stderr, "\n") != 1 {
		t.Errorf("stderr %q, want one line of dmsnap's", o.stderr)
	}
	if o.out != "" {
		t.Errorf("it also printed %q", o.out)
	}
	for _, w := range words {
		if !strings.Contains(o.stderr, w) {
			t.Errorf("stderr %q does not say %q", o.stderr, w)
		}
	}
}

// pair is an origin and the place for a COW file, in a folder of their own.
type pair struct {
	dir, origin, cow string
	content          []byte // of the origin
}

// newPair makes an origin of 1 MiB and a half chunk: data, a hole, data.
func newPair(t *testing.T) pair {
	t.Helper()
	dir := testhost.ShortDir(t)
	p := pair{dir, filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk.cow"), make([]byte, 1<<20+2048)}
	r := rand.New(rand.NewPCG(7, 7))
	for i := range p.content {
		if i < 300<<10 || i > 900<<10 {
			p.content[i] = byte(r.Uint32())
		}
	}
	writeFile(t, p.origin, p.content)
	return p
}

// withStore makes the store too, and writes to the snapshot. It returns what the snapshot shows.
func (p pair) withStore(t *testing.T) []byte {
	t.Helper()
	mustRun(t, "create", p.origin, p.cow)
	origin, cow := openFile(t, p.origin, true), openFile(t, p.cow, false)
	snap, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 102_000, 500_000, snap.Size() - 1000} {
		if _, err := snap.WriteAt(bytes.Repeat([]byte("snapshot"), 100), off); err != nil {
			t.Fatal(err)
		}
	}
	shown := make([]byte, snap.Size())
	if _, err := snap.ReadAt(shown, 0); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{snap.Close(), cow.Close(), origin.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return shown
}

func openFile(t *testing.T, path string, readOnly bool) *block.File {
	t.Helper()
	f, err := block.Open(path, block.Options{ReadOnly: readOnly})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func writeFile(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// wantContent checks what is in a file.
func wantContent(t *testing.T, path string, want []byte) {
	t.Helper()
	if got := readFile(t, path); !bytes.Equal(got, want) {
		t.Errorf("%s has %d bytes of another content than the %d expected", path, len(got), len(want))
	}
}

// digests returns what a folder holds: names, modes, and digests of the contents.
func digests(t *testing.T, dir string) map[string]string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, e := range list {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		all[e.Name()] = info.Mode().String()
		if info.Mode().IsRegular() {
			all[e.Name()] += " " + digest(readFile(t, filepath.Join(dir, e.Name())))
		}
	}
	return all
}

func digest(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }
