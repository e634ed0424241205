package block_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

var sparseModes = []block.Sparse{block.LongHoles, block.AllHoles, block.IntoZeros}

// patchwork is n bytes of ranges of zeros and of data, of all sizes and alignments.
func patchwork(rng *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for at := 0; at < n; {
		k := min(n-at, 1<<rng.IntN(18)+rng.IntN(3)*511)
		if rng.IntN(2) == 0 {
			for i := range k {
				p[at+i] = byte(i) | 1
			}
		}
		at += k
	}
	return p
}

// What is copied is what was there, over whatever the target held, and nothing beside it is touched.
func TestCopyCopies(t *testing.T) {
	rng := rand.New(rand.NewPCG(18, 1))
	const size = 1 << 20
	for round := range 60 {
		content := patchwork(rng, size)
		var src, dst block.Device = block.MemoryFrom(bytes.Clone(content)), nil
		how := sparseModes[round%len(sparseModes)]
		want := patchwork(rng, size)
		if how == block.IntoZeros {
			clear(want)
		}
		dst = block.MemoryFrom(bytes.Clone(want))
		if rng.IntN(2) == 0 {
			src = blocktest.Plain(src)
		}
		if rng.IntN(2) == 0 {
			dst = blocktest.Plain(dst)
		}
		from, to := rng.Int64N(size/512)*512, rng.Int64N(size/512)*512
		n := rng.Int64N(size - max(from, to) + 1)
		done := int64(0)
		if err := block.Copy(dst, to, src, from, n, how, func(n int64) error { done += n; return nil }); err != nil {
			t.Fatal(err)
		}
		copy(want[to:to+n], content[from:])
		got := make([]byte, size)
		if _, err := dst.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) || done != n {
			t.Fatalf("round %d: %d bytes from %d to %d, %d reported: not what was there", round, n, from, to, done)
		}
	}
}

// space returns how much a file takes, in bytes.
func space(t *testing.T, f *block.File) int64 {
	t.Helper()
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(f.Path(), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func newFile(t *testing.T, size int64) *block.File {
	t.Helper()
	f, err := block.Create(filepath.Join(t.TempDir(), "disk"), size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// Holes stay holes, and what was written or reserved where they go is given back. They are not read: a tebibyte
// takes no time.
func TestCopyKeepsHoles(t *testing.T) {
	const data, size = 64 << 10, 1 << 40
	fill := bytes.Repeat([]byte{7}, data)
	src := newFile(t, size)
	for _, off := range []int64{0, 1 << 30, size - data} {
		if _, err := src.WriteAt(fill, off); err != nil {
			t.Fatal(err)
		}
	}
	for _, how := range sparseModes {
		t.Run(fmt.Sprint(how), func(t *testing.T) {
			dst := newFile(t, size)
			if how != block.IntoZeros {
				for _, off := range []int64{1 << 20, 1 << 31} {
					if _, err := dst.WriteAt(fill, off); err != nil {
						t.Fatal(err)
					}
				}
				if can, err := block.Allocate(dst, 1<<32, 16<<20); err != nil || !can {
					t.Skipf("SKIPPED: no space can be reserved here: %v", err)
				}
			}
			reads := &countedReads{Forward: block.NewForward(src)}
			if err := block.Copy(dst, 0, reads, 0, size, how, nil); err != nil {
				t.Fatal(err)
			}
			if reads.bytes > 4<<20 {
				t.Errorf("%d bytes were read", reads.bytes)
			}
			if n := space(t, dst); n > 2*space(t, src) {
				t.Errorf("it takes %d bytes, the source %d", n, space(t, src))
			}
			got := make([]byte, data)
			for off, want := range map[int64]byte{0: 7, 1 << 20: 0, 1 << 30: 7, 1 << 31: 0, size - data: 7} {
				if _, err := dst.ReadAt(got, off); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{want}, data)) {
					t.Errorf("at byte %d: not %d, %v", off, want, err)
				}
			}
		})
	}
}

type countedReads struct {
	block.Forward // of a device in memory, which has no cached reads
	bytes         int64
}

func (c *countedReads) ReadAt(p []byte, off int64) (int, error) {
	c.bytes += int64(len(p))
	return c.Forward.ReadAt(p, off)
}

// Zeros among data become holes from the length on that the mode says.
func TestWriteSparseHoles(t *testing.T) {
	for _, c := range []struct {
		how        block.Sparse
		zeros, off int64
		hole       bool
	}{
		{block.LongHoles, 12 << 10, 0, false}, {block.LongHoles, 16 << 10, 0, true}, {block.LongHoles, 16 << 10, 4096, true},
		{block.AllHoles, 4096, 0, true}, {block.AllHoles, 4096, 512, false}, {block.IntoZeros, 4096, 0, true},
	} {
		f := newFile(t, 1<<20)
		if c.how != block.IntoZeros {
			if _, err := f.WriteAt(bytes.Repeat([]byte{9}, 1<<20), 0); err != nil {
				t.Fatal(err)
			}
		}
		p := bytes.Repeat([]byte{1}, 64<<10)
		clear(p[8<<10:][:c.zeros])
		if err := block.WriteSparse(f, p, 32<<10+c.off, c.how); err != nil {
			t.Fatal(err)
		}
		es, err := f.Extents(32<<10+c.off, 64<<10)
		if err != nil {
			t.Fatal(err)
		}
		if hole := len(es) == 3 && es[1].Length == c.zeros; hole != c.hole {
			t.Errorf("%+v: extents %v", c, es)
		}
	}
}

// fullForHoles is a device whose file system can't note one more hole.
type fullForHoles struct{ block.Memory }

func (*fullForHoles) ZeroAt(off, n int64, flags block.ZeroFlags) error { return syscall.ENOSPC }

func TestCopyWithoutRoomForHoles(t *testing.T) {
	dst := &fullForHoles{}
	if _, err := dst.Refresh(); err != nil {
		t.Fatal(err)
	}
	if err := dst.Grow(1 << 20); err != nil {
		t.Fatal(err)
	}
	dst.WriteAt([]byte("old"), 4096)
	if err := block.Copy(dst, 0, block.NewMemory(1<<20), 0, 1<<20, block.LongHoles, nil); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1<<20)
	if _, err := dst.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, 1<<20)) {
		t.Errorf("not zeros, %v", err)
	}
}

func TestCopyErrors(t *testing.T) {
	src, dst := block.NewMemory(1<<20), block.NewMemory(4096)
	var ce *block.CopyError
	if err := block.Copy(dst, 0, src, 1<<20, 512, 0, nil); !errors.As(err, &ce) || ce.Op != "read" {
		t.Errorf("behind the source's end: %v", err)
	}
	if err := block.Copy(dst, 0, src, 0, 1<<20, 0, nil); !errors.As(err, &ce) || ce.Op != "write" {
		t.Errorf("behind the target's end: %v", err)
	}
	end := errors.New("end")
	if err := block.Copy(dst, 0, src, 0, 4096, 0, func(int64) error { return end }); err != end {
		t.Errorf("the caller's error: %v", err)
	}
}

// An error of a device beneath that names the operation, or the bytes, is not wrapped in the same words.
func TestErrorsSayReadOnce(t *testing.T) {
	file := &fs.PathError{Op: "read", Path: "disk.img", Err: fmt.Errorf("at byte 8192: %w", syscall.EIO)}
	server := errors.New("oci://host/disk: no answer")
	inner := block.NewReadError(8192, 4096, "byte 5 of layer 2", file)
	for _, c := range []struct {
		err  error
		want string
	}{
		{&block.CopyError{Op: "read", Err: file}, "read disk.img: at byte 8192: input/output error"},
		{&block.CopyError{Op: "write", Err: server}, "write: oci://host/disk: no answer"},
		{inner, "read 4096 bytes of the disk at byte 8192 from byte 5 of layer 2: disk.img: at byte 8192: input/output error"},
		{block.NewReadError(0, 16384, "the origin", inner), inner.Error()},
		{&block.CopyError{Op: "read", Err: inner}, inner.Error()},
		{block.NewReadError(0, 8192, "", server), "read 8192 bytes of the disk at byte 0: oci://host/disk: no answer"},
		{block.NewReadError(0, 8192, "byte 3 of the COW device", inner), "read 8192 bytes of the disk at byte 0 from byte 3 of the COW device: " +
			"4096 bytes of the disk at byte 8192 from byte 5 of layer 2: disk.img: at byte 8192: input/output error"}, // other bytes
	} {
		if c.err.Error() != c.want {
			t.Errorf("%v\nnot %s", c.err, c.want)
		}
		if !errors.Is(c.err, file) && !errors.Is(c.err, server) {
			t.Errorf("%v: the cause is lost", c.err)
		}
	}
}
