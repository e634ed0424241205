package inspect_test

import (
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
)

// TestQCOW2: internal snapshots, bitmaps and the names of further files of an image are listed, as qemu-img made them; nothing else
// is opened.
func TestQCOW2(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("SKIPPED: no qemu-img (Debian: apt-get install qemu-utils)")
	}
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	for _, args := range [][]string{
		{"create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "absent.raw", "-o", "cluster_size=4k", path, "8M"},
		{"bitmap", "--add", "-g", "64k", path, "backup"},
		{"bitmap", "--add", "-g", "512", path, "second"},
	} {
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v, %s", args, err, out)
		}
	}
	look := func(path string) *inspect.QCOW2 {
		f, err := block.Open(path, block.Options{ReadOnly: true, Lock: block.LockShared})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		d, err := inspect.Look(t.Context(), path, f)
		if err != nil || d.QCOW2 == nil {
			t.Fatalf("%+v, %v", d, err)
		}
		return d.QCOW2
	}
	q := look(path)
	if q.SizeBytes != 8<<20 || q.ClusterSize != 4096 || q.Backing != "absent.raw" || q.BackingFormat != "raw" || q.Error != "" ||
		len(q.Snapshots) != 0 || len(q.Bitmaps) != 2 {
		t.Fatalf("%+v", q)
	}
	if b := q.Bitmaps; b[0].DirtyBytes == nil || *b[0].DirtyBytes != 0 || b[0].Stale || b[0].Name != "backup" || b[0].Granularity != 64<<10 || b[1].Name != "second" || b[1].Granularity != 512 || b[0].InUse {
		t.Errorf("%+v", b)
	}
	alone := filepath.Join(t.TempDir(), "alone.qcow2")
	for _, args := range [][]string{
		{"img", "create", "-q", "-f", "qcow2", alone, "1M"}, {"img", "snapshot", "-c", "monday", alone}, {"img", "resize", "-q", alone, "2M"},
		{"img", "snapshot", "-c", "tuesday", alone}, {"img", "bitmap", "--add", alone, "backup"},
		{"io", "-f", "qcow2", "-c", "write 100k 10k", "-c", "write 400k 4k", alone},
	} {
		if out, err := exec.Command("qemu-"+args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v, %s", args, err, out)
		}
	}
	q = look(alone)
	if b := q.Bitmaps; len(b) != 1 || b[0].DirtyBytes == nil || *b[0].DirtyBytes != 128<<10 {
		t.Errorf("%+v", b)
	}
	s := q.Snapshots
	if len(s) != 2 || s[0].ID != "1" || s[0].Name != "monday" || s[0].SizeBytes != 1<<20 || s[1].Name != "tuesday" || s[1].SizeBytes != 2<<20 || s[0].Time.IsZero() {
		t.Errorf("%+v", s)
	}
	if c := checkOf(t, q, alone); !c.Sound() || len(c.Problems) != 0 {
		t.Errorf("%+v", c)
	}
	f, err := os.OpenFile(alone, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0, 0}, 2<<16); err != nil { // the reference count of the header
		t.Fatal(err)
	}
	if c := checkOf(t, q, alone); c.Sound() || c.Errors != 1 || len(c.Problems) != 1 {
		t.Errorf("%+v", c)
	}
	if _, err := f.WriteAt([]byte{1}, 1<<16+7); err != nil { // the first block of counts is nowhere
		t.Fatal(err)
	}
	if c := checkOf(t, q, alone); c.Sound() {
		t.Errorf("%+v", c)
	}
}

// luksImage returns an encrypted image that qemu-img 7.2 made, without its keys: making one takes processor time that qemu-img measures, and on some
// machines it can't.
func luksImage(t *testing.T) []byte {
	t.Helper()
	f, err := os.Open("testdata/luks.qcow2.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil || len(b) != 4<<16 {
		t.Fatal(len(b), err)
	}
	return append(b, make([]byte, 32<<16)...)
}

// TestQCOW2Steps: what is proposed for an image works as it is written: it names the flags for further files, and nothing is
// proposed for one that is encrypted.
func TestQCOW2Steps(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("SKIPPED: no qemu-img (Debian: apt-get install qemu-utils)")
	}
	encrypted := luksImage(t)
	t.Chdir(t.TempDir())
	if err := os.WriteFile("luks.qcow2", encrypted, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{
		"create -q -f raw base.raw 1M", "create -q -f qcow2 -b base.raw -F raw overlay.qcow2", "create -q -f qcow2 alone.qcow2 1M",
		"create -q -f qcow2 -o data_file=content data.qcow2 1M",
	} {
		if out, err := exec.Command("qemu-img", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v, %s", args, err, out)
		}
	}
	r, err := inspect.Disks(t.Context(), []string{"alone.qcow2", "overlay.qcow2", "data.qcow2", "luks.qcow2"}, inspect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, i := range r.Images {
		for _, s := range i.Next {
			got = append(got, fmt.Sprintf("%s:%v:%v", s.Args[0], s.Backing, s.Data))
		}
	}
	want := "alone.qcow2:false:false alone.qcow2:false:false overlay.qcow2:true:false overlay.qcow2:true:false data.qcow2:false:true data.qcow2:false:true"
	if strings.Join(got, " ") != want {
		t.Errorf("%v", got)
	}
	if q := r.Images[3].QCOW2; q.Encryption != "LUKS" || q.Error != "" {
		t.Errorf("%+v", q)
	}
}

// checkOf checks the image at path.
func checkOf(t *testing.T, q *inspect.QCOW2, path string) *inspect.QCOW2Check {
	t.Helper()
	f, err := block.Open(path, block.Options{ReadOnly: true, Lock: block.LockShared})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := q.CheckImage(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	return q.Check
}
