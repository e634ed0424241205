package main

import (
	"bufio"
	"bytes"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	callOnFile = regexp.MustCompile(`^\d+ +(\w+)\(\d+<([^>]*)>`)
	callRename = regexp.MustCompile(`^\d+ +(?:renameat2|renameat|rename|linkat)\(.*"([^"]+)".*"([^"]+)"`)
)

// A file gets its name when what it holds is on disk, and the name is on disk before the verb says that it is
// done: a power cut leaves it whole or not there, as a kill does. The order of system calls shows it.
func TestMannersOfDurableOutput(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("SKIPPED: strace is not installed")
	}
	eachCalling(t, func(c calling) bool { return withOutputs(c) && !c.served && !c.fleet }, func(t *testing.T, c calling) {
		k := newKit(t)
		cmd := exec.Command(strace, append([]string{"-f", "-y", "-qq", "-e", "trace=write,pwrite64,writev,pwritev,pwritev2,copy_file_range,ftruncate,fallocate,fsync,fdatasync,renameat2,renameat,rename,linkat",
			"-o", "/dev/stderr", program(t)}, k.expand(c.args)...)...)
		var trace bytes.Buffer
		cmd.Stderr = &trace
		if err := cmd.Run(); err != nil {
			if strings.Contains(trace.String(), "ptrace") || strings.Contains(trace.String(), "PTRACE") {
				t.Skipf("SKIPPED: strace may not trace: %s", trace.String())
			}
			t.Fatalf("%v: %s", err, trace.String())
		}
		unsynced, named, durable := map[string]bool{}, map[string]bool{}, map[string]bool{}
		for lines := bufio.NewScanner(&trace); lines.Scan(); {
			line := lines.Text()
			if m := callRename.FindStringSubmatch(line); m != nil {
				from, to := m[1], m[2]
				if left, known := unsynced[from]; left || !known {
					t.Errorf("%s is given its name before it is on disk: %s", filepath.Base(to), line)
				}
				named[to] = true
			} else if m := callOnFile.FindStringSubmatch(line); m == nil {
				continue
			} else if call, path := m[1], m[2]; !strings.HasPrefix(path, k.dir) {
				continue
			} else if call != "fsync" && call != "fdatasync" {
				unsynced[path] = unsynced[path] || !strings.Contains(line, "RWF_DSYNC")
				for _, in := range strings.Fields(c.writes) {
					for _, out := range c.outputs() {
						// A merge marks COW first: it must know its undo store again.
						if path == k.path[in] && !durable[k.path[out]] && !(c.verb() == "merge" && in == "COW") {
							t.Errorf("%s is changed before %s can take that back: %s", in, out, line)
						}
					}
				}
			} else {
				unsynced[path] = false
				for name := range named {
					durable[name] = durable[name] || filepath.Dir(name) == path
				}
			}
		}
		for _, out := range c.outputs() {
			if path := k.path[out]; !named[path] || !durable[path] {
				t.Errorf("%s: named %v, its folder synced afterwards %v:\n%s", out, named[path], durable[path], trace.String())
			}
		}
		for path, left := range unsynced {
			if left {
				t.Errorf("%s: written to and not synced", path)
			}
		}
	})
}
