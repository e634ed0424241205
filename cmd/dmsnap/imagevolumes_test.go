package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/nbd"
)

// inImageOfLVM makes vm.qcow2, an image of the disk of the case gpt, beside that disk.
func inImageOfLVM(t *testing.T) {
	t.Helper()
	inLVMCase(t, "gpt")
	imageOf(t, "vm.qcow2", readFile(t, "disk0.img"))
}

// TestVolumesInAnImage: the volumes of a qcow2 image are read like those of a raw disk, in every form, and stores that were
// made of them are for origins in the image.
func TestVolumesInAnImage(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	inImageOfLVM(t)
	image := digest(readFile(t, "vm.qcow2"))
	want := exported(t, "disk0.img#vg0/later")
	mustRun(t, "repair", "vm.qcow2#vg0/later", "sound.cow")
	mustRun(t, "compact", "vm.qcow2#vg0/later", "dense.cow", "--origin", "vm.qcow2#vg0/root:real")
	mustRun(t, "export", "vm.qcow2#vg0/root:real", "base.raw")
	for _, args := range [][]string{
		{"vm.qcow2#vg0/later"}, {"vm.qcow2#vg0/root:real", "vm.qcow2#vg0/later:cow"}, {"vm.qcow2#vg0/root:real", "sound.cow"},
		{"vm.qcow2#vg0/root:real", "dense.cow"}, {"base.raw", "vm.qcow2#vg0/later:cow"}, {"base.raw", "sound.cow"},
	} {
		if !bytes.Equal(exported(t, args...), want) {
			t.Errorf("%v: other content than on the raw disk", args)
		}
		mustRun(t, append(append([]string{"rescue", "--force"}, args...), "rescued")...)
		if !bytes.Equal(readFile(t, "rescued"), want) {
			t.Errorf("rescue %v: other content", args)
		}
		if o := dmsnap(append([]string{"diff", "--verify"}, args...)...); o.status != exitNo || o.stderr != "" {
			t.Errorf("diff %v: %+v", args, o)
		}
	}
	mustRun(t, "check", "sound.cow", "--origin", "vm.qcow2#vg0/root:real")
	if digest(readFile(t, "vm.qcow2")) != image {
		t.Error("the image was changed")
	}
}

// TestOverlayOfVolume: an overlay of a snapshot volume on the content of its origin, and one of a store over an image on that image.
func TestOverlayOfVolume(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	inImageOfLVM(t)
	want := exported(t, "disk0.img#vg0/later")
	mustRun(t, "export", "disk0.img#vg0/root:real", "base.raw")
	for _, args := range [][]string{{"disk0.img#vg0/later"}, {"vm.qcow2#vg0/later"}, {"disk0.img#vg0/root:real", "vm.qcow2#vg0/later:cow"}} {
		mustRun(t, append(append([]string{"export", "--force"}, args...), "overlay.qcow2", "--format", "qcow2", "--backing", "base.raw")...)
		if !bytes.Equal(exported(t, "overlay.qcow2", "--follow-backing"), want) {
			t.Errorf("%v: the overlay shows other content", args)
		}
		mustRun(t, "import", "--force", "overlay.qcow2", "again.cow", "--origin", "base.raw", "--chunk-size", "64KiB")
		again, made := mustJSON[inspect.Map](t, "map", "again.cow"), mustJSON[inspect.Map](t, "map", "disk0.img#vg0/later")
		if again.Exceptions != made.Exceptions {
			t.Errorf("%v: %d exceptions after export and import, before %d", args, again.Exceptions, made.Exceptions)
		}
		formatIn(t, "again.cow")
	}
	mustRun(t, "create", "vm.qcow2", "vm1.cow")
	mustRun(t, "export", "vm.qcow2", "vm1.cow", "vm1.qcow2", "--format", "qcow2", "--backing", "vm.qcow2")
	if !bytes.Equal(exported(t, "vm1.qcow2", "--follow-backing"), readFile(t, "disk0.img")) {
		t.Error("an overlay on the image that is the origin shows other content")
	}
	if _, err := exec.LookPath("qemu-img"); err == nil {
		for _, pair := range [][]string{{"overlay.qcow2", "raw", "later.img"}, {"vm1.qcow2", "qcow2", "vm.qcow2"}} {
			writeFile(t, "later.img", want)
			if out, err := exec.Command("qemu-img", "compare", "-f", "qcow2", "-F", pair[1], pair[0], pair[2]).CombinedOutput(); err != nil {
				t.Errorf("%v: %v, %s", pair, err, out)
			}
		}
	}
	for _, args := range []string{"disk0.img#vg0/root", "disk0.img#p1", "vm.qcow2"} {
		if o := dmsnap("export", args, "x", "--format", "qcow2", "--backing", "base.raw"); o.status != exitTrouble || !strings.Contains(o.stderr, "snapshot volume") {
			t.Errorf("%s: %+v", args, o)
		}
	}
}

// TestImageRefused: what would be written inside an image, over NBD or to a part of a disk is refused with what to do, and nothing
// is changed.
func TestImageRefused(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	inImageOfLVM(t)
	mustRun(t, "repair", "disk0.img#vg0/later", "sound.cow")
	mustRun(t, "send", "disk0.img#vg0/later", "--output", "stream")
	before := digests(t, ".")
	for args, want := range map[string]string{
		"merge vm.qcow2#vg0/later":                                "a qcow2 image: it can only be read; dmsnap export",
		"merge vm.qcow2#vg0/later --dry-run":                      "a qcow2 image: it can only be read",
		"merge vm.qcow2#vg0/root sound.cow":                       "a qcow2 image: it can only be read",
		"merge vm.qcow2#p1 sound.cow":                             "a qcow2 image: it can only be read",
		"merge nbd://host/x#p1 sound.cow":                         "an NBD export: it can only be read",
		"serve vm.qcow2#vg0/root --socket s":                      "--read-only serves it",
		"repair vm.qcow2#vg0/later --in-place --undo u":           "can't be changed in place",
		"compact vm.qcow2#vg0/later --punch":                      "can't be changed in place",
		"grow vm.qcow2#vg0/later 1GiB":                            "can't be changed in place",
		"receive stream vm.qcow2#vg0/root":                        "can't be changed in place",
		"receive stream disk0.img#p1":                             "can't be changed in place",
		"receive stream nbd://host/x":                             "an NBD export",
		"receive stream --origin vm.qcow2#p1 --cow x":             "raw disk as a whole",
		"import vm.qcow2#p1 x --origin disk0.img":                 "can't be changed in place",
		"create disk0.img vm.qcow2#vg0/later:cow":                 "",
		"create disk0.img#vg0/root disk0.img#vg0/x:cow":           "",
		"export vm.qcow2#vg0/later vm.qcow2 --force":              "",
		"export vm.qcow2 nbd://host/x --format qcow2":             "",
		"serve vm.qcow2#vg0/root --socket s --read-only --create": "",
	} {
		if o := dmsnap(strings.Fields(args)...); o.status != exitTrouble || !strings.Contains(o.stderr, want) || strings.Contains(o.stderr, "--raw") {
			t.Errorf("%s: %+v, want %q", args, o, want)
		}
		for _, made := range []string{"x", "u", "disk0.img#p1", "s"} {
			if _, err := os.Lstat(made); err == nil {
				t.Errorf("%s: %s was made", args, made)
			}
		}
	}
	wantSame(t, ".", before)
}

// TestServeAlone: with --read-only a disk, an image or a part of one is served without a COW, as the export "" too, and nothing is
// written or made.
func TestServeAlone(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	program(t) // before the working folder changes
	inImageOfLVM(t)
	before := digests(t, ".")
	socket := filepath.Join(testhost.ShortDir(t), "s")
	for name, want := range map[string][]byte{
		"disk0.img": readFile(t, "disk0.img"), "vm.qcow2": readFile(t, "disk0.img"), "vm.qcow2#p1": exported(t, "disk0.img#p1"), "vm.qcow2#vg0/later": exported(t, "disk0.img#vg0/later"),
	} {
		s := launch(t, "serve", name, "--read-only", "--socket", socket)
		if _, err := s.stdout.ReadString('\n'); err != nil {
			t.Fatalf("%v: %s", err, &s.stderr)
		}
		c, err := nbd.Dial(t.Context(), "nbd+unix:///?socket="+socket)
		if err != nil {
			t.Fatal(err)
		}
		if !c.Info().ReadOnly || !bytes.Equal(readAll(t, c), want) {
			t.Errorf("%s: writable, or other content", name)
		}
		c.Close()
		s.Process.Signal(os.Interrupt)
		if status := s.end(t); status != exitDone {
			t.Errorf("%s: status %d, %s", name, status, &s.stderr)
		}
	}
	dmsnap("serve", "disk0.img#p1", "--socket", socket).wantRefused(t, "COW is required", "--read-only")
	wantSame(t, ".", before)
}

// TestPendingMergeNotServed: the refusal names the merge that completes it, which is then all that is needed.
func TestPendingMergeNotServed(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	disks := lvmCase(t, "merge-pending")
	t.Chdir(t.TempDir())
	writeFile(t, "disk0.img", disks["disk0.img"])
	o := dmsnap("serve", "disk0.img#vg/base", "--socket", "s")
	_, after, found := strings.Cut(o.stderr, "dmsnap merge '")
	name, _, _ := strings.Cut(after, "'")
	if o.status != exitTrouble || !found {
		t.Fatalf("%+v", o)
	}
	want := exported(t, "disk0.img#vg/base")
	mustRun(t, "merge", name)
	mustRun(t, "check", name)
	if got := exported(t, "disk0.img#vg/base:real"); !bytes.Equal(got[:len(want)], want) {
		t.Error("after the merge the origin is not what the volume showed before")
	}
}
