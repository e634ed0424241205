package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/internal/testhost"
)

// writeLVMImage writes a disk that a real lvm2 made: a GPT whose partition 2 is a physical volume of the group vg0, which
// has the snapshot volume later.
func writeLVMImage(t *testing.T, path string) {
	t.Helper()
	content := testhost.Unpack(t, "../../source/lvm/testdata/gpt/disk0.gz")
	writeFile(t, path, content)
}

// TestAddresses exports and checks parts of a disk that a real lvm2 made.
func TestAddresses(t *testing.T) {
	dir := t.TempDir()
	disk, out := filepath.Join(dir, "vm.img"), filepath.Join(dir, "out")
	writeLVMImage(t, disk)
	content := readFile(t, disk)
	run := func(args ...string) (int, string) {
		var text strings.Builder
		root := newRoot()
		root.SetArgs(args)
		root.SetOut(&text)
		root.SetErr(&text)
		err := root.Execute()
		return exitStatus(err, &text), text.String()
	}
	if status, text := run("export", disk+"#vg0/later", out); status != 0 {
		t.Fatalf("export: %d, %s", status, text)
	}
	got, err := os.ReadFile(out)
	if sum := fmt.Sprintf("%x", sha256.Sum256(got)); err != nil || !strings.HasPrefix(sum, "0fb3b0") {
		t.Errorf("export: digest %.12s (%v)", sum, err)
	}
	for _, verb := range []string{"status", "check", "list", "dump"} {
		if status, text := run(verb, disk+"#vg0/later"); status != 0 {
			t.Errorf("%s: %d, %s", verb, status, text)
		}
	}
	for _, args := range [][]string{
		{"export", "--force", disk + "#vg0/later", disk}, // the image itself
		{"export", disk, filepath.Join(dir, "other")},
		{"export", disk + "#p9", filepath.Join(dir, "other")},
		{"status", disk + "#vg0/root"},
	} {
		if status, text := run(args...); status != exitTrouble {
			t.Errorf("%v: %d, %s", args, status, text)
		}
	}
	if after, err := os.ReadFile(disk); err != nil || sha256.Sum256(after) != sha256.Sum256(content) {
		t.Errorf("the image was changed (%v)", err)
	}
}
