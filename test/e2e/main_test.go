// Package e2e_test drives the real binary from outside: dmsnap serve and the offline verbs, over NBD and the control
// API, on disks that fail and lose power. It imports nothing of the library: what is right is said by a model of
// its own (model_test.go), and the NBD client is its own (client_test.go).
//
//	go test ./test/e2e -run TestFuzz                      random schedules, about half a minute
//	DMSNAP_SEED=n go test ./test/e2e -run TestFuzz -v     the schedule of one seed, with its log
//	DMSNAP_DEEP=1 go test ./test/e2e -timeout 3h          for two hours, or DMSNAP_E2E_TIME
//	DMSNAP_E2E_INJECT=0                                   without injected errors in the random schedules
//	DMSNAP_BINARY=path                                    this binary instead of the tree's
package e2e_test

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/test/e2e/faultfs"
)

// scratch is the directory of everything that the tests make. It is removed when this process ends in whatever way.
var scratch string

// janitorOf names the variable that makes a process the one that cleans up; its value is the scratch directory.
const janitorOf = "DMSNAP_E2E_JANITOR"

func TestMain(m *testing.M) {
	if raceEnabled && os.Getenv("GORACE") == "" {
		// The race detector sleeps a second at the end of every process, and the tests end hundreds.
		os.Setenv("GORACE", "atexit_sleep_ms=10")
	}
	faultfs.Main()
	if dir := os.Getenv(janitorOf); dir != "" {
		cleanUp(dir)
	}
	flag.Parse()
	if testing.Short() {
		fmt.Println("skipped with -short: the tests from outside")
		os.Exit(0)
	}
	os.Exit(withScratch(m.Run))
}

// withScratch makes the scratch directory, runs f, and removes the directory: by a process that also notices when this
// one is killed.
func withScratch(f func() int) (status int) {
	var err error
	// Socket paths are bounded: a short name.
	if scratch, err = os.MkdirTemp("", "e2e"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	janitor := exec.Command(self)
	janitor.Env = append(os.Environ(), janitorOf+"="+scratch)
	janitor.Stderr = os.Stderr
	janitor.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := janitor.StdinPipe()
	if err == nil {
		err = janitor.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, errors.Join(err, os.RemoveAll(scratch)))
		return 1
	}
	defer func() {
		in.Close()
		if err := janitor.Wait(); err != nil {
			fmt.Fprintln(os.Stderr, "cleaning up:", err)
			status = 1
		}
	}()
	return f()
}

// cleanUp waits until the tests' process has ended, ends what it left running in the scratch directory, unmounts what
// is mounted there, and removes it.
func cleanUp(dir string) {
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP)
	io.Copy(io.Discard, os.Stdin)
	for range 100 { // the file systems' processes end by themselves
		mounts, err := os.ReadFile("/proc/self/mounts")
		if err == nil && !strings.Contains(string(mounts), " "+dir+"/") {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if at := strings.Fields(line)[1]; strings.HasPrefix(at, dir+"/") {
			fmt.Fprintln(os.Stderr, "still mounted:", at)
			syscall.Unmount(at, syscall.MNT_DETACH)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// program returns the path of the binary, built once.
var program = sync.OnceValue(func() string {
	if path := os.Getenv("DMSNAP_BINARY"); path != "" {
		return path
	}
	path := filepath.Join(scratch, "dmsnap")
	args := []string{"build", "-o", path}
	if raceEnabled {
		args = append(args, "-race")
	}
	build := exec.Command("go", append(args, "./cmd/dmsnap")...)
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		panic(fmt.Sprintf("go build: %v\n%s", err, out))
	}
	return path
})

// deep is true for runs that take hours.
var deep = os.Getenv("DMSNAP_DEEP") != ""

// seedOf returns the seed to replay, if one is asked for.
func seedOf(t *testing.T) (seed uint64, given bool) {
	text := os.Getenv("DMSNAP_SEED")
	if text == "" {
		return 0, false
	}
	seed, err := strconv.ParseUint(text, 0, 64)
	if err != nil {
		t.Fatalf("DMSNAP_SEED: %v", err)
	}
	return seed, true
}

// newFolder makes a directory for one test, removed at its end.
func newFolder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(scratch, "t")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// newFS mounts a file system with the directories "o" for origins and "c" for COW devices. The test is skipped where
// none can be mounted.
func newFS(t testing.TB) *faultfs.FS {
	t.Helper()
	f, err := faultfs.Start(newFolder(t))
	if errors.Is(err, faultfs.ErrUnavailable) {
		t.Skip("SKIPPED:", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, name := range []string{"o", "c"} {
		if err := f.Folder(name, 0); err != nil {
			t.Fatal(err)
		}
	}
	return f
}
