package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
)

func withOutputs(c calling) bool { return len(c.outputs()) > 0 }

// What exists is never overwritten, but with --force; an input not even then; and what can't be made leaves
// nothing behind.
func TestMannersOfOutput(t *testing.T) {
	precious := bytes.Repeat([]byte("precious"), 20_000)
	eachCalling(t, withOutputs, func(t *testing.T, c calling) {
		for _, out := range c.outputs() {
			k := newKit(t)
			k.serve(t, c)
			force := c.option("force")
			path := k.path[out]
			writeFile(t, path, precious)
			if force {
				k.wantRefused(t, k.expand(c.args), path, "--force")
			} else {
				k.wantRefused(t, k.expand(c.args), path)
			}
			for _, in := range append(c.inputs(), outputNames...) {
				if force && in != out && strings.Contains(c.args, in) {
					k.path[out] = k.path[in]
					k.wantRefused(t, k.expand(c.args, "--force"), k.path[in])
					k.path[out] = filepath.Join(k.out, "link")
					if os.Link(k.path[in], k.path[out]) != nil {
						continue // another output, which is not there yet
					}
					k.wantRefused(t, k.expand(c.args, "--force"), k.path[out])
					os.Remove(k.path[out])
				}
			}
			k.path[out] = filepath.Join(k.out, "missing", "file")
			k.wantRefused(t, k.expand(c.args), "missing", "no such file or directory")
			k.path[out] = k.out
			k.wantRefused(t, k.expand(c.args), k.out)
			if force {
				k.wantRefused(t, k.expand(c.args, "--force"), k.out)
			}
			k.path[out] = filepath.Join(path, "within a file")
			k.wantRefused(t, k.expand(c.args), path)
			k.path[out] = path
			if force {
				if o := k.call(c.args, "--force"); !c.ended(o) {
					t.Errorf("--force: status %d, %s", o.status, o.stderr)
				}
				if bytes.Equal(readFile(t, path), precious) {
					t.Error("--force: the old file is still there")
				}
			}
			k.end()
			for name := range k.state(t) {
				if strings.HasPrefix(filepath.Base(name), ".") {
					t.Errorf("%s is left", name)
				}
			}
		}
	})
}

// A folder that may not be written to is refused.
func TestMannersOfOutputFolder(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	eachCalling(t, func(c calling) bool { return withOutputs(c) && !c.served && !c.fleet }, func(t *testing.T, c calling) {
		k := newKit(t)
		for _, in := range c.inputs() {
			os.Chmod(k.path[in], 0o666)
		}
		os.Chmod(k.out, 0o555)
		defer os.Chmod(k.out, 0o755)
		before := k.state(t)
		k.callAs(t, k.expand(c.args)...).wantRefused(t, k.out, "permission denied")
		k.wantState(t, before)
	})
}

// What does not reach standard output is an error, and not done.
func TestMannersOfFullOutput(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skipf("SKIPPED: %v", err)
	}
	t.Cleanup(func() { full.Close() })
	eachCalling(t, func(c calling) bool { return !c.quiet && !c.stays }, func(t *testing.T, c calling) {
		for _, more := range [][]string{nil, {"--json"}} {
			if more != nil && !c.json {
				continue
			}
			k := newKit(t)
			k.serve(t, c)
			var stderr bytes.Buffer
			status := run(k.expand(c.args, more...), strings.NewReader(""), full, &stderr)
			outcome{status, "", stderr.String()}.wantRefused(t, "no space left on device")
			k.end()
		}
	})
}

// A reader that closes the pipe early, as in "dmsnap list COW | head", is no error.
func TestMannersOfClosedPipe(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	eachCalling(t, func(c calling) bool { return !c.stays && !c.served && !c.fleet }, func(t *testing.T, c calling) {
		k := newKit(t)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		r.Close()
		cmd := exec.Command(program(t), k.expand(c.args)...)
		var stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = w, &stderr
		if cmd.Run(); stderr.Len() > 0 {
			t.Errorf("it said %s", stderr.String())
		}
		if status := cmd.ProcessState.ExitCode(); status != -1 && !c.quiet {
			t.Errorf("status %d; a shell expects the signal of a closed pipe", status)
		}
		for name := range k.state(t) {
			if strings.HasSuffix(name, ".part") {
				t.Errorf("%s is left", name)
			}
		}
	})
}

// With --force no file is replaced that another program, such as a server, has locked.
func TestForceSparesFilesInUse(t *testing.T) {
	eachCalling(t, func(c calling) bool { return withOutputs(c) && c.option("force") && !c.served && !c.fleet }, func(t *testing.T, c calling) {
		for _, out := range c.outputs() {
			for _, o := range []block.Options{{}, {ReadOnly: true}} {
				k := newKit(t)
				writeFile(t, k.path[out], bytes.Repeat([]byte("served"), 20_000))
				held, err := block.Open(k.path[out], o)
				if err != nil {
					t.Fatal(err)
				}
				k.wantRefused(t, k.expand(c.args, "--force"), k.path[out], "in use by this process")
				held.Close()
			}
		}
	})
}

// The same through the program: what clients of a server flush afterwards is in the files that it serves.
func TestForceSparesServedFiles(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	other := newPair(t)
	other.withStore(t)
	s := launch(t, "serve", p.origin, p.cow, "--export-origin", "--socket", filepath.Join(p.dir, "s"))
	if line, err := s.stdout.ReadString('\n'); err != nil {
		t.Fatalf("%q, %v; %s", line, err, &s.stderr)
	}
	before := digests(t, p.dir)
	dmsnap("export", other.origin, other.cow, p.origin, "--force").wantRefused(t, p.origin, "in use by")
	dmsnap("compact", other.cow, p.cow, "--force").wantRefused(t, p.cow, "in use by")
	wantSame(t, p.dir, before)
	s.Process.Signal(syscall.SIGTERM)
	if status := s.end(t); status != exitDone {
		t.Errorf("status %d, %s", status, &s.stderr)
	}
	mustRun(t, "export", other.origin, other.cow, p.origin, "--force")
}

// --force replaces the file behind a symbolic link and keeps its mode, owner and attributes.
func TestForceKeepsModeAndLink(t *testing.T) {
	eachCalling(t, func(c calling) bool { return withOutputs(c) && c.option("force") && !c.served && !c.fleet }, func(t *testing.T, c calling) {
		for _, out := range c.outputs() {
			k := newKit(t)
			file := filepath.Join(k.out, "file")
			old := bytes.Repeat([]byte("old"), 50_000)
			writeFile(t, file, old)
			owner := os.Geteuid()
			if owner == 0 {
				owner = 1234
			}
			err := errors.Join(os.Chown(file, owner, -1), os.Chmod(file, 0o641), os.Symlink("file", k.path[out]))
			if err != nil {
				t.Fatal(err)
			}
			if o := k.call(c.args, "--force"); !c.ended(o) {
				t.Fatalf("status %d, %s", o.status, o.stderr)
			}
			if to, err := os.Readlink(k.path[out]); to != "file" {
				t.Errorf("the link leads to %q, %v", to, err)
			}
			info, err := os.Stat(file)
			if err != nil {
				t.Fatal(err)
			}
			if st := info.Sys().(*syscall.Stat_t); info.Mode() != 0o641 || int(st.Uid) != owner || bytes.Equal(readFile(t, file), old) {
				t.Errorf("mode %v, owner %d, %d bytes", info.Mode(), st.Uid, info.Size())
			}
		}
	})
}

// "-" for an output is standard output, and then has what the file would have and nothing else, or is refused.
func TestDashForEveryOutput(t *testing.T) {
	eachCalling(t, withOutputs, func(t *testing.T, c calling) {
		for _, out := range c.outputs() {
			k := newKit(t)
			k.serve(t, c)
			before := k.state(t)
			path := k.path[out]
			k.path[out] = "-"
			o := k.call(c.args)
			if _, err := os.Lstat("-"); err == nil {
				os.Remove("-")
				t.Errorf("it made a file named -")
			}
			if o.status == exitTrouble {
				o.wantRefused(t, `"-" means standard output`)
				k.wantState(t, before)
				k.end()
				continue
			}
			for _, name := range c.outputs() {
				os.Remove(k.path[name])
			}
			k.path[out] = path
			if o := k.call(c.args); o.status != c.status {
				t.Fatalf("status %d, %s", o.status, o.stderr)
			}
			want := readFile(t, path)
			if o.status != c.status || o.out != string(want) {
				t.Errorf("%s: status %d, %d bytes on standard output, %d in a file; %s", out, o.status, len(o.out), len(want), o.stderr)
			}
		}
	})
}

// What an error advises for an output that is no regular file is done, and does what was wanted.
func TestAdviceForSpecialOutputs(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	advice := regexp.MustCompile(`"dmsnap ([^"]*) - >DEVICE"`)
	followed := 0
	for _, c := range callings {
		if !withOutputs(c) || c.served || c.fleet {
			continue
		}
		for _, out := range c.outputs() {
			k := newKit(t)
			if err := syscall.Mkfifo(k.path[out], 0o600); err != nil {
				t.Fatal(err)
			}
			more := []string{}
			if c.option("force") {
				more = append(more, "--force")
			}
			before := k.state(t)
			o := k.call(c.args, more...)
			o.wantRefused(t, k.path[out])
			k.wantState(t, before)
			m := advice.FindStringSubmatch(o.stderr)
			if m == nil {
				continue
			}
			followed++
			disk := filepath.Join(k.out, "disk")
			writeFile(t, disk, bytes.Repeat([]byte("x"), 100<<10))
			f, err := os.OpenFile(disk, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(program(t), k.expand(m[1], "-")...)
			cmd.Stdout = f
			if err := cmd.Run(); err != nil {
				t.Errorf("%s: %v", m[0], err)
			}
			f.Close()
			if got := readFile(t, disk); len(got) != 100<<10 || !bytes.HasPrefix(got, []byte("COW")) || got[64<<10] != 'x' {
				t.Errorf("%s: %d bytes, they begin with %q", m[0], len(got), got[:20])
			}
		}
	}
	if followed < 2 {
		t.Errorf("%d pieces of advice, export and rescue have one", followed)
	}
}

// Standard output is no input, and not in use.
func TestStandardOutputThatIsAFile(t *testing.T) {
	k := newKit(t)
	held, err := block.Open(k.path["COW2"], block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	before := k.state(t)
	for file, want := range map[string]string{"ORIGIN": "same file as " + k.path["ORIGIN"], "COW2": "in use by"} {
		for _, args := range []string{"export ORIGIN COW -", "rescue ORIGIN COW -"} {
			f, err := os.OpenFile(k.path[file], os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			var stderr bytes.Buffer
			status := run(k.expand(args), strings.NewReader(""), f, &stderr)
			outcome{status, "", stderr.String()}.wantRefused(t, want)
			f.Close()
		}
	}
	k.wantState(t, before)
}

// "-" is standard output, and standard input, where the help says so.
func TestMannersOfDash(t *testing.T) {
	k := newKit(t)
	for _, c := range []struct{ file, dash string }{
		{"export ORIGIN COW OUT", "export ORIGIN COW -"},
		{"dump COW --output OUT", "dump COW --output -"},
		{"dump --pack COW --output OUT", "dump --pack COW"},
		{"dump --json COW --output OUT", "dump --json COW --output -"},
	} {
		if o := k.call(c.file); o.status != exitDone || o.out != "" {
			t.Errorf("%s: status %d, %q, %s", c.file, o.status, o.out, o.stderr)
		}
		if o := k.call(c.dash); o.status != exitDone || o.out != string(readFile(t, k.path["OUT"])) {
			t.Errorf("%s: status %d, or not what the file has; %s", c.dash, o.status, o.stderr)
		}
		os.Remove(k.path["OUT"])
	}
	var made [2][]byte
	for i, args := range []string{"restore TEXT OUT", "restore - OUT"} {
		var out, stderr bytes.Buffer
		if status := run(k.expand(args), bytes.NewReader(readFile(t, k.path["TEXT"])), &out, &stderr); status != exitDone {
			t.Errorf("%s: status %d, %s", args, status, stderr.String())
		}
		made[i] = readFile(t, k.path["OUT"])
		os.Remove(k.path["OUT"])
	}
	if !bytes.Equal(made[0], made[1]) {
		t.Error("restore - makes another store")
	}
}
