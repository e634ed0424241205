package diff_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/diff"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// disk is an origin in memory with snapshots that are open for writing.
type disk struct {
	t      *testing.T
	memory *block.Memory
	origin *snapshot.Origin
}

func newDisk(t *testing.T, size int) *disk {
	m := block.MemoryFrom(blocktest.Pattern(size, 3))
	return &disk{t, m, snapshot.NewOrigin(m)}
}

// snap attaches a new snapshot.
func (d *disk) snap(chunkSectors uint32) (*snapshot.Snapshot, *block.Memory) {
	d.t.Helper()
	cow := block.NewMemory(8 << 20)
	s, err := d.origin.Attach(cow, snapshot.Options{ChunkSectors: chunkSectors})
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { s.Close() })
	return s, cow
}

func (d *disk) write(dev block.Device, p []byte, off int64) {
	d.t.Helper()
	if _, err := dev.WriteAt(p, off); err != nil {
		d.t.Fatal(err)
	}
	if err := dev.Flush(); err != nil {
		d.t.Fatal(err)
	}
}

// content is all that a device shows.
func content(t *testing.T, dev block.Device) []byte {
	t.Helper()
	b := make([]byte, dev.Size())
	if _, err := dev.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func open(t *testing.T, cow block.Device) *store.Store {
	t.Helper()
	s, err := store.Open(cow)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// made returns the Diff, which must be possible.
func made(t *testing.T) func(*diff.Diff, error) *diff.Diff {
	return func(d *diff.Diff, err error) *diff.Diff {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
}

// verified compares bytes, which must succeed.
func verified(t *testing.T, d *diff.Diff) (list []diff.Extent) {
	t.Helper()
	for e, err := range d.Verified(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, e)
	}
	return list
}

func text(list []diff.Extent) string {
	var words []string
	for _, e := range list {
		words = append(words, fmt.Sprintf("%d+%d %v", e.Off, e.Length, e.Class))
	}
	return strings.Join(words, ", ")
}

func want(t *testing.T, list []diff.Extent, want string) {
	t.Helper()
	if got := text(list); got != want {
		t.Errorf("extents\n got %s\nwant %s", got, want)
	}
}

// A snapshot that wrote a sector of a chunk, copied a chunk because the origin wrote the same bytes
// again, and wrote the short last chunk.
func TestSnapshotAgainstOrigin(t *testing.T) {
	const size = 64<<10 + 1536 // 16 chunks of 4 KiB, and three sectors
	d := newDisk(t, size)
	s, cow := d.snap(8)
	before := content(t, d.memory)
	want(t, slices.Collect(made(t)(diff.New(d.memory, open(t, cow))).Extents()), "")

	d.write(s, []byte("new"), 4096+600)
	d.write(s, bytes.Repeat([]byte{9}, 1000), 8192)
	d.write(d.origin, before[20480:24576], 20480) // the same bytes: copied, never changed
	d.write(s, []byte("end"), size-3)
	df := made(t)(diff.New(d.memory, open(t, cow)))
	if df.Size() != size {
		t.Errorf("size %d", df.Size())
	}
	want(t, slices.Collect(df.Extents()), "4096+8192 changed, 20480+4096 changed, 65536+1536 changed")
	want(t, verified(t, df), "4096+512 copied, 4608+512 changed, 5120+3072 copied, 8192+1024 changed, 9216+3072 copied, "+
		"20480+4096 copied, 65536+1024 copied, 66560+512 changed")
}

// The chunk before a short last one, which is not stored.
func TestBeforeTheShortChunk(t *testing.T) {
	d := newDisk(t, 8<<10+1536)
	s, cow := d.snap(8)
	d.write(s, []byte("x"), 4096)
	want(t, slices.Collect(made(t)(diff.New(d.memory, open(t, cow))).Extents()), "4096+4096 changed")
}

// Chunks that are larger than what is compared at once.
func TestLargeChunks(t *testing.T) {
	const chunk = 2 << 20
	memory := block.NewMemory(3 * chunk)
	cow := block.NewMemory(5 * chunk)
	s, err := snapshot.NewOrigin(memory).Attach(cow, snapshot.Options{ChunkSectors: chunk / 512})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, off := range []int64{chunk + 5<<18, chunk + 7<<18} {
		if _, err := s.WriteAt([]byte("x"), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	df := made(t)(diff.New(memory, open(t, cow)))
	want(t, slices.Collect(df.Extents()), "2097152+2097152 changed")
	want(t, verified(t, df), "2097152+1310720 copied, 3407872+512 changed, 3408384+523776 copied, 3932160+512 changed, 3932672+261632 copied")
}

// Two snapshots with chunks of different sizes. The origin's write is kept in both, so neither view
// changes.
func TestTwoSnapshots(t *testing.T) {
	d := newDisk(t, 64<<10)
	a, cowA := d.snap(8)
	b, cowB := d.snap(32)
	d.write(d.origin, []byte("x"), 40_000) // chunks 36864+4096 and 32768+16384
	d.write(a, []byte("a"), 100)
	d.write(b, []byte("b"), 100)
	d.write(b, []byte("a"), 5000)
	df := made(t)(diff.Between(d.memory, open(t, cowA), open(t, cowB)))
	want(t, slices.Collect(df.Extents()), "0+16384 changed, 32768+16384 changed")
	want(t, verified(t, df), "0+512 changed, 512+4096 copied, 4608+512 changed, 5120+11264 copied, 32768+16384 copied")

	same := made(t)(diff.Between(d.memory, open(t, cowA), open(t, cowA)))
	want(t, verified(t, same), "0+4096 copied, 36864+4096 copied")
}

// Random writes everywhere, held against the views byte by byte: no differing byte outside Extents, no
// sector that Verified calls wrong.
func TestAgainstTheBytes(t *testing.T) {
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 1))
		d := newDisk(t, 1<<20+512*r.IntN(40))
		size := d.memory.Size()
		a, cowA := d.snap(1 << r.IntN(6))
		b, cowB := d.snap(1 << r.IntN(6))
		for range 30 {
			dev := []block.Device{d.origin, a, b}[r.IntN(3)]
			off := r.Int64N(size)
			p := bytes.Repeat([]byte{byte(r.IntN(2))}, int(min(r.Int64N(20_000), size-off)))
			if _, err := dev.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		for _, dev := range []block.Device{a, b} {
			if err := dev.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		o, va, vb := content(t, d.memory), content(t, a), content(t, b)
		judge(t, made(t)(diff.New(d.memory, open(t, cowA))), o, va)
		judge(t, made(t)(diff.Between(d.memory, open(t, cowA), open(t, cowB))), va, vb)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func judge(t *testing.T, d *diff.Diff, a, b []byte) {
	t.Helper()
	inside := make([]bool, len(a))
	end := int64(-1)
	for e := range d.Extents() {
		if e.Off <= end || e.Length <= 0 {
			t.Fatalf("%+v follows byte %d: not ascending and joined", e, end)
		}
		end = e.Off + e.Length
		for i := e.Off; i < end; i++ {
			inside[i] = true
		}
	}
	var last diff.Extent
	for _, e := range verified(t, d) {
		if e.Off == last.Off+last.Length && e.Class == last.Class && last.Length > 0 || e.Off < last.Off+last.Length {
			t.Fatalf("%+v follows %+v: not ascending and joined", e, last)
		}
		last = e
		for off := e.Off; off < e.Off+e.Length; off += ondisk.SectorSize {
			end := min(off+ondisk.SectorSize, int64(len(a)))
			if same := bytes.Equal(a[off:end], b[off:end]); same != (e.Class == diff.Copied) {
				t.Fatalf("sector at %d: %v, same is %v", off, e.Class, same)
			}
			for i := off; i < end; i++ {
				if !inside[i] {
					t.Fatalf("byte %d is in Verified and not in Extents", i)
				}
				inside[i] = false
			}
		}
	}
	for i, left := range inside {
		if left {
			t.Fatalf("byte %d is in Extents and not in Verified", i)
		}
	}
	// What Extents leaves out must be the same: mark again and look.
	for e := range d.Extents() {
		copy(a[e.Off:e.Off+e.Length], b[e.Off:])
	}
	if !bytes.Equal(a, b) {
		t.Fatal("the views differ where Extents has nothing")
	}
}

// The stores of a real kernel: what Verified calls changed is where the snapshot's view differs.
func TestKernelStores(t *testing.T) {
	cases := kernelcase.All(t)
	seen := 0
	for _, c := range cases {
		// The second series repeats the first with other chunk sizes and seeds; images take time to unpack.
		if !strings.HasPrefix(c.Name, "s1-") || c.Kernel.Snap == "" || c.Kernel.MergeStatus != "" || c.Store == "N" || c.Header == nil || c.Header.Valid == 0 {
			continue
		}
		seen++
		t.Run(c.Name, func(t *testing.T) { kernelStore(t, c) })
	}
	if seen == 0 {
		t.Error("no case has a store to compare")
	}
}

// kernelStore patches the origin with the snapshot's bytes wherever they are called changed: then it must
// be what the kernel showed as the snapshot.
func kernelStore(t *testing.T, c kernelcase.Case) {
	origin, err := c.Origin()
	if err != nil {
		t.Fatal(err)
	}
	cow, err := c.COW()
	if err != nil {
		t.Fatal(err)
	}
	dev := block.MemoryFrom(origin)
	cowDev := block.MemoryFrom(cow)
	d := made(t)(diff.New(dev, open(t, cowDev)))
	s, err := snapshot.NewOrigin(dev).Attach(cowDev, snapshot.Options{}) // writes nothing unless asked to
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, e := range verified(t, d) {
		if e.Class == diff.Changed {
			if _, err := s.ReadAt(origin[e.Off:e.Off+e.Length], e.Off); err != nil {
				t.Fatal(err)
			}
		}
	}
	if kernelcase.Digest(origin) != c.Kernel.Snap {
		t.Error("the origin with all changed extents put in is not what the kernel showed")
	}
}

// Refused: what can't be known must not look like "no difference".
func TestRefused(t *testing.T) {
	d := newDisk(t, 64<<10)
	s, cow := d.snap(8)
	d.write(s, []byte("x"), 60<<10)
	if _, err := diff.New(block.NewMemory(60<<10), open(t, cow)); err == nil || !strings.Contains(err.Error(), "too small") {
		t.Errorf("an origin that was cut: %v", err)
	}
	st := open(t, cow)
	if err := st.Invalidate(errors.New("for the test")); err != nil {
		t.Fatal(err)
	}
	sound, other := d.snap(8)
	defer sound.Close()
	if _, err := diff.New(d.memory, open(t, cow)); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("an invalid store: %v", err)
	}
	if _, err := diff.Between(d.memory, open(t, other), open(t, cow)); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("an invalid store as second: %v", err)
	}
}

// A failed read ends Verified with its place, after what was known.
func TestReadError(t *testing.T) {
	d := newDisk(t, 8<<20)
	s, cow := d.snap(8)
	d.write(s, []byte("x"), 0)
	d.write(s, []byte("y"), 5<<20)
	bad := errors.New("bad sector")
	faulty := blocktest.NewFaulty(d.memory, func(op blocktest.Op) error {
		if op.Overlaps(5<<20, 4096) {
			return bad
		}
		return nil
	})
	var list []diff.Extent
	var failed error
	for e, err := range made(t)(diff.New(faulty, open(t, cow))).Verified(t.Context()) {
		if failed != nil {
			t.Fatal("it goes on after an error")
		}
		if failed = err; err == nil {
			list = append(list, e)
		}
	}
	want(t, list, "0+512 changed, 512+3584 copied")
	if !errors.Is(failed, bad) || !strings.Contains(failed.Error(), "byte 5242880") {
		t.Errorf("error %v", failed)
	}
}

// The loop over the result may stop at any moment, and a context that ends stops it.
func TestStopping(t *testing.T) {
	d := newDisk(t, 64<<10)
	s, cow := d.snap(8)
	for off := int64(0); off < 64<<10; off += 8192 {
		d.write(s, []byte("x"), off)
	}
	df := made(t)(diff.Between(d.memory, open(t, cow), open(t, cow)))
	for n := 1; n < 10; n++ {
		seen := 0
		for range df.Extents() {
			if seen++; seen == n {
				break
			}
		}
		for range df.Verified(t.Context()) {
			if seen++; seen >= 2*n {
				break
			}
		}
		if seen != min(n, 8)+min(n, 8) {
			t.Errorf("left after %d: %d seen", n, seen)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	for _, err := range df.Verified(ctx) {
		if !errors.Is(err, why) {
			t.Errorf("error %v", err)
		}
	}
}
