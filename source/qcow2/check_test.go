package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
)

// checkStatus checks an image and returns the exit status that qemu-img check has for such a result.
func checkStatus(t testing.TB, path string) (status int, said string) {
	t.Helper()
	f, err := block.Open(path, block.Options{ReadOnly: true, Lock: block.LockShared})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := ReadInfo(f)
	if err != nil {
		return 1, err.Error()
	}
	r, err := Check(t.Context(), f, info)
	switch {
	case err != nil:
		return 1, err.Error()
	case r.Errors > 0:
		return 2, fmt.Sprint(r)
	case r.Leaks > 0:
		return 3, fmt.Sprint(r)
	}
	return 0, ""
}

// qemuStatus is the exit status of qemu-img check.
func qemuStatus(t testing.TB, path string) (status int, said string) {
	t.Helper()
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit != nil {
		status = exit.ExitCode()
	}
	return status, string(out)
}

// probe changes a few bits of an entry of a table.
func probe(r *rand.Rand, b []byte) string {
	be := binary.BigEndian
	cs := int64(1) << be.Uint32(b[20:])
	inside := func(at int64) bool { return at >= 0 && at+8 <= int64(len(b)) }
	var places []int64
	add := func(at, entries, width int64) {
		for n := range entries {
			if inside(at+n*width) && be.Uint64(b[at+n*width:]) != 0 {
				places = append(places, at+n*width)
			}
		}
	}
	l1 := int64(be.Uint64(b[40:]))
	add(l1, int64(be.Uint32(b[36:])), 8)
	tables := places
	for _, at := range tables {
		if l2 := int64(be.Uint64(b[at:]) & offsetMask); l2 > 0 {
			add(l2, cs/8, 8)
		}
	}
	counts := int64(be.Uint64(b[48:]))
	add(counts, int64(be.Uint32(b[56:]))*cs/8, 8)
	if block := int64(be.Uint64(b[counts:])); inside(block) {
		for range 1 + len(places)/2 {
			places = append(places, block+r.Int64N(min(cs, 64)))
		}
	}
	if r.IntN(10) == 0 {
		places = []int64{int64(r.IntN(112))}
	}
	at := places[r.IntN(len(places))]
	if !inside(at) {
		return ""
	}
	was := be.Uint64(b[at:])
	v := was ^ 1<<r.IntN(64)
	switch r.IntN(5) {
	case 0:
		v = 0
	case 1:
		v = was&^uint64(offsetMask) | uint64(r.Int64N(int64(len(b))/cs+1)*cs)
	}
	be.PutUint64(b[at:], v)
	return fmt.Sprintf("byte 0x%x: 0x%016x becomes 0x%016x", at, was, v)
}

// TestInteropCheck: random images, also with changed bits in their tables, get the exit status of qemu-img check.
func TestInteropCheck(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	need(t, "qemu-img", "qemu-io")
	var statuses [4]int
	images := seeds() / 3
	for seed := range images {
		r := newRandom(t, seed)
		about := r.image(512 * (1 + r.Int64N(8<<10)))
		path := r.made[0]
		if r.IntN(3) == 0 && !strings.Contains(about, "compat=0.10") {
			exec.Command("qemu-img", "bitmap", "--add", path, "one").Run() // not with an external data file
			r.write(path, 512, 512, false)
		}
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for n := range 6 {
			b, what := bytes.Clone(good), "nothing is changed"
			if n > 0 {
				what = probe(r.Rand, b)
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			want, said := qemuStatus(t, path)
			got, why := checkStatus(t, path)
			statuses[got]++
			if got != want && !knownDifference(why, said) {
				t.Errorf("seed %d, %s\n%s: status %d, want %d\nwe: %s\nqemu: %s", seed, about, what, got, want, why, said)
			}
		}
	}
	t.Logf("%d images sound, %d not finished or refused, %d with errors, %d with leaks", statuses[0], statuses[1], statuses[2], statuses[3])
	if statuses[0] < int(images) || statuses[2] == 0 || statuses[3] == 0 {
		t.Error("too few kinds of results")
	}
}

// knownDifference: headers that we refuse and qemu-img check repairs, and further files, which are not opened.
func knownDifference(we, qemu string) bool {
	return strings.Contains(we, "header_length") || strings.Contains(we, "reference count table of 0 bytes") ||
		strings.Contains(qemu, "'data-file' is required") || strings.Contains(qemu, "Missing CRYPTO header")
}

// TestCheckWidths: reference counts of every width, those that qemu wrote and those of known bytes.
func TestCheckWidths(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	b := []byte{0b1101_0010, 0b0110_1001, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc}
	for order, want := range [][]uint64{
		{0, 1, 0, 0, 1, 0, 1, 1, 1, 0}, {2, 0, 1, 3, 1, 2}, {2, 13, 9, 6, 2, 1}, {0xd2, 0x69, 0x12}, {0xd269, 0x1234}, {0xd2691234, 0x56789abc}, {0xd26912345678<<16 | 0x9abc},
	} {
		for i, n := range want {
			if got := countIn(b, int64(i)<<order, uint(order)); got != n {
				t.Errorf("2^%d bits, number %d: %d, want %d", order, i, got, n)
			}
		}
	}
	need(t, "qemu-img", "qemu-io")
	for bits := 1; bits <= 64; bits *= 2 {
		path := filepath.Join(t.TempDir(), "disk")
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("cluster_size=4k,refcount_bits=%d", bits), path, "8M")
		run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 10000 3000000", "-c", "discard 1M 64k", path)
		if bits > 1 {
			run(t, "qemu-img", "snapshot", "-c", "one", path)
			run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 20000 300000", path)
		}
		if status, said := checkStatus(t, path); status != 0 {
			t.Errorf("%d bits: %s", bits, said)
		}
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		counts := int(binary.BigEndian.Uint64(good[48:]))
		blockOf := func(cluster int) int {
			return int(binary.BigEndian.Uint64(good[counts+8*(cluster*bits/8/4096):]))
		}
		for name, want := range map[string]int{"a count too low": 2, "a leak": 3} {
			bad := bytes.Clone(good)
			if want == 2 { // the counts of the first clusters
				clear(bad[blockOf(0):][:max(1, bits/8)])
			} else { // a cluster at the end that nothing uses
				last := len(bad) / 4096
				bad = append(bad, make([]byte, 4096)...)
				setCount(bad[blockOf(last):], last%(4096*8/bits), bits)
			}
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			got, said := checkStatus(t, path)
			if qemu, _ := qemuStatus(t, path); got != want || qemu != want {
				t.Errorf("%d bits, %s: %d, qemu-img check %d, want %d: %s", bits, name, got, qemu, want, said)
			}
		}
	}
}

// setCount sets the reference count of a cluster in a block to 1.
func setCount(block []byte, cluster, bits int) {
	if bits < 8 {
		block[cluster*bits/8] |= 1 << (cluster * bits % 8)
		return
	}
	block[(cluster+1)*bits/8-1] = 1
}

// TestCheckIsBounded: small files whose tables claim much are checked quickly and with little memory, or not at all.
func TestCheckIsBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("seconds")
	}
	huge := tiny(3, 9, 128<<30, 0, nil, nil)
	edit{36, 4, 4 << 20}.apply(huge)
	full := append(tiny(3, 9, 128<<30, 0, nil, nil), make([]byte, 32<<20)...) // every L1 entry names one L2 table
	edit{36, 4, 4 << 20}.apply(full)
	edit{40, 8, 3 << 9}.apply(full)
	for i := range 4 << 20 {
		binary.BigEndian.PutUint64(full[3<<9+8*i:], 2<<9)
	}
	snaps := tiny(3, 9, 32<<10, 0, nil, make([]byte, 4<<20)) // 65,536 snapshots whose L1 tables are the table of snapshots
	edit{60, 4, 65536}.apply(snaps)
	edit{64, 8, 3 << 9}.apply(snaps)
	for i := range 65536 {
		edit{3<<9 + 40*i, 8, uint64(i%4096) << 9}.apply(snaps)
		edit{3<<9 + 40*i + 8, 4, 4 << 20}.apply(snaps)
	}
	for _, c := range []struct {
		name string
		b    []byte
		grow int64
	}{{"huge L1 table", huge, 0}, {"a sparse file of 1 EiB", huge, 1 << 60}, {"one L2 table for all", full, 0}, {"snapshots over each other", snaps, 0}} {
		dev := block.Device(memory(t, c.b))
		if c.grow > 0 {
			dev = longer{dev, c.grow}
		}
		info, err := ReadInfo(dev)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := cpuTime(t)
		r, err := Check(t.Context(), dev, info)
		took := cpuTime(t) - start
		runtime.ReadMemStats(&after)
		t.Logf("%s: %v, %v of the processors, %d MiB", c.name, err, took, (after.TotalAlloc-before.TotalAlloc)>>20)
		if err == nil && r.Errors == 0 || err != nil && !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v, %v", c.name, r, err)
		}
		if took > 60*time.Second || after.HeapSys-min(after.HeapSys, before.HeapSys) > 400<<20 {
			t.Errorf("%s: %v of the processors, the heap grew by %d bytes", c.name, took, after.HeapSys-before.HeapSys)
		}
	}
}

// longer is a device that goes on with zeros.
type longer struct {
	block.Device // without its extents, which end earlier
	size         int64
}

func (l longer) Size() int64 { return l.size }

func (l longer) ReadAt(p []byte, off int64) (int, error) {
	n := max(0, min(int64(len(p)), l.Device.Size()-off))
	clear(p[n:])
	if n > 0 {
		return l.Device.ReadAt(p[:n], off)
	}
	return len(p), nil
}

// FuzzCheck: any bytes are checked or refused, with bounded work.
func FuzzCheck(f *testing.F) {
	f.Add(tiny(3, 9, 4096, 0, []uint64{3 << 9, zeroFlag, compressedFlag | 3<<9}, make([]byte, 512)))
	f.Add(tiny(3, 14, 1<<20, incompatExtendedL2, []uint64{3 << 14, 1<<33 | 1}, make([]byte, 16384)))
	f.Add(bitmapImage(3*4096*8*512+512, 9, 0, []uint64{1, 5 << 12, 0, 1}, bytes.Repeat([]byte{0x5a}, 4096)))
	for _, name := range []string{"snaps", "c512"} {
		f.Add(imageBytes(f, name)[:64<<10])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		start := time.Now()
		defer func() {
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("took %v", took)
			}
		}()
		dev := memory(t, b)
		info, err := ReadInfo(dev)
		if err != nil {
			return
		}
		if r, err := Check(t.Context(), dev, info); err == nil && int64(len(r.Problems)) != min(maxProblems, r.Errors+r.Leaks) {
			t.Errorf("%d problems of %d errors and %d leaks", len(r.Problems), r.Errors, r.Leaks)
		}
		bitmaps, _, _ := Bitmaps(dev, info)
		for _, b := range bitmaps[:min(len(bitmaps), 3)] {
			end := int64(-1)
			DirtyRanges(t.Context(), dev, info, b, func(r block.Range) error {
				if r.Off <= end || r.Length <= 0 || r.Length > info.Size-r.Off {
					t.Errorf("range %v after byte %d of %d", r, end, info.Size)
				}
				end = r.Off + r.Length
				return nil
			})
		}
	})
}
