package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestReadmeCommands runs the commands of README.md after those that build the program, in one shell and in order.
func TestReadmeCommands(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for _, tool := range []string{"bash", "mkfs.ext4", "qemu-io", "qemu-img"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: %s is not installed", tool)
		}
	}
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var script strings.Builder
	for i, m := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(readme), -1) {
		if i > 0 { // the first one builds
			script.WriteString(m[1])
		}
	}
	dir, err := os.MkdirTemp("", "rm-") // short: it will have unix sockets
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Symlink(program(t), filepath.Join(dir, "dmsnap")); err != nil {
		t.Fatal(err)
	}
	writeLVMImage(t, filepath.Join(dir, "vm.img"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, "bash", "-xec", script.String())
	c.Dir, c.Env = dir, append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a script that fails leaves its servers, which hold its output
	killAll := func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	c.Cancel, c.WaitDelay = killAll, 5*time.Second
	out, err := c.CombinedOutput()
	killAll() // an error: nothing is left, as it should be
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"later.img", "old.img", "sound.cow", "backup.img", "vm1.dmsnap", "dense.cow"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
}
