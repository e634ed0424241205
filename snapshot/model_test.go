package snapshot_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/model"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// A seed makes a world and a script of random operations, which the engine and the model both go through.
// After every operation its result and all status texts are compared, and what it touched is read back;
// now and then, and at the end, everything is.
//
//	DMSNAP_SEED=123 go test ./snapshot -run TestModel     replays one seed
//	DMSNAP_DEEP=1   go test ./snapshot -run TestModel     goes through many more

// A scriptOp is one operation. Which device it means is decided when it runs, from what there is then, so that
// any part of a script is a script.
type scriptOp struct {
	kind string
	pick int   // which snapshot, modulo how many there are
	at   int64 // sectors, modulo what there is
	n    int64
	x    byte
	opts snapshot.Options
	cow  int64
}

func (o scriptOp) String() string {
	s := fmt.Sprintf("%s pick=%d at=%d n=%d x=%d", o.kind, o.pick, o.at, o.n, o.x)
	if o.kind == "attach" || o.kind == "reopen" || o.kind == "grow" {
		s += fmt.Sprintf(" store=%v chunk=%d cow=%d zeroes=%v sync=%d", o.opts.Store, o.opts.ChunkSectors, o.cow, o.opts.DiscardZeroesCOW, o.opts.Sync)
	}
	return s
}

// frequencies of the kinds of operation.
var kinds = []struct {
	kind   string
	weight int
}{
	{"write", 30}, {"origin write", 30}, {"zero", 5}, {"origin zero", 4}, {"flush", 6}, {"fua", 4}, {"origin fua", 3},
	{"discard", 8}, {"attach", 4}, {"detach", 2}, {"reopen", 5}, {"grow", 3}, {"hand over", 2},
	{"begin merge", 3}, {"step", 14}, {"end merge", 2},
}

// newScript makes a world's size and its operations from a seed.
func newScript(seed uint64) (sectors int64, ops []scriptOp) {
	r := rand.New(rand.NewPCG(seed, 1))
	sectors = 20 + r.Int64N(500)
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	ops = append(ops, scriptOp{kind: "attach", opts: randomOptions(r), cow: randomCOW(r)})
	for range 30 + r.IntN(120) {
		w := r.IntN(total)
		i := 0
		for ; w >= kinds[i].weight; i++ {
			w -= kinds[i].weight
		}
		op := scriptOp{kind: kinds[i].kind, pick: r.IntN(12), at: r.Int64N(1 << 20), n: 1 + r.Int64N(1<<r.IntN(8)), x: byte(1 + r.IntN(255)),
			opts: randomOptions(r), cow: randomCOW(r)}
		if r.IntN(4) == 0 { // whole chunks of all sizes
			op.at, op.n = op.at/64*64, (op.n+63)/64*64
		}
		ops = append(ops, op)
	}
	return sectors, ops
}

func randomOptions(r *rand.Rand) snapshot.Options {
	o := snapshot.Options{ChunkSectors: 1 << r.IntN(7), Store: snapshot.StoreType(r.IntN(3)), Sync: snapshot.SyncMode(r.IntN(2))}
	o.DiscardZeroesCOW = r.IntN(2) == 0
	return o
}

// randomCOW is the size of a COW device, in sectors: large, or soon full.
func randomCOW(r *rand.Rand) int64 {
	if r.IntN(2) == 0 {
		return 4096
	}
	return 128 + r.Int64N(300)
}

// A pairOf is one snapshot in both worlds.
type pairOf struct {
	dev    *snapshot.Snapshot
	model  *model.Snapshot
	memory *block.Memory
	opts   snapshot.Options
}

// A world is an origin with its snapshots, twice.
type world struct {
	disk    *block.Memory
	origin  *snapshot.Origin
	model   *model.Origin
	pairs   []*pairOf
	merging *snapshot.Merging
	merged  *pairOf // whose store is being merged
}

// runScript goes through a script and returns the first difference.
func runScript(sectors int64, ops []scriptOp) (err error) {
	before := blocktest.Pattern(int(sectors*sector), 1)
	w := &world{disk: block.MemoryFrom(bytes.Clone(before)), model: &model.Origin{Raw: before}}
	w.origin = snapshot.NewOrigin(w.disk)
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	for i, op := range ops {
		if err := w.do(op); err != nil {
			return fmt.Errorf("operation %d, %v: %w", i, op, err)
		}
		if err := w.compareStatus(); err != nil {
			return fmt.Errorf("after operation %d, %v: %w", i, op, err)
		}
		if i%16 == 15 {
			if err := w.compareAll(); err != nil {
				return fmt.Errorf("after operation %d, %v: %w", i, op, err)
			}
		}
	}
	return w.finish()
}

// result is an engine's error in the model's words.
func result(err error) (model.Result, error) {
	switch {
	case err == nil:
		return model.OK, nil
	case errors.Is(err, snapshot.ErrOverflow):
		return model.Overflow, nil
	case errors.Is(err, store.ErrInvalid):
		return model.Invalid, nil
	}
	return 0, err
}

func wantResult(err error, want model.Result) error {
	got, other := result(err)
	if other != nil {
		return other
	}
	if got != want {
		return fmt.Errorf("the engine says %v (%v), the model %v", got, err, want)
	}
	return nil
}

// noise is n sectors, each different.
func noise(n int64, x byte) []byte {
	b := make([]byte, n*sector)
	for i := range b {
		b[i] = x + byte(i/sector)*31
	}
	return b
}

// do carries out one operation in both worlds. What there is nothing for is left out.
func (w *world) do(op scriptOp) error {
	size := w.disk.Size() / sector
	op.at %= size
	op.n = min(op.n, size-op.at)
	off, data := op.at*sector, noise(op.n, op.x)
	switch op.kind {
	case "origin write", "origin zero", "origin fua":
		err := putKind(w.origin, strings.TrimPrefix(op.kind, "origin "), data, off)
		w.model.Write(op.at, data)
		if err != nil {
			return err
		}
		return w.compareRange(op.at, op.n)
	case "attach":
		return w.attach(op)
	case "begin merge", "step", "end merge":
		return w.merge(op)
	}
	if len(w.pairs) == 0 {
		return nil
	}
	p := w.pairs[op.pick%len(w.pairs)]
	switch op.kind {
	case "write", "zero", "fua":
		err := putKind(p.dev, op.kind, data, off)
		if err := wantResult(err, p.model.Write(op.at, data)); err != nil {
			return err
		}
	case "flush":
		return p.dev.Flush() // succeeds whatever the state
	case "discard":
		undefined, want := p.model.Discard(op.at, op.n)
		if err := wantResult(p.dev.Discard(off, op.n*sector), want); err != nil {
			return err
		}
		for _, u := range undefined {
			b := make([]byte, (u[1]-u[0])*sector)
			if _, err := p.dev.ReadAt(b, u[0]*sector); err != nil {
				return err
			}
			if !p.model.Adopt(u[0], b) {
				return fmt.Errorf("a discarded part shows neither what was there nor zeros")
			}
		}
	case "detach":
		w.forget(p)
		w.model.Detach(p.model)
		return p.close()
	case "reopen":
		return w.reopen(p, op)
	case "grow":
		if err := p.memory.Grow((p.model.COW + op.cow) * sector); err != nil {
			return err
		}
		p.model.COW += op.cow
	case "hand over":
		return w.handOver(p, op)
	}
	return w.compareRange(op.at, op.n)
}

// putKind makes a write of a kind, which may replace data by zeros.
func putKind(dev interface {
	block.Device
	block.Zeroer
	block.DurableWriter
}, kind string, data []byte, off int64) error {
	switch kind {
	case "zero":
		clear(data)
		return dev.ZeroAt(off, int64(len(data)), 0)
	case "fua":
		return dev.WriteDurableAt(data, off)
	}
	_, err := dev.WriteAt(data, off)
	return err
}

// attach adds a snapshot with an empty store, at most four.
func (w *world) attach(op scriptOp) error {
	if len(w.pairs) == 4 || w.merging != nil { // not of a mixture
		return nil
	}
	p := &pairOf{memory: block.NewMemory(op.cow * sector), opts: op.opts}
	var err error
	if p.dev, err = w.origin.Attach(p.memory, p.opts); err != nil {
		return err
	}
	p.model = &model.Snapshot{Chunk: int64(op.opts.ChunkSectors), COW: op.cow, Store: op.opts.Store.String(), Zeroes: op.opts.DiscardZeroesCOW}
	w.model.Attach(p.model)
	w.pairs = append(w.pairs, p)
	return nil
}

func (w *world) forget(p *pairOf) {
	for i := range w.pairs {
		if w.pairs[i] == p {
			w.pairs = append(w.pairs[:i:i], w.pairs[i+1:]...)
			return
		}
	}
}

// close ends the engine's snapshot and checks its store.
func (p *pairOf) close() error {
	if err := p.dev.Close(); err != nil {
		return err
	}
	if p.opts.Store == snapshot.Transient {
		return nil
	}
	return p.check()
}

// check wants a sound store on the COW device, with the model's exceptions.
func (p *pairOf) check() error {
	s, err := store.Open(p.memory)
	if err != nil {
		return fmt.Errorf("the store is not sound: %w", err)
	}
	if valid := s.Err() == nil; valid != p.model.Valid() {
		return fmt.Errorf("the store on disk is valid: %v, the model's: %v", valid, p.model.Valid())
	} else if valid && s.Len() != uint64(p.model.Exceptions()) {
		return fmt.Errorf("the store on disk has %d exceptions, the model %d", s.Len(), p.model.Exceptions())
	}
	return nil
}

// reopen closes a snapshot and loads its store again, without a request in between.
func (w *world) reopen(p *pairOf, op scriptOp) (err error) {
	if err := p.close(); err != nil {
		return err
	}
	w.model.Detach(p.model)
	o := op.opts
	o.ChunkSectors = p.opts.ChunkSectors
	if p.opts.Store == snapshot.Transient {
		o.Store = snapshot.Transient
	} else if o.Store == snapshot.Transient {
		o.Store = p.opts.Store
	}
	p.opts = o
	p.model.Reopen()
	p.model.Store, p.model.Zeroes = o.Store.String(), o.DiscardZeroesCOW
	p.dev, err = w.origin.Attach(p.memory, o)
	return err
}

// handOver loads a second table on the same COW device and moves the store there.
func (w *world) handOver(p *pairOf, op scriptOp) error {
	next, err := w.origin.Load(p.memory, op.opts)
	if err != nil {
		return err
	}
	if err := p.dev.Suspend(); err != nil {
		return err
	}
	if err := next.Resume(); err != nil {
		return err
	}
	old := p.dev
	p.dev = next
	p.opts.Sync, p.opts.DiscardZeroesCOW = op.opts.Sync, op.opts.DiscardZeroesCOW
	if p.opts.Store != snapshot.Transient && op.opts.Store != snapshot.Transient {
		p.opts.Store = op.opts.Store // the O counts
	}
	p.model.Store, p.model.Zeroes = p.opts.Store.String(), p.opts.DiscardZeroesCOW
	return old.Close()
}

// merge begins a merge, makes a step, or ends it before it is complete and loads it again, as one or the
// other.
func (w *world) merge(op scriptOp) error {
	switch {
	case op.kind == "begin merge" && w.merging == nil && len(w.pairs) > 0:
		p := w.pairs[op.pick%len(w.pairs)]
		if !p.model.Valid() {
			return nil
		}
		can := w.model.BeginMerge(p.model)
		m, err := p.dev.BeginMerge()
		if (err == nil) != can {
			return fmt.Errorf("begin: %v, the model says %v", err, can)
		}
		if err != nil {
			return nil
		}
		w.merging, w.merged = m, p
		w.forget(p)
		if err := p.dev.Close(); err != nil {
			return err
		}
		return w.compareAll()
	case op.kind == "step" && w.merging != nil:
		max := int64(op.pick) * int64(op.pick) // 0: the kernel's run
		want := w.model.Step(max)
		got, err := w.merging.Step(uint64(max))
		if err != nil || int64(got) != want {
			return fmt.Errorf("step of at most %d: %d, %v; the model merged %d", max, got, err, want)
		}
		return nil
	case op.kind == "end merge" && w.merging != nil:
		if err := w.merging.Close(); err != nil {
			return err
		}
		w.model.EndMerge()
		p := w.merged
		w.merging, w.merged = nil, nil
		if err := p.check(); err != nil {
			return err
		}
		if p.model.Exceptions() == 0 {
			return nil // complete
		}
		// What is left is loaded again, with no request in between: as a snapshot first.
		p.model.Reopen()
		var err error
		if p.dev, err = w.origin.Attach(p.memory, p.opts); err != nil {
			return err
		}
		w.pairs = append(w.pairs, p)
		if err := w.compareAll(); err != nil {
			return err
		}
		op.kind, op.pick = "begin merge", len(w.pairs)-1
		return w.merge(op)
	}
	return nil
}

// compareStatus holds every status text against the model's.
func (w *world) compareStatus() error {
	for i, p := range w.pairs {
		if got, want := p.dev.Status().Text(), p.model.Status(); got != want {
			return fmt.Errorf("snapshot %d: status %q, the model's %q", i, got, want)
		}
		if got := p.dev.Status().Exceptions; p.model.Valid() && got != uint64(p.model.Exceptions()) {
			return fmt.Errorf("snapshot %d: %d exceptions, the model's %d", i, got, p.model.Exceptions())
		}
	}
	if w.merging != nil {
		if got, want := w.merging.Status().Text(), w.merged.model.Status(); got != want {
			return fmt.Errorf("merge: status %q, the model's %q", got, want)
		}
	}
	return nil
}

// compareRange reads a range, and a little around it, from all devices.
func (w *world) compareRange(at, n int64) error {
	from := max(at-70, 0)
	to := min(at+n+70, w.disk.Size()/sector)
	got := make([]byte, (to-from)*sector)
	if _, err := w.origin.ReadAt(got, from*sector); err != nil {
		return err
	}
	if want := w.model.Read(from, to-from); !bytes.Equal(got, want) {
		return fmt.Errorf("the origin differs in sector %d", from+int64(firstDifference(got, want)/sector))
	}
	for i, p := range w.pairs {
		want, result := p.model.Read(from, to-from)
		_, err := p.dev.ReadAt(got, from*sector)
		if err := wantResult(err, result); err != nil {
			return fmt.Errorf("read snapshot %d: %w", i, err)
		}
		if err == nil && !bytes.Equal(got, want) {
			return fmt.Errorf("snapshot %d differs in sector %d", i, from+int64(firstDifference(got, want)/sector))
		}
	}
	return nil
}

// compareAll reads everything.
func (w *world) compareAll() error { return w.compareRange(0, w.disk.Size()/sector) }

// finish completes a merge that is under way, closes everything, and looks at what is on the disks.
func (w *world) finish() error {
	if err := w.compareAll(); err != nil {
		return fmt.Errorf("at the end: %w", err)
	}
	for w.merging != nil {
		want := w.model.Step(5)
		got, err := w.merging.Step(5)
		if err != nil || int64(got) != want {
			return fmt.Errorf("last steps: %d, %v; the model merged %d", got, err, want)
		}
		if got == 0 {
			if err := w.merge(scriptOp{kind: "end merge"}); err != nil {
				return err
			}
		}
	}
	if err := w.compareAll(); err != nil {
		return fmt.Errorf("after the merge: %w", err)
	}
	for _, p := range w.pairs {
		if err := w.reopen(p, scriptOp{opts: p.opts}); err != nil {
			return err
		}
	}
	if err := errors.Join(w.compareStatus(), w.compareAll()); err != nil {
		return fmt.Errorf("reopened: %w", err)
	}
	for _, p := range w.pairs {
		if err := p.close(); err != nil {
			return err
		}
	}
	if !bytes.Equal(w.disk.Bytes(), w.model.Raw) {
		return errors.New("the origin's disk differs")
	}
	return nil
}

// shrink leaves out operations as long as the script still fails.
func shrink(sectors int64, ops []scriptOp) []scriptOp {
	for size := len(ops) / 2; size > 0; size /= 2 {
		for i := 0; i+size <= len(ops); {
			shorter := append(append([]scriptOp(nil), ops[:i]...), ops[i+size:]...)
			if runScript(sectors, shorter) != nil {
				ops = shorter
			} else {
				i += size
			}
		}
	}
	return ops
}

// seeds returns the seeds to go through: one that was asked for, or so many; many times as many when asked to
// be thorough.
func seeds(t *testing.T, n int) []uint64 {
	t.Helper()
	if text := os.Getenv("DMSNAP_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return []uint64{seed}
	}
	if os.Getenv("DMSNAP_DEEP") != "" {
		n *= 200
	}
	list := make([]uint64, n)
	for i := range list {
		list[i] = uint64(i + 1)
	}
	return list
}

func TestModel(t *testing.T) {
	done := 0
	for _, seed := range seeds(t, 400) {
		sectors, ops := newScript(seed)
		done += len(ops)
		if err := runScript(sectors, ops); err != nil {
			ops = shrink(sectors, ops)
			var lines strings.Builder
			for _, op := range ops {
				fmt.Fprintf(&lines, "  %v\n", op)
			}
			t.Fatalf("seed %d: %v\nreplay: DMSNAP_SEED=%d go test ./snapshot -run 'TestModel$'\nshrunk: origin of %d sectors\n%sthat says: %v",
				seed, err, seed, sectors, lines.String(), runScript(sectors, ops))
		}
	}
	t.Logf("%d operations", done)
}
