package block_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"golang.org/x/sys/unix"
)

// TestMain runs the test binary as the other process: it opens a file, prints that, and keeps it open until its
// standard input ends.
func TestMain(m *testing.M) {
	path := os.Getenv("DMSNAP_TEST_HOLD")
	if path == "" {
		os.Exit(m.Run())
	}
	f, err := block.Open(path, block.Options{ReadOnly: os.Getenv("DMSNAP_TEST_READ_ONLY") != ""})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("held")
	io.Copy(io.Discard, os.Stdin)
	f.Close()
}

var (
	writer = block.Options{}
	reader = block.Options{ReadOnly: true}
	shared = block.Options{ReadOnly: true, Lock: block.LockShared}
	none   = block.Options{Lock: block.LockNone}
)

// check opens and closes a file and compares the result.
func check(t *testing.T, path, beside string, o block.Options, inUse bool) {
	t.Helper()
	f, err := block.Open(path, o)
	if err == nil {
		f.Close()
	}
	if inUse && (!errors.Is(err, block.ErrInUse) || !strings.Contains(err.Error(), path)) || !inUse && err != nil {
		t.Errorf("open with %+v beside %s: %v; should it be in use? %v", o, beside, err, inUse)
	}
}

func TestLocksWithinAProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	create(t, path, 4096).Close()
	for _, c := range []struct {
		first, second block.Options
		inUse         bool
	}{
		{writer, writer, true},
		{writer, reader, true},
		{writer, shared, false},
		{writer, none, false},
		{reader, writer, true},
		{reader, reader, false},
		{reader, shared, false},
		{shared, writer, false},
		{shared, reader, false},
		{none, writer, false},
	} {
		f := open(t, path, c.first)
		check(t, path, fmt.Sprintf("%+v", c.first), c.second, c.inUse)
		f.Close()
		check(t, path, "nothing", c.second, false) // nothing stays behind
	}
	f := open(t, path, writer)
	_, err := block.Open(path, reader)
	if err == nil || !strings.Contains(err.Error(), "by this process (it is being written)") {
		t.Errorf("the holder is not named: %v", err)
	}
	f.Close()
	create(t, path+"2", 4096)
	check(t, path+"2", "the file's creator", writer, true)
}

// start runs a program that holds a file until its standard input ends, and waits until its output has
// the word ready.
func start(t *testing.T, ready string, cmd *exec.Cmd) (stop func()) {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			in.Close()
			io.Copy(io.Discard, out)
			cmd.Wait()
		}
	}
	t.Cleanup(stop)
	said := ""
	for r := bufio.NewReader(out); !strings.Contains(said, ready); {
		b, err := r.ReadByte()
		if err != nil {
			t.Fatalf("%v ended: %q", cmd.Args, said)
		}
		said += string(b)
	}
	return stop
}

func TestLocksOfAnotherProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	create(t, path, 4096).Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	hold := func(more ...string) (*exec.Cmd, func()) {
		cmd := exec.Command(self)
		cmd.Env = append(append(os.Environ(), "DMSNAP_TEST_HOLD="+path, "GORACE=atexit_sleep_ms=0"), more...)
		return cmd, start(t, "held", cmd)
	}
	cmd, stop := hold()
	check(t, path, "a process that writes", writer, true)
	check(t, path, "a process that writes", reader, true)
	check(t, path, "a process that writes", shared, false)
	_, err = block.Open(path, writer)
	if err == nil || !strings.Contains(err.Error(), "(process "+strconv.Itoa(cmd.Process.Pid)+")") {
		t.Errorf("the holder, process %d, is not named: %v", cmd.Process.Pid, err)
	}
	stop()
	check(t, path, "a process that ended", writer, false)

	_, stop = hold("DMSNAP_TEST_READ_ONLY=1")
	check(t, path, "a process that reads", writer, true)
	check(t, path, "a process that reads", reader, false)
	stop()

	// A process that is killed leaves no locks.
	cmd, stop = hold()
	check(t, path, "a process that writes", writer, true)
	cmd.Process.Kill()
	stop()
	check(t, path, "a process that was killed", writer, false)
}

// Other programs lock whole files.
func TestWholeFileLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	create(t, path, 4096).Close()
	other, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.FcntlFlock(other.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		t.Fatal(err)
	}
	for _, o := range []block.Options{writer, reader, shared} {
		check(t, path, "a lock on the whole file", o, true)
	}
	check(t, path, "a lock on the whole file", none, false)
}

// needQEMU skips a test where qemu's tools are missing.
func needQEMU(t *testing.T) {
	for _, tool := range []string{"qemu-io", "qemu-img", "qemu-nbd"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: whether qemu and dmsnap respect each other's locks: %v (package qemu-utils)", err)
		}
	}
}

func TestQEMUHoldsTheFile(t *testing.T) {
	needQEMU(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	create(t, path, 1<<20).Close()
	qcow := filepath.Join(dir, "disk.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-f", "qcow2", qcow, "1M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, c := range []struct {
		path    string
		args    []string
		holder  string
		inUse   []block.Options
		allowed []block.Options
	}{
		{path, []string{"qemu-io", "-f", "raw", path}, "qemu-io", []block.Options{writer, reader}, []block.Options{shared, none}},
		{path, []string{"qemu-io", "-r", "-f", "raw", path}, "qemu-io", nil, []block.Options{writer, reader, shared}},
		{qcow, []string{"qemu-io", "-f", "qcow2", qcow}, "qemu-io", []block.Options{writer, reader}, []block.Options{shared, none}},
		{path, []string{"qemu-nbd", "-f", "raw"}, "qemu-nbd", []block.Options{writer, reader}, []block.Options{shared}},
		{path, []string{"qemu-nbd", "-r", "-f", "raw"}, "qemu-nbd", []block.Options{writer}, []block.Options{reader, shared}},
	} {
		var stop func()
		if c.holder == "qemu-nbd" {
			stop = startQEMUNBD(t, append(c.args, c.path))
		} else {
			stop = start(t, "qemu-io>", exec.Command(c.args[0], c.args[1:]...))
		}
		for _, o := range c.inUse {
			check(t, c.path, strings.Join(c.args, " "), o, true)
			if _, err := block.Open(c.path, o); err == nil || !strings.Contains(err.Error(), "by "+c.holder+" (process ") {
				t.Errorf("%v is not named: %v", c.args, err)
			}
		}
		for _, o := range c.allowed {
			check(t, c.path, strings.Join(c.args, " "), o, false)
		}
		stop()
		check(t, c.path, c.holder+" that ended", writer, false)
	}
}

// startQEMUNBD runs qemu-nbd, which goes to the background when it is ready.
func startQEMUNBD(t *testing.T, args []string) (stop func()) {
	t.Helper()
	dir := t.TempDir()
	pidFile := filepath.Join(dir, "pid")
	args = append(args, "--fork", "--persistent", "--pid-file", pidFile, "-k", filepath.Join(dir, "socket"))
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	text, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	// It is not our child, so its end is seen by a pidfd.
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	stop = func() {
		if fd < 0 {
			return
		}
		// A signal that arrives while the program starts to wait can be lost, so it is sent until it takes effect.
		for {
			unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0)
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 200)
			if n > 0 || err != nil && err != unix.EINTR {
				break
			}
		}
		unix.Close(fd)
		fd = -1
	}
	t.Cleanup(stop)
	return stop
}

func TestQEMURespectsOurLocks(t *testing.T) {
	needQEMU(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	create(t, path, 1<<20).Close()
	commands := map[string][]string{
		"write":              {"qemu-io", "-f", "raw", "-c", "write 0 4k", path},
		"read":               {"qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", path},
		"convert":            {"qemu-img", "convert", "-f", "raw", "-O", "raw", path, filepath.Join(dir, "copy")},
		"convert, unlocked":  {"qemu-img", "convert", "-U", "-f", "raw", "-O", "raw", path, filepath.Join(dir, "copy")},
		"resize":             {"qemu-img", "resize", "-f", "raw", path, "2M"},
		"serve for reading":  {"qemu-nbd", "-r", "-f", "raw", path},
		"serve for writing":  {"qemu-nbd", "-f", "raw", path},
		"information as raw": {"qemu-img", "info", "-f", "raw", path}, // takes no locks
	}
	for _, c := range []struct {
		ours    block.Options
		refused []string
	}{
		{writer, []string{"write", "convert", "resize", "serve for reading", "serve for writing"}},
		{reader, []string{"write", "resize", "serve for writing"}},
		{shared, nil},
	} {
		f := open(t, path, c.ours)
		for name, args := range commands {
			refused := false
			for _, r := range c.refused {
				refused = refused || r == name
			}
			if args[0] == "qemu-nbd" {
				if !refused {
					startQEMUNBD(t, args)()
					continue
				}
				args = append(args, "-k", filepath.Join(dir, "socket"))
			}
			out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
			if refused && (err == nil || !strings.Contains(string(out), "lock")) || !refused && err != nil {
				t.Errorf("%s beside %+v: %v: %s; should it be refused? %v", name, c.ours, err, out, refused)
			}
		}
		f.Close()
	}
}
