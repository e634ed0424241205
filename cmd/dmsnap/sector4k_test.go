package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/dmsnap/dmsnap/internal/testhost"
)

// Stores on disks with sectors of 4096 bytes are dumped, restored, repaired to a file and in place, and taken back, as on
// any other disk.
func TestStoresOnDisksOf4KSectors(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	in := func(name string) string { return filepath.Join(p.dir, name) }
	content, err := os.ReadFile(p.cow)
	if err != nil {
		t.Fatal(err)
	}
	content = append(content, make([]byte, -len(content)&4095)...)
	onDisk := func(name string, b []byte) string {
		writeFile(t, in(name), b)
		return testhost.Loop(t, in(name), 4096)
	}
	disk := onDisk("sound", content)
	mustRun(t, "dump", "--data", disk, "--output", in("dump"))
	mustRun(t, "restore", in("dump"), in("restored"))
	p.wantView(t, in("restored"), shown)

	damaged := append([]byte{}, content...)
	copy(damaged[4096+16*4:], content[4096:4096+16]) // the first slot once more, in a slot after the last
	disk = onDisk("damaged", damaged)
	if o := dmsnap("check", disk); o.status != exitNo {
		t.Fatalf("check: status %d, %s%s", o.status, o.out, o.stderr)
	}
	mustRun(t, "dump", disk)
	mustRun(t, "repair", disk, in("repaired"))
	mustRun(t, "check", in("repaired"), "--origin", p.origin)
	mustRun(t, "repair", disk, "--in-place", "--undo", in("undo"))
	mustRun(t, "check", disk, "--origin", p.origin)
	mustRun(t, "export", p.origin, disk, in("view"))
	mustRun(t, "export", p.origin, in("repaired"), in("other"))
	other, err := os.ReadFile(in("other"))
	if err != nil {
		t.Fatal(err)
	}
	wantContent(t, in("view"), other)
	mustRun(t, "repair", disk, "--undo-apply", in("undo"))
	wantContent(t, disk, damaged)
}
