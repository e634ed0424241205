package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
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
				if o := k.call(c.args, "--force"); o.status != c.status || o.stderr != "" {
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
	eachCalling(t, func(c calling) bool { return withOutputs(c) && !c.served }, func(t *testing.T, c calling) {
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

// Who does not want to hear more, as in "dmsnap list COW | head", is no trouble.
func TestMannersOfClosedPipe(t *testing.T) {
	eachCalling(t, func(c calling) bool { return !c.stays && !c.served }, func(t *testing.T, c calling) {
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
