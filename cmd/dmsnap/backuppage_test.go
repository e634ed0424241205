package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
)

// TestBackupPage runs the commands of docs/backup.md: a daemon is there, and a host "backup", which ssh reaches.
func TestBackupPage(t *testing.T) {
	for _, tool := range []string{"qemu-io", "qemu-img", "nbdcopy", "nbdinfo", "age"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("SKIPPED: ", err)
		}
	}
	dir := testhost.ShortDir(t)
	if err := os.Symlink(program(t), filepath.Join(dir, "dmsnap")); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "dmsnap-backup"), readFile(t, "../../contrib/dmsnap-backup"))
	writeFile(t, filepath.Join(dir, "ssh"), []byte("#!/bin/sh\ncd \"$1\" && shift && exec sh -c \"$*\"\n"))
	for _, name := range []string{"dmsnap-backup", "ssh"} {
		if err := os.Chmod(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "backup"), 0o755); err != nil {
		t.Fatal(err)
	}
	content := append(blocktest.Pattern(8<<20, 1), make([]byte, 24<<20)...)
	writeFile(t, filepath.Join(dir, "base.img"), content)
	defer serveExample(t, dir, "dmsnap daemon --dir fleet --allow-path .")()
	control := filepath.Join(dir, "fleet", "control.sock")
	mustRun(t, "disk", "add", "base", filepath.Join(dir, "base.img"), "--control", control)
	mustRun(t, "fork", "base", "vm1", "--control", control)
	runPage(t, "../../docs/backup.md", dir, 24)
}
