package stack_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/stack"
	"github.com/dmsnap/dmsnap/store"
)

func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }

// newStore returns an empty store with space for every chunk of a disk of size bytes, and its COW device.
func newStore(t testing.TB, sectors uint32, size int64) (*store.Store, *block.Memory) {
	t.Helper()
	l := ondisk.Layout{ChunkSectors: sectors}
	cow := block.NewMemory(int64(l.ChunksNeeded(l.Chunks(size, true))) * l.ChunkBytes())
	st, err := store.Create(cow, l, false)
	if err != nil {
		t.Fatal(err)
	}
	return st, cow
}

// keep stores origin chunk old in st.
func keep(t testing.TB, st *store.Store, old ondisk.OriginChunk, content []byte) {
	t.Helper()
	r, err := st.Reserve(old, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Device().WriteAt(content, st.Layout().COWOffset(r.New)); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(); err != nil {
		t.Fatal(err)
	}
}

// A world is a chain that grows, and the content that each chain on the way must have.
type world struct {
	r       *rand.Rand
	stores  []*store.Store
	chains  []*stack.Chain
	content [][]byte
	held    [][]bool // by layer: which bytes it holds
}

func newWorld(seed uint64) *world {
	w := &world{r: rand.New(rand.NewPCG(seed, 7))}
	base := blocktest.Pattern(512*(100+w.r.IntN(200)), seed)
	clear(base[w.r.IntN(len(base)):])
	size := len(base) + 512*w.r.IntN(3)*w.r.IntN(100)
	w.chains = []*stack.Chain{stack.New(block.MemoryFrom(bytes.Clone(base)), int64(size))}
	w.content = [][]byte{append(base, make([]byte, size-len(base))...)}
	return w
}

// add puts a random layer on top, of chunks of the given size.
func (w *world) add(t testing.TB, sectors uint32) {
	top := w.chains[len(w.chains)-1]
	now := bytes.Clone(w.content[len(w.content)-1])
	if w.r.IntN(5) == 0 { // a longer disk
		now = append(now, make([]byte, 512*w.r.IntN(40))...)
	}
	st, _ := newStore(t, sectors, int64(len(now)))
	l := st.Layout()
	held := make([]bool, len(now))
	n := w.r.IntN(1 + w.r.IntN(60))
	for range n {
		old := ondisk.OriginChunk(w.r.Uint64N(l.Chunks(int64(len(now)), true)))
		if w.r.IntN(3) == 0 { // in a row
			old = min(ondisk.OriginChunk(st.Len()), old)
		}
		if _, stored := st.Lookup(old); stored {
			continue
		}
		chunk := blocktest.Pattern(int(l.ChunkBytes()), w.r.Uint64()) // longer than what is left of the disk, at its end
		keep(t, st, old, chunk)
		from := l.OriginOffset(old)
		k := copy(now[from:], chunk)
		for i := range k {
			held[from+int64(i)] = true
		}
	}
	w.stores = append(w.stores, st)
	w.chains = append(w.chains, top.With(stack.NewLayer(st), int64(len(now))))
	w.content = append(w.content, now)
	w.held = append(w.held, held)
}

// check compares everything that chain i shows with what it must show.
func (w *world) check(t *testing.T, i int) {
	t.Helper()
	c, want := w.chains[i], w.content[i]
	if c.Size() != int64(len(want)) || len(c.Layers()) != i {
		t.Fatalf("chain %d has %d bytes and %d layers, want %d", i, c.Size(), len(c.Layers()), len(want))
	}
	got := make([]byte, len(want))
	if _, err := c.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if at := differ(got, want); at >= 0 {
		t.Fatalf("chain %d: byte %d is %#x, want %#x", i, at, got[at], want[at])
	}
	for range 20 {
		off := w.r.IntN(len(want))
		part := make([]byte, 1+w.r.IntN(min(len(want)-off, 9000)))
		if _, err := c.ReadAt(part, int64(off)); err != nil || !bytes.Equal(part, want[off:off+len(part)]) {
			t.Fatalf("chain %d: %d bytes at %d: %v, or other bytes than the whole has", i, len(part), off, err)
		}
		byPlace := bytes.Repeat([]byte{0xa5}, len(part))
		for done := 0; done < len(part); {
			dev, at, n, stored := c.Place(int64(off+done), int64(len(part)-done))
			if dev == nil {
				clear(byPlace[done:][:n])
			} else if _, err := dev.ReadAt(byPlace[done:][:n], at); err != nil {
				t.Fatal(err)
			}
			if stored == (dev == nil || dev == c.Base()) {
				t.Fatalf("chain %d: byte %d: stored is %v", i, off+done, stored)
			}
			done += int(n)
		}
		if !bytes.Equal(byPlace, part) {
			t.Fatalf("chain %d: the places of %d bytes at %d hold other bytes", i, len(part), off)
		}
	}
	w.checkSince(t, w.r.IntN(i+1), i)
	w.checkSince(t, 0, i)
}

// checkSince compares what chain i holds above another.
func (w *world) checkSince(t *testing.T, lower, i int) {
	t.Helper()
	size := len(w.content[i])
	want := make([]bool, size)
	for _, held := range w.held[lower:i] {
		for at, h := range held {
			want[at] = want[at] || h
		}
	}
	from := w.r.IntN(size)
	n := w.r.IntN(size-from) + 1
	if w.r.IntN(3) == 0 {
		from, n = 0, size+1000
	}
	got := make([]bool, size)
	last := int64(-1)
	for r := range w.chains[i].StoredSince(w.chains[lower], int64(from), int64(n)) {
		if r.Length <= 0 || r.Off <= last || r.Off < int64(from) || r.Off+r.Length > int64(min(from+n, size)) {
			t.Fatalf("chain %d since %d: range %v in %d+%d", i, lower, r, from, n)
		}
		last = r.Off + r.Length // at least one byte between two ranges
		for at := r.Off; at < last; at++ {
			got[at] = true
		}
	}
	end := min(from+n, size)
	if !slices.Equal(got[from:end], want[from:end]) {
		t.Fatalf("chain %d since %d: %d+%d: other ranges than the layers hold", i, lower, from, n)
	}
}

func differ(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// close checks the stores.
func (w *world) close(t *testing.T) {
	t.Helper()
	for i, st := range w.stores {
		if err := st.Sync(); err != nil {
			t.Fatal(err)
		}
		again, err := store.Open(st.Device())
		if err != nil || again.Len() != st.Len() {
			t.Fatalf("layer %d: %v, or not its %d exceptions", i, err, st.Len())
		}
	}
}

// TestRandom: whatever layers there are and whatever was merged, each chain shows what it must, and the ones below still
// do.
func TestRandom(t *testing.T) {
	seeds := uint64(8)
	if testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		w := newWorld(seed)
		sizes := []uint32{8}
		if seed%3 == 0 {
			sizes = []uint32{1, 8, 2}
		}
		for range 4 + w.r.IntN(12) {
			w.add(t, sizes[w.r.IntN(len(sizes))])
			for w.r.IntN(2) == 0 && w.chains[w.r.IntN(len(w.chains))].Compact() {
			}
			w.check(t, w.r.IntN(len(w.chains)))
		}
		for i := range w.chains {
			if w.r.IntN(2) == 0 {
				for w.chains[i].Compact() {
				}
			}
			w.check(t, i)
		}
		w.close(t)
	}
}

// TestSuite: a chain passes the reading half of the suite of devices.
func TestSuite(t *testing.T) {
	for _, compacted := range []bool{false, true} {
		blocktest.RunReadOnly(t, func(t *testing.T) block.Device {
			w := newWorld(5)
			for range 9 {
				w.add(t, 8)
			}
			top := w.chains[len(w.chains)-1]
			for compacted && top.Compact() {
			}
			t.Cleanup(func() { w.close(t) })
			return top
		})
	}
}

// TestCompactWhileRead: reads of several chains return the same while all of them are compacted.
func TestCompactWhileRead(t *testing.T) {
	w := newWorld(3)
	for range 16 {
		w.add(t, 8)
	}
	var compacting, reading sync.WaitGroup
	done := make(chan struct{})
	for i, c := range w.chains {
		compacting.Go(func() {
			for c.Compact() {
			}
		})
		reading.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(i)))
			got := make([]byte, len(w.content[i]))
			for last := false; !last; {
				select {
				case <-done:
					last = true
				default:
				}
				part := got[r.IntN(len(got)):]
				if _, err := c.ReadAt(part, int64(len(got)-len(part))); err != nil || !bytes.Equal(part, w.content[i][len(got)-len(part):]) {
					t.Errorf("chain %d: %v, or other bytes", i, err)
					return
				}
			}
		})
	}
	compacting.Wait()
	close(done)
	reading.Wait()
	for i := range w.chains {
		w.check(t, i)
	}
	w.close(t)
}

// TestLostData: while a layer is not durable, what its store lost is an error, and never shown.
func TestLostData(t *testing.T) {
	const size = 64 << 10
	l := ondisk.Layout{ChunkSectors: 8}
	faulty := blocktest.NewFaulty(block.NewMemory(1<<20), nil)
	st, err := store.Create(faulty, l, false)
	if err != nil {
		t.Fatal(err)
	}
	keep(t, st, 3, blocktest.Pattern(4096, 1))
	if err := st.Sync(); err != nil {
		t.Fatal(err)
	}
	keep(t, st, 5, blocktest.Pattern(4096, 2))
	c := stack.New(block.NewMemory(size), size).With(stack.NewLayer(st), size)
	faulty.Set(blocktest.FailKind(blocktest.Flush, errors.New("no")))
	if err := st.Sync(); err == nil {
		t.Fatal("the flush did not fail")
	}
	p := make([]byte, 512)
	if _, err := c.ReadAt(p, 3*4096); err != nil {
		t.Errorf("a chunk that was durable: %v", err)
	}
	if _, err := c.ReadAt(p, 5*4096); !errors.Is(err, store.ErrDataLost) {
		t.Errorf("a chunk that was lost: %v", err)
	}
	if _, err := store.Open(faulty); err != nil {
		t.Error(err)
	}
}

// TestSizes: a chain is never shorter than what is below.
func TestSizes(t *testing.T) {
	st, _ := newStore(t, 8, 8192)
	for name, do := range map[string]func(){
		"base":  func() { stack.New(block.NewMemory(8192), 8191) },
		"chain": func() { stack.New(block.NewMemory(4096), 8192).With(stack.NewLayer(st), 4096) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			do()
		}()
	}
}
