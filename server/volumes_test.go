package server

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/source/address"
	"github.com/dmsnap/dmsnap/source/lvm"
)

// lvmImage writes a disk that a real lvm2 made, a case of package lvm, into a directory of its own.
func lvmImage(t *testing.T, name string) (path string, content []byte) {
	t.Helper()
	content = testhost.Unpack(t, filepath.Join("../source/lvm/testdata", name, "disk0.gz"))
	path = filepath.Join(t.TempDir(), "vm.img")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, content
}

// parts returns parts of a disk by their addresses, and checks the stores of COW volumes.
func parts(t *testing.T, disk block.Device, addresses ...string) (devs []block.Device) {
	t.Helper()
	for _, text := range addresses {
		a, err := address.Parse("disk#" + text)
		if err != nil {
			t.Fatal(err)
		}
		dev, err := address.Open(a, disk)
		if err != nil {
			t.Fatal(err)
		}
		if a.Layer == lvm.COW {
			if r, err := check.Run(t.Context(), dev, check.Options{}); err != nil || r.Worst() >= check.Error {
				t.Errorf("the store of %s: %+v, %v", text, r, err)
			}
		}
		devs = append(devs, dev)
	}
	return devs
}

// wantOthersUntouched checks that of a disk nothing was changed but the bytes of these parts.
func wantOthersUntouched(t *testing.T, before, after []byte, names ...string) {
	t.Helper()
	old, now := block.MemoryFrom(before), block.MemoryFrom(after)
	from := parts(t, now, names...)
	for i, to := range parts(t, old, names...) {
		if err := block.Copy(to, 0, from[i], 0, to.Size(), block.LongHoles, nil); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(old.Bytes(), after) {
		t.Error("bytes outside of the volumes were changed")
	}
}

func content(t *testing.T, dev block.Device) []byte {
	t.Helper()
	p := make([]byte, dev.Size())
	if _, err := dev.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// digest is the beginning of a device's SHA-256, as in the cases of package lvm.
func digest(p []byte) string { return fmt.Sprintf("%x", sha256.Sum256(p))[:6] }

// TestVolumes serves an origin with its snapshots: writes to the origin change no snapshot, what is written to each is there
// when the group is read again, and nothing else of the disk changes.
func TestVolumes(t *testing.T) {
	path, before := lvmImage(t, "gpt")
	s, err := Open(path+"#vg0/root", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.AttachVolumes(); err != nil {
		t.Fatal(err)
	}
	if err := s.AttachVolumes(); err != nil {
		t.Errorf("once more: %v", err)
	}
	st := s.Status()
	if st.Origin.Name != "root" || len(st.Snapshots) != 2 || st.Snapshots[0].Name != "before" || st.Snapshots[1].COW != path+"#vg0/later:cow" {
		t.Errorf("%+v", st)
	}
	want := map[string][]byte{}
	for name, sum := range map[string]string{"root": "2f1cda", "before": "47626b", "later": "0fb3b0"} {
		dev := s.Origin()
		if name != "root" {
			if dev, err = s.Device(name); err != nil {
				t.Fatal(err)
			}
		}
		if want[name] = content(t, dev); digest(want[name]) != sum {
			t.Errorf("%s: %s", name, digest(want[name]))
		}
		for i := range int64(12) { // also over what the others have
			off := i*400<<10 + int64(len(name))*3000
			writeAt(t, dev, name, off)
			copy(want[name][off:], name)
		}
	}
	for _, name := range []string{"before", "later"} {
		dev, err := s.Device(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(content(t, dev), want[name]) {
			t.Errorf("%s was changed by writes to others", name)
		}
		var refused *api.Error
		if err := s.Drop(t.Context(), name); !errors.As(err, &refused) || refused.Code != api.CodeFixed {
			t.Errorf("drop %s: %v", name, err)
		}
		if _, err := s.Grow(name, 1<<30); !errors.As(err, &refused) || refused.Code != api.CodeFixed {
			t.Errorf("grow %s: %v", name, err)
		}
	}
	// One writer of the image, whichever address is meant.
	for _, other := range []string{"#vg0/root", "#p2", "#vg0/later", ""} {
		if o, err := Open(path+other, Options{ReadOnly: true}); !errors.Is(err, block.ErrInUse) {
			t.Errorf("%q beside the server: %v, %v", other, o, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"root", "before", "later"}
	for i, dev := range parts(t, block.MemoryFrom(after), "vg0/root", "vg0/before", "vg0/later") {
		if !bytes.Equal(content(t, dev), want[names[i]]) {
			t.Errorf("%s is something else when it is read again", names[i])
		}
	}
	wantOthersUntouched(t, before, after, "vg0/root:real", "vg0/before:cow", "vg0/later:cow")
}

// TestVolumesByASnapshot: the address of a snapshot serves all, and the snapshot as the export "".
func TestVolumesByASnapshot(t *testing.T) {
	path, _ := lvmImage(t, "gpt")
	s, err := Open(path+"#vg0/later", Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Origin().WriteAt([]byte("x"), 0); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("a write before the snapshots are attached: %v", err)
	}
	if err := s.ExportOrigin(); err != nil {
		t.Fatal(err)
	}
	if st := s.Status(); len(st.Snapshots) != 2 || !s.exported {
		t.Errorf("the origin is exported without its snapshots: %+v", st)
	}
	if err := s.AttachVolumes(); err != nil || s.addressed != "later" || !s.hadDefault {
		t.Errorf("%v, default %q", err, s.addressed)
	}
	if _, err := s.Attach(api.AttachRequest{Name: "root", COW: path + ".cow", Create: true}); err == nil {
		t.Error("the name of the origin was given to a snapshot")
	}
	if _, err := s.Attach(api.AttachRequest{Name: "more", COW: path, Create: true, Force: true}); err == nil {
		t.Error("the image became a COW file of its own volume")
	}
	if _, err := s.Attach(api.AttachRequest{Name: "more", COW: path + ".cow", Create: true}); err != nil {
		t.Errorf("a COW file of a volume: %v", err)
	}
}

// TestVolumesReadOnly: a read-only server changes nothing, and serves what can be read.
func TestVolumesReadOnly(t *testing.T) {
	for name, c := range map[string]struct {
		volume    string
		snapshots []string
		writable  bool // the origin, by another server
		refused   string
	}{
		"gpt":            {"vg0/root", []string{"before", "later"}, true, ""},
		"names":          {"my-vg/fixed", []string{"fixed-s"}, false, ""},
		"overflow":       {"vg/base", []string{"small", "own", "good"}, true, ""},
		"exported":       {"vg/base", []string{"snap"}, false, "can't be written"},
		"foreign":        {"vg/base", []string{"snap"}, false, "can't be written"},
		"virtual-origin": {"vg/sparse", []string{"sparse"}, false, ""},
	} {
		path, before := lvmImage(t, name)
		s, err := Open(path+"#"+c.volume, Options{ReadOnly: true})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := s.AttachVolumes(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		var got []string
		for _, v := range s.Status().Snapshots {
			got = append(got, v.Name)
		}
		if !slices.Equal(got, c.snapshots) || s.exported != (name != "virtual-origin") {
			t.Errorf("%s: %v, origin exported: %v", name, got, s.exported)
		}
		if _, err := s.StartMerge(c.snapshots[0]); err == nil {
			t.Errorf("%s: a read-only server merges", name)
		}
		if err := s.Close(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, before) {
			t.Errorf("%s: the image was changed (%v)", name, err)
		}

		s, err = Open(path+"#"+c.volume, Options{})
		if c.refused != "" {
			if err == nil || !strings.Contains(err.Error(), c.refused) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := s.AttachVolumes(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := s.Origin().WriteAt([]byte("x"), 0); (err == nil) != c.writable || s.Status().Origin.ReadOnly == c.writable {
			t.Errorf("%s: write to the origin: %v", name, err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestVolumesRefused: nothing is written to a group that is active, half merged, or that has other users.
func TestVolumesRefused(t *testing.T) {
	path, before := lvmImage(t, "gpt")
	set, err := lvm.Scan([]lvm.Disk{{Name: "disk", Dev: block.MemoryFrom(before)}}, 0)
	if err != nil {
		t.Fatal(err)
	}
	sysfs := t.TempDir()
	dm := filepath.Join(sysfs, "block/dm-7/dm")
	if err := os.MkdirAll(dm, 0o755); err != nil {
		t.Fatal(err)
	}
	uuid := "LVM-" + strings.ReplaceAll(set.Groups[0].ID, "-", "") + strings.Repeat("a", 32)
	if err := os.WriteFile(filepath.Join(dm, "uuid"), []byte(uuid+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, o := range []Options{{SysFS: sysfs}, {SysFS: sysfs, Force: true}, {SysFS: sysfs, ReadOnly: true}} {
		if s, err := Open(path+"#vg0/root", o); !errors.Is(err, lvm.ErrActive) {
			t.Errorf("an active group: %v, %v", s, err)
		}
	}
	if s, err := Open(path+"#vg0/later:cow", Options{}); err == nil || !strings.Contains(err.Error(), "no disk") {
		t.Errorf("a COW volume: %v, %v", s, err)
	}
	for _, name := range []string{"merge-pending", "merge-half", "merge-grown"} {
		path, before := lvmImage(t, name)
		for _, readOnly := range []bool{false, true} {
			if s, err := Open(path+"#vg/base", Options{ReadOnly: readOnly}); err == nil || !strings.Contains(err.Error(), "is to be completed before") {
				t.Errorf("%s: %v, %v", name, s, err)
			}
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, before) {
			t.Errorf("%s: the image was changed (%v)", name, err)
		}
	}
	// Another reader of the image: the server does not begin to write, and nothing was attached.
	s, err := Open(path+"#vg0/root", Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	reader, err := cowfile.OpenDevice(path, block.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.AttachVolumes(); !errors.Is(err, block.ErrInUse) || len(s.Status().Snapshots) != 0 {
		t.Errorf("beside a reader: %v", err)
	}
	reader.Close()
	if err := s.AttachVolumes(); err != nil {
		t.Errorf("when the reader has gone: %v", err)
	}
}

// TestVolumeLiveMerge merges a snapshot of the group while its origin is served: the sibling stays what it was.
func TestVolumeLiveMerge(t *testing.T) {
	path, before := lvmImage(t, "gpt")
	s, err := Open(path+"#vg0/root", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.AttachVolumes(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.StartMerge("before"); err != nil {
		t.Fatal(err)
	}
	if m, err := s.currentMerge(); err != nil || m.driver.Wait(t.Context()) != nil {
		t.Fatalf("%v, %v", m, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i, dev := range parts(t, block.MemoryFrom(after), "vg0/root:real", "vg0/before", "vg0/later") {
		if sum := digest(content(t, dev)); sum != []string{"47626b", "47626b", "0fb3b0"}[i] {
			t.Errorf("volume %d: %s", i, sum)
		}
	}
	wantOthersUntouched(t, before, after, "vg0/root:real", "vg0/before:cow", "vg0/later:cow")
}

// TestPartition serves a partition as an ordinary origin.
func TestPartition(t *testing.T) {
	path, before := lvmImage(t, "gpt")
	s, err := Open(path+"#p1", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if s.HasVolumes() || s.AttachVolumes() != nil {
		t.Error("a partition has volumes")
	}
	if _, err := s.Attach(api.AttachRequest{Name: "a", COW: path + ".cow", Create: true}); err != nil {
		t.Fatal(err)
	}
	if err := s.ExportOrigin(); err != nil {
		t.Fatal(err)
	}
	dev, err := s.Device("a")
	if err != nil {
		t.Fatal(err)
	}
	was := content(t, dev)
	writeAt(t, s.Origin(), "new", 0)
	writeAt(t, s.Origin(), "end", s.Origin().Size()-3)
	if !bytes.Equal(content(t, dev), was) {
		t.Error("the snapshot was changed by the origin")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := content(t, parts(t, block.MemoryFrom(after), "p1")[0]); string(got[:3]) != "new" || string(got[len(got)-3:]) != "end" {
		t.Error("the partition does not have what was written")
	}
	wantOthersUntouched(t, before, after, "p1")
	pair{cow: path + ".cow"}.check(t)
}

// TestLiveMergeOfAPartition: a live merge goes on with an offline one of a partition, whose side file is beside the disk, and takes its undo
// store from that before clients write.
func TestLiveMergeOfAPartition(t *testing.T) {
	path, _ := lvmImage(t, "gpt")
	cowPath, undoPath := path+".cow", path+".undo"
	open := func(o Options) *Server {
		s, err := Open(path+"#p1", o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Attach(api.AttachRequest{Name: "a", COW: cowPath, Create: o.Merge.Progress == nil}); err != nil {
			t.Fatal(err)
		}
		return s
	}
	write := func(text string, o Options) {
		s := open(o)
		dev, err := s.Device("a")
		if err != nil {
			t.Fatal(err)
		}
		writeAt(t, dev, text, 4096)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	mergeLive := func(o Options, begun bool) {
		said := false
		o.Log = func(line string) { said = said || strings.Contains(line, "this export shows a mixture") }
		s := open(o)
		if err := s.ExportOrigin(); err != nil || said != begun {
			t.Errorf("exporting the origin: %v; the log has the mixture: %v", err, said)
		}
		if _, err := s.StartMerge("a"); err != nil {
			t.Fatal(err)
		}
		if m, err := s.Merge(t.Context(), time.Minute); err != nil || m.State != api.MergeDone {
			t.Fatalf("%+v, %v", m, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	again := Options{Merge: merge.Options{Progress: func(merge.Progress) {}}}
	write("merged", Options{})
	disk, cow := openTwo(t, path, cowPath)
	part := parts(t, disk, "p1")[0]
	undo, err := block.Create(undoPath, 1<<20)
	if err == nil {
		err = merge.WriteUndo(t.Context(), part, cow, undo, merge.Options{})
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err = merge.Begin(path, cowPath, cow, nil, &merge.UndoStore{Path: undoPath, Device: undo}, false); err != nil {
		t.Fatal(err)
	}
	accepted := func() bool {
		half, err := merge.ReadSideFile(path)
		if err != nil || half == nil {
			t.Fatal(half, err)
		}
		return half.Check(undo) == nil
	}
	if !accepted() {
		t.Fatal("the undo store is not accepted")
	}
	if err := errors.Join(cow.Close(), disk.Close()); err != nil {
		t.Fatal(err)
	}
	looked := false
	mergeLive(Options{Merge: merge.Options{Progress: func(merge.Progress) {
		if !looked && accepted() {
			t.Error("the undo store is accepted during the live merge")
		}
		looked = true
	}}}, true)
	if !looked {
		t.Error("the merge had no progress")
	}
	if half, err := merge.ReadSideFile(path); half != nil || err != nil {
		t.Errorf("the side file is %v, %v", half, err)
	}
	pair{cow: cowPath}.check(t)

	// The same where there is no side file: none is made for a partition.
	write("again", again)
	disk, cow = openTwo(t, path, cowPath)
	part = parts(t, disk, "p1")[0]
	if err := merge.WriteUndo(t.Context(), part, cow, undo, merge.Options{}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(merge.CheckUndo(part, cow, undo), cow.Close(), disk.Close()); err != nil {
		t.Fatal(err)
	}
	mergeLive(again, false)
	write("and again", again)
	disk, cow = openTwo(t, path, cowPath)
	if err := merge.CheckUndo(parts(t, disk, "p1")[0], cow, undo); !errors.Is(err, merge.ErrNotUndo) {
		t.Errorf("the undo store of an earlier merge: %v", err)
	}
	if err := errors.Join(cow.Close(), disk.Close(), undo.Close()); err != nil {
		t.Fatal(err)
	}
	pair{cow: undoPath}.check(t)
}

// openTwo opens a disk and a COW file.
func openTwo(t *testing.T, path, cowPath string) (disk, cow *block.File) {
	t.Helper()
	disk, err := block.Open(path, block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if cow, err = block.Open(cowPath, block.Options{}); err != nil {
		t.Fatal(err)
	}
	return disk, cow
}
