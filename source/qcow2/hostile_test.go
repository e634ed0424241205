package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// An edit changes a field of an image.
type edit struct {
	at    int
	bytes int
	value uint64
}

func (e edit) apply(b []byte) {
	var v [8]byte
	binary.BigEndian.PutUint64(v[:], e.value)
	copy(b[e.at:], v[8-e.bytes:])
}

// imageBytes returns the content of a fixture.
func imageBytes(t testing.TB, name string) []byte {
	t.Helper()
	return unpack(t, "testdata/"+name+".qcow2.zst")
}

// memory returns a device with these bytes.
func memory(t testing.TB, b []byte) block.Device {
	t.Helper()
	m := block.NewMemory(int64(len(b)))
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return m
}

// TestHeaderRefused changes one field of a good image at a time. The image must be refused when it is opened.
func TestHeaderRefused(t *testing.T) {
	good := imageBytes(t, "ext")
	for _, c := range []struct {
		name  string
		edits []edit
		says  string
	}{
		{"magic", []edit{{0, 4, 0x514649fa}}, "not a qcow2 image"},
		{"version 1", []edit{{4, 4, 1}}, "version 1"},
		{"version 4", []edit{{4, 4, 4}}, "version 4"},
		{"cluster bits 8", []edit{{20, 4, 8}}, "cluster_bits"},
		{"cluster bits 22", []edit{{20, 4, 22}}, "cluster_bits"},
		{"cluster bits 64", []edit{{20, 4, 64}}, "cluster_bits"},
		{"subclusters of less than 512 bytes", []edit{{20, 4, 13}, {36, 4, 4096}}, "too small for subclusters"},
		{"header of 96 bytes", []edit{{100, 4, 96}}, "header_length"},
		{"header of 105 bytes", []edit{{100, 4, 105}}, "header_length"},
		{"header longer than a cluster", []edit{{100, 4, 1 << 22}}, "header_length"},
		{"refcount order 7", []edit{{96, 4, 7}}, "refcount_order"},
		{"unknown incompatible feature", []edit{{72, 8, incompatExtendedL2 | 1<<40}}, "bit 40"},
		{"compression bit without type", []edit{{72, 8, incompatExtendedL2 | incompatCompression}}, "compression type 0"},
		{"compression type without bit", []edit{{104, 1, 1}}, "compression type 1"},
		{"compression type 2", []edit{{72, 8, incompatExtendedL2 | incompatCompression}, {104, 1, 2}}, "compression type 2"},
		{"AES", []edit{{32, 4, 1}}, "encrypted (AES)"},
		{"LUKS", []edit{{32, 4, 2}}, "encrypted (LUKS)"},
		{"encryption method 3", []edit{{32, 4, 3}}, "encryption method 3"},
		{"size 2^63", []edit{{24, 8, 1 << 63}}, "size is"},
		{"L1 too small", []edit{{24, 8, 1 << 50}}, "too small"},
		{"L1 over 32 MiB", []edit{{36, 4, 4<<20 + 1}}, "too large"},
		{"L1 not aligned", []edit{{40, 8, 0x30200}}, "L1 table"},
		{"L1 at 2^63", []edit{{40, 8, 1 << 63}}, "L1 table"},
		{"L1 behind the end", []edit{{40, 8, 1 << 40}}, "truncated"},
		{"no refcount table", []edit{{56, 4, 0}}, "reference count table"},
		{"huge refcount table", []edit{{56, 4, 1 << 31}}, "reference count table"},
		{"refcount table not aligned", []edit{{48, 8, 513}}, "reference count table"},
		{"snapshot table not aligned", []edit{{64, 8, 513}}, "snapshot table"},
		{"65,537 snapshots", []edit{{60, 4, 65537}}, "snapshots"},
		{"backing name of 1024 bytes", []edit{{8, 8, 512}, {16, 4, 1024}}, "backing file name"},
		{"backing name behind the cluster", []edit{{8, 8, 1 << 40}, {16, 4, 10}}, "backing file name"},
		{"raw data without a data file", []edit{{88, 8, autoclearRawData}}, "raw external data"},
		{"data file", []edit{{72, 8, incompatExtendedL2 | incompatDataFile}}, "external data file"},
		{"extension too long", []edit{{112, 4, 0x12345678}, {116, 4, 1 << 31}}, "do not fit"},
		{"format name of 16 bytes", []edit{{112, 4, extBackingFormat}, {116, 4, 16}}, "format name"},
		{"encryption header", []edit{{112, 4, extEncryption}, {116, 4, 16}}, "without LUKS"},
		{"bitmaps extension of 16 bytes", []edit{{88, 8, autoclearBitmaps}, {112, 4, extBitmaps}, {116, 4, 16}}, "bitmaps"},
	} {
		b := bytes.Clone(good)
		for _, e := range c.edits {
			e.apply(b)
		}
		_, err := Open(memory(t, b), Options{})
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want an error with %q", c.name, err, c.says)
		}
	}
	for n := range v3HeaderBytes {
		if _, err := Open(memory(t, good[:n]), Options{}); err == nil {
			t.Errorf("a file of %d bytes was opened", n)
		}
	}
}

// TestHeaderAccepted changes fields that a reader must ignore.
func TestHeaderAccepted(t *testing.T) {
	good := imageBytes(t, "ext")
	want := digestOf(t, good)
	for _, c := range []struct {
		name  string
		edits []edit
	}{
		{"unknown compatible features", []edit{{80, 8, 1<<63 | 6}}},
		{"unknown autoclear features", []edit{{88, 8, 1<<63 | 4}}},
		{"dirty", []edit{{72, 8, incompatExtendedL2 | incompatDirty}}},
		{"corrupt", []edit{{72, 8, incompatExtendedL2 | incompatCorrupt}}},
		{"backing name of no bytes", []edit{{8, 8, 512}, {16, 4, 0}}},
		{"length of a backing name without offset", []edit{{16, 4, 5000}}},
		{"refcount table behind the end", []edit{{48, 8, 1 << 40}}},
		{"a snapshot table behind the end", []edit{{60, 4, 65536}, {64, 8, 1 << 40}}},
		{"unknown extension", []edit{{112, 4, 0x12345678}, {116, 4, 8}, {128, 4, 0}}},
	} {
		b := bytes.Clone(good)
		for _, e := range c.edits {
			e.apply(b)
		}
		if got := digestOf(t, b); got != want {
			t.Errorf("%s: the content is another", c.name)
		}
	}
	b := bytes.Clone(good)
	edit{72, 8, incompatExtendedL2 | incompatCorrupt}.apply(b)
	if _, err := Open(memory(t, b), Options{Strict: true}); !errors.Is(err, ErrMarkedCorrupt) {
		t.Errorf("marked corrupt, strict: %v", err)
	}
	edit{24, 8, 3<<20 - 1}.apply(good)
	if i, err := Open(memory(t, good), Options{}); err != nil || i.Size() != 3<<20-512 {
		t.Errorf("a size that is no multiple of 512: %v", err)
	}
}

func digestOf(t *testing.T, b []byte) string {
	t.Helper()
	i, err := Open(memory(t, b), Options{})
	if err != nil {
		t.Fatal(err)
	}
	return digest(t, i, 1<<20)
}

// tiny returns an image of clusters of 2^bits bytes: header, L1 table in cluster 1, one L2 table in cluster 2 with these
// first entries, data from cluster 3 on.
func tiny(version uint64, bits int, size uint64, incompat uint64, l2 []uint64, data []byte) []byte {
	cs := 1 << bits
	b := make([]byte, 3*cs, 3*cs+len(data))
	for _, e := range []edit{{0, 4, magic}, {4, 4, version}, {20, 4, uint64(bits)}, {24, 8, size}, {36, 4, 1}, {40, 8, uint64(cs)}, {48, 8, uint64(cs)}, {56, 4, 1}} {
		e.apply(b)
	}
	if version == 3 {
		edit{72, 8, incompat}.apply(b)
		edit{100, 4, 104}.apply(b)
		if incompat&incompatCompression != 0 {
			edit{100, 4, 112}.apply(b)
			edit{104, 1, 1}.apply(b)
		}
	}
	edit{cs, 8, uint64(2 * cs)}.apply(b)
	for i, e := range l2 {
		edit{2*cs + 8*i, 8, e}.apply(b)
	}
	return append(b, data...)
}

// TestEntries reads one cluster by one L2 entry.
func TestEntries(t *testing.T) {
	const cs = 4096
	content := bytes.Repeat([]byte{7}, cs)
	for _, c := range []struct {
		name    string
		version uint64
		entry   uint64
		data    []byte
		want    byte // of each byte
		says    string
	}{
		{"unallocated", 3, 0, content, 0, ""},
		{"unallocated with the copied flag", 3, copiedFlag, content, 0, ""},
		{"data", 3, 3 * cs, content, 7, ""},
		{"data with reserved bits", 3, 3*cs | 1<<1 | 1<<8 | 1<<56 | 1<<61, content, 7, ""},
		{"zeros", 3, zeroFlag, content, 0, ""},
		{"zeros with an offset", 3, 3*cs | zeroFlag, content, 0, ""},
		{"zero flag in version 2", 2, zeroFlag, content, 0, "version 2"},
		{"not aligned", 3, 3*cs + 512, content, 0, "multiple of the cluster size"},
		{"zeros, not aligned", 3, 3*cs + 512 + zeroFlag, content, 0, "multiple of the cluster size"},
		{"behind the end", 3, 4 * cs, content, 0, "truncated"},
		{"2^55 bytes away", 3, 1 << 55, content, 0, "truncated"},
		{"compressed, behind the end", 3, compressedFlag | 1<<40, content, 0, "truncated"},
		{"compressed rubbish", 3, compressedFlag | 3*cs, content, 0, "deflate"},
		{"compressed, cut", 3, compressedFlag | 3*cs, deflated(t, content)[:3], 0, ""},
		{"compressed", 3, compressedFlag | 3*cs, deflated(t, content), 7, ""},
		{"compressed, too many sectors", 3, compressedFlag | 15<<58 | 3*cs, deflated(t, content), 7, ""},
		{"compressed, too short", 3, compressedFlag | 3*cs, deflated(t, content[:cs-1]), 0, "ends after 4095"},
		{"compressed, longer than a cluster", 3, compressedFlag | 3*cs, deflated(t, append(bytes.Clone(content), 9, 9)), 7, ""},
	} {
		i, err := Open(memory(t, tiny(c.version, 12, cs, 0, []uint64{c.entry}, c.data)), Options{})
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		p := bytes.Repeat([]byte{1}, cs)
		_, err = i.ReadAt(p, 0)
		var corrupt *ondisk.CorruptError
		switch {
		case c.name == "compressed, cut": // an error, or rubbish: the format has no checksum
		case c.says != "":
			if !errors.As(err, &corrupt) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v, want %q", c.name, err, c.says)
			}
		case err != nil || !bytes.Equal(p, bytes.Repeat([]byte{c.want}, cs)):
			t.Errorf("%s: %v, first byte %d", c.name, err, p[0])
		}
	}
}

// TestZstdFrames reads clusters of several frames, and refuses those that do not end where the cluster does.
func TestZstdFrames(t *testing.T) {
	const cs = 4096
	a, b := bytes.Repeat([]byte{7}, 1000), bytes.Repeat([]byte{7}, cs-1000)
	skip := append([]byte{0x50, 0x2a, 0x4d, 0x18, 5, 0, 0, 0}, "hello"...)
	for _, c := range []struct {
		name string
		in   [][]byte
		good bool
	}{
		{"one frame", [][]byte{zstdFrame(append(bytes.Clone(a), b...))}, true},
		{"two frames and rubbish", [][]byte{zstdFrame(a), zstdFrame(b), []byte("rubbish")}, true},
		{"a skippable frame in front", [][]byte{skip, zstdFrame(a), skip, zstdFrame(b)}, true},
		{"short", [][]byte{zstdFrame(a)}, false},
		{"long", [][]byte{zstdFrame(a), zstdFrame(append(bytes.Clone(b), 7))}, false},
		{"skippable frames only", [][]byte{skip, skip}, false},
	} {
		i, err := Open(memory(t, tiny(3, 12, cs, incompatCompression, []uint64{compressedFlag | 3<<58 | 3*cs}, bytes.Join(c.in, nil))), Options{})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, cs)
		if _, err := i.ReadAt(p, 0); (err == nil) != c.good || c.good && !bytes.Equal(p, bytes.Repeat([]byte{7}, cs)) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestHostileIsBounded: small images that claim much are answered quickly and with little memory.
func TestHostileIsBounded(t *testing.T) {
	bomb := make([]uint64, 64)
	for i := range bomb {
		bomb[i] = compressedFlag | 7<<49 | 3<<21
	}
	huge := tiny(3, 9, 128<<30, 0, nil, nil) // 4 M entries in a file of 1.5 KiB
	edit{36, 4, 4 << 20}.apply(huge)
	itself := tiny(3, 16, 512<<20, 0, nil, nil) // the L1 table is its own L2 table, and the header one of data
	edit{1 << 16, 8, 1 << 16}.apply(itself)
	for _, c := range []struct {
		name string
		b    []byte
	}{
		{"bomb", tiny(3, 21, 64<<21, 0, bomb, deflated(t, make([]byte, 2<<20)))},
		{"huge L1 table", huge},
		{"tables over each other", itself},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := cpuTime(t)
		i, err := Open(memory(t, c.b), Options{})
		if err != nil {
			t.Fatal(err)
		}
		for off := int64(0); off < i.Size(); {
			all, err := i.Extents(off, i.Size()-off)
			if err != nil {
				break
			}
			p := make([]byte, min(all[0].Length, 1<<20))
			i.ReadAt(p, off)
			for _, e := range all {
				off += e.Length
			}
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		if used := int64(after.HeapAlloc) - int64(before.HeapAlloc); used > 64<<20 {
			t.Errorf("%s: %d bytes of memory", c.name, used)
		}
		if took := cpuTime(t) - start; took > 20*time.Second {
			t.Errorf("%s: took %v of the processors", c.name, took)
		}
		runtime.KeepAlive(i)
	}
}

// TestNamesBeside: which names of backing files are followed.
func TestNamesBeside(t *testing.T) {
	dir := t.TempDir()
	in := filepath.Join(dir, "in")
	for _, d := range []string{in, filepath.Join(in, "sub")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"outside", "in/base", "in/sub/base", "in/sub/a:b"} {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"in/good": "base", "in/bad": "../outside", "in/bad2": "/etc/passwd"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	for name, good := range map[string]bool{
		"base": true, "./base": true, "sub/base": true, "sub/a:b": true, "good": true,
		"": false, "a\x00b": false, "nbd:base": false, "json:{}": false, "file:base": false, "/etc/passwd": false,
		"../outside": false, "sub/../base": false, "bad": false, "bad2": false, "sub": false, "absent": false,
	} {
		at, err := Beside(filepath.Join(in, "top.qcow2"), name)
		if (err == nil) != good {
			t.Errorf("%q: %q, %v", name, at, err)
		}
	}
}

// TestLoop: an image that is its own backing file is refused at once.
func TestLoop(t *testing.T) {
	dir := t.TempDir()
	b := tiny(3, 12, 1<<20, 0, nil, nil)
	copy(b[104:], "\xe2\x79\x2a\xca\x00\x00\x00\x05qcow2\x00\x00\x00")
	copy(b[200:], "b")
	edit{8, 8, 200}.apply(b)
	edit{16, 4, 1}.apply(b)
	for _, name := range []string{"a", "b"} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenFile(filepath.Join(dir, "b"), FileOptions{Follow: true}); err == nil {
			t.Fatal("opened") // absent, then itself
		} else if name == "b" && !strings.Contains(err.Error(), "loop") {
			t.Error(err)
		}
	}
	copy(b[104:], "\x00\x00\x00\x00")
	if err := os.WriteFile(filepath.Join(dir, "b"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenFile(filepath.Join(dir, "b"), FileOptions{Follow: true}); !errors.Is(err, ErrNoFormat) {
		t.Errorf("no format: %v", err)
	}
}

// FuzzImage: any bytes are read or refused, with bounded work.
func FuzzImage(f *testing.F) {
	f.Add(tiny(3, 9, 4096, 0, []uint64{3 << 9, zeroFlag, compressedFlag | 3<<9}, make([]byte, 512)))
	f.Add(tiny(2, 12, 1<<20, 0, []uint64{3 << 12, compressedFlag | 3<<12}, deflated(f, make([]byte, 4096))))
	f.Add(tiny(3, 14, 1<<20, incompatExtendedL2, []uint64{3 << 14, 1<<33 | 1}, make([]byte, 16384)))
	f.Add(tiny(3, 9, 4096, incompatCompression, []uint64{compressedFlag | 3<<9}, zstdFrame(make([]byte, 512))))
	for _, name := range []string{"snaps", "c512"} {
		f.Add(imageBytes(f, name)[:64<<10])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		start := time.Now()
		defer func() {
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("took %v", took)
			}
		}()
		i, err := Open(memory(t, b), Options{})
		if err != nil {
			return
		}
		disks := []*Disk{&i.Disk}
		snaps, _ := i.Snapshots()
		for _, s := range snaps[:min(len(snaps), 3)] {
			if d, err := i.Snapshot(s); err == nil {
				disks = append(disks, d)
			}
		}
		i.Bitmaps()
		p := make([]byte, 64<<10)
		for _, d := range disks {
			for _, off := range []int64{0, d.Size() / 2, d.Size() - 4096} {
				off = max(0, off)
				n := min(d.Size()-off, int64(len(p)))
				d.ReadAt(p[:n], off)
				if n > 0 {
					if all, err := d.Extents(off, n); err == nil && len(all) == 0 {
						t.Error("no extents, no error")
					}
				}
			}
		}
	})
}

// cpuTime is what this process has used of the processors: a busy machine does not change it.
func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
