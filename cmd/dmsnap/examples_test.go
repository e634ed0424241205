package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/internal/testremote"
)

// examples returns the commands in the example of a verb: one a line, with lines that a shell would continue.
func examples(c *cobra.Command) []string {
	var list []string
	for _, line := range strings.Split(c.Example, "\n") {
		if !strings.HasPrefix(line, "  dmsnap ") && len(list) > 0 {
			list[len(list)-1] += "\n" + line
			continue
		}
		list = append(list, line)
	}
	return list
}

// exampleFolder makes the files that the examples name: an origin with stores that are sound, invalid and damaged, and
// an image to update.
func exampleFolder(t *testing.T, v *cobra.Command) string {
	t.Helper()
	k := newKit(t)
	dir, err := os.MkdirTemp("", "ex-") // short: it will have unix sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for name, from := range map[string]string{"disk.img": "ORIGIN", "copy.img": "ORIGIN", "disk.cow": "COW", "more.cow": "COW2", "vm1.cow": "COW",
		"monday.cow": "COW", "tuesday.cow": "COW2", "invalid.cow": "INVALID", "damaged.cow": "BAD"} {
		writeFile(t, filepath.Join(dir, name), readFile(t, k.path[from]))
	}
	writeFile(t, filepath.Join(dir, "disk.txt"), []byte(mustRun(t, "dump", filepath.Join(dir, "disk.cow"))))
	// The other host is this one.
	if err := os.WriteFile(filepath.Join(dir, "ssh"), []byte("#!/bin/sh\nshift\nexec \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(v.Example, "vm.img") {
		writeLVMImage(t, filepath.Join(dir, "vm.img"))
	}
	if strings.Contains(v.Example, " disk.qcow2") {
		mustRun(t, "export", filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk.cow"), filepath.Join(dir, "disk.qcow2"), "--format", "qcow2")
	}
	if err := os.Mkdir(filepath.Join(dir, "files"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(program(t), filepath.Join(dir, "dmsnap")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// shell returns a command for a shell in dir that finds the program.
func shell(dir, script string) *exec.Cmd {
	c := exec.Command("sh", "-ec", script)
	c.Dir = dir
	c.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "XDG_CACHE_HOME="+filepath.Join(dir, "cached"))
	return c
}

// missingTool returns the first program of a script that is not installed.
func missingTool(script string) string {
	for _, tool := range []string{"zstd", "sed", "dd"} {
		if _, err := exec.LookPath(tool); err != nil && strings.Contains(script, tool+" ") {
			return tool
		}
	}
	return ""
}

// serveExample starts a server as an example says and returns when it accepts clients. stop ends it.
func serveExample(t *testing.T, dir, script string) (stop func()) {
	t.Helper()
	p := &process{Cmd: shell(dir, "exec "+strings.TrimSpace(script))}
	p.run(t)
	if line, err := p.stdout.ReadString('\n'); err != nil || !strings.Contains(line, "nbd") {
		t.Fatalf("%s: printed %q, %v: %s", script, line, err, &p.stderr)
	}
	return func() {
		t.Helper()
		p.Process.Signal(os.Interrupt)
		if status := p.end(t); status != exitDone {
			t.Errorf("%s: status %d, %s", script, status, &p.stderr)
		}
	}
}

// TestExamples runs the example of every verb, and of dmsnap itself, line by line, in a folder with the files that it
// names. Verbs that answer "no" by their status may.
func TestExamples(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	root := newRoot()
	for _, v := range append(root.Commands(), root) {
		t.Run(v.Name(), func(t *testing.T) {
			if v.Name() == "attach" || v.Name() == "detach" {
				t.Skip("test/kernel runs them (TestAttach)")
			}
			if err := mountable(); v.Name() == "mount" || v.Name() == "umount" {
				if err != nil {
					t.Skip("SKIPPED: no FUSE file system can be mounted: ", err)
				}
			}
			dir := exampleFolder(t, v)
			if strings.Contains(v.Example, "--control ctl.sock") {
				defer serveExample(t, dir, "dmsnap serve disk.img vm1.cow --export-origin --socket nbd.sock --control ctl.sock")()
				if v.Name() == "merge" || v.Name() == "grow" || v.Name() == "status" { // its other lines use disk.img offline
					other := filepath.Join(dir, "offline")
					from := exampleFolder(t, v)
					if err := os.Rename(from, other); err != nil {
						t.Fatal(err)
					}
				}
			}
			if strings.Contains(v.Example, "--control fleet/control.sock") {
				defer serveExample(t, dir, "dmsnap daemon --dir fleet --allow-path .")()
				setup := "export DMSNAP_CONTROL=fleet/control.sock; dmsnap disk add base disk.img; dmsnap fork base vm1; dmsnap checkpoint vm1 --name before"
				if out, err := shell(dir, setup).CombinedOutput(); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			registry := ""
			if strings.Contains(v.Example, "localhost:5000") {
				registry = testremote.Start(t, testremote.NewRegistry())
				setup := "dmsnap push disk.img " + registry + "/golden/debian:13"
				if out, err := shell(dir, setup).CombinedOutput(); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			ran := 0
			for _, script := range examples(v) {
				script = strings.ReplaceAll(script, "localhost:5000", registry)
				if tool := missingTool(script); tool != "" {
					t.Logf("SKIPPED: %s is not installed: %s", tool, script)
					continue
				}
				ran++
				if strings.HasPrefix(script, "  dmsnap serve") || strings.HasPrefix(script, "  dmsnap daemon") {
					serveExample(t, dir, script)()
					continue
				}
				at := dir
				if _, err := os.Stat(filepath.Join(dir, "offline")); err == nil && !strings.Contains(script, "--control") {
					at = filepath.Join(dir, "offline")
				}
				c := shell(at, script)
				c.WaitDelay = 5 * time.Second
				kill := time.AfterFunc(10*time.Second, func() { c.Process.Kill() })
				out, err := c.CombinedOutput()
				kill.Stop()
				no := c.ProcessState.ExitCode() == exitNo && (v.Name() == "check" || v.Name() == "diff" || v.Name() == "inspect")
				if err != nil && !no {
					t.Errorf("%s: %v\n%s", script, err, out)
				}
			}
			if ran == 0 && v.Name() != "man" {
				t.Error("no example was run")
			}
		})
	}
}

// TestEveryVerbHasAGroup: the help of dmsnap lists every verb under a title.
func TestEveryVerbHasAGroup(t *testing.T) {
	root := newRoot()
	for _, v := range root.Commands() {
		if v.GroupID == "" && v.Name() != "version" && !v.Hidden {
			t.Errorf("%s is in no group", v.Name())
		}
		first, _, _ := strings.Cut(v.Short, " ")
		switch first {
		case "Attach", "Check", "Create", "Detach", "List", "Make", "Merge", "Recover", "Serve", "Show", "Write":
		default:
			t.Errorf("%s: its short help %q does not begin with one of the verbs that the others use", v.Name(), v.Short)
		}
	}
}
