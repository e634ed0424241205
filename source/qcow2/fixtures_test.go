package qcow2

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
)

// TestFixtures reads each fixture as qemu does, in pieces of several sizes, or refuses it for the right reason.
func TestFixtures(t *testing.T) {
	all, dir := fixtures(t)
	if len(all) != 10 {
		t.Fatalf("%d fixtures", len(all))
	}
	for _, c := range all {
		t.Run(c.Name, func(t *testing.T) {
			path := filepath.Join(dir, c.file(0))
			f, err := OpenFile(path, FileOptions{Follow: c.Follow || c.Refuse != ""})
			if c.Name == "json-backing" {
				if !errors.Is(err, ErrUnsafeName) {
					t.Fatalf("%v, want %v", err, ErrUnsafeName)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if c.Name == "cut" {
				readCut(t, f)
				return
			}
			if f.Size() != c.RawSize&^511 {
				t.Errorf("size %d, want %d", f.Size(), c.RawSize)
			}
			for _, n := range []int64{1000, 4096, 1 << 20} {
				if got := digest(t, f, n); got != c.RawSHA256 {
					t.Errorf("in pieces of %d bytes: digest %s, want %s", n, got, c.RawSHA256)
				}
			}
			checkExtents(t, f)
			if f.Info().Dirty != (c.Name == "dirty") {
				t.Errorf("dirty: %v", f.Info().Dirty)
			}
			snaps, err := f.Snapshots()
			if err != nil || len(snaps) != len(c.Snapshots) {
				t.Fatalf("snapshots %v, %v; want %d", snaps, err, len(c.Snapshots))
			}
			for i, want := range c.Snapshots {
				s := snaps[i]
				d, err := f.Snapshot(s)
				if err != nil {
					t.Fatal(err)
				}
				if s.ID != want.ID || s.Name != want.Name || d.Size() != want.Size || s.Time.Year() < 2020 {
					t.Errorf("snapshot %+v, want %+v", s, want)
				}
				if got := digest(t, d, 1<<20); got != want.RawSHA256 {
					t.Errorf("snapshot %q: digest %s, want %s", s.Name, got, want.RawSHA256)
				}
				checkExtents(t, d)
			}
		})
	}
}

// file returns the name of a file of the case.
func (c fixture) file(i int) string {
	if len(c.Files) == 0 {
		return c.Name + ".qcow2"
	}
	return c.Files[i].File
}

// readCut reads a truncated image: what is left reads, and what is not is an error with the place.
func readCut(t *testing.T, f *File) {
	var good, bad int
	p := make([]byte, f.Info().ClusterSize)
	for off := int64(0); off < f.Size(); off += int64(len(p)) {
		_, err := f.ReadAt(p[:min(int64(len(p)), f.Size()-off)], off)
		var corrupt *ondisk.CorruptError
		switch {
		case err == nil:
			good++
		case errors.As(err, &corrupt) && strings.Contains(err.Error(), "truncated"):
			bad++
		default:
			t.Fatal(err)
		}
	}
	if bad < 2 || good < 2 {
		t.Errorf("%d clusters read, %d refused", good, bad)
	}
}

// TestBackingIsNotOpened: an image opens nothing by its own word.
func TestBackingIsNotOpened(t *testing.T) {
	_, dir := fixtures(t)
	_, err := OpenFile(filepath.Join(dir, "chain-top.qcow2"), FileOptions{})
	var needs *NeedsFileError
	if !errors.As(err, &needs) || needs.Data || needs.Name != "chain-mid.qcow2" || needs.Format != "qcow2" {
		t.Errorf("%v (%+v)", err, needs)
	}
	_, err = OpenFile(filepath.Join(dir, "chain-top.qcow2"), FileOptions{Backing: filepath.Join(dir, "chain-mid.qcow2")})
	if !errors.As(err, &needs) || needs.Name != "chain-base.raw" {
		t.Errorf("the backing file of the one given: %v", err)
	}
}

// TestReading is the reading half of the contract of a block.Device.
func TestReading(t *testing.T) {
	_, dir := fixtures(t)
	for _, name := range []string{"ext", "zstd", "chain-top"} {
		t.Run(name, func(t *testing.T) {
			blocktest.RunReadOnly(t, func(t *testing.T) block.Device {
				f, err := OpenFile(filepath.Join(dir, name+".qcow2"), FileOptions{Follow: true})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { f.Close() })
				return f
			})
		})
	}
}
