package stream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
	"github.com/dmsnap/dmsnap/stream"
)

// A history is an origin with two snapshots, taken one after the other, and what each shows.
type history struct {
	origin    *block.Memory
	cows      [2]*block.Memory
	stores    [2]*store.Store
	states    [2][]byte // what the snapshots show
	originHas []byte
}

// newHistory writes at random to an origin of size bytes and to its snapshots, in chunks of the given number of
// sectors.
func newHistory(t *testing.T, seed uint64, size int64, sectors uint32) *history {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	h := &history{origin: block.NewMemory(size)}
	write := func(dev block.Device) {
		for range r.IntN(12) {
			off := r.Int64N(size/512) * 512
			p := blocktest.Pattern(int(min(size-off, 512*(1+r.Int64N(40)))), r.Uint64())
			if r.IntN(4) == 0 {
				clear(p)
			}
			if _, err := dev.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
	}
	o := snapshot.NewOrigin(h.origin)
	write(o)
	var snaps [2]*snapshot.Snapshot
	for i := range snaps {
		var err error
		h.cows[i] = block.NewMemory(4 * size)
		if snaps[i], err = o.Attach(h.cows[i], snapshot.Options{ChunkSectors: sectors}); err != nil {
			t.Fatal(err)
		}
		write(snaps[i])
		write(o)
	}
	for i, s := range snaps {
		h.states[i] = contentOf(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		rep, err := check.Run(context.Background(), h.cows[i], check.Options{Origin: h.origin})
		if err != nil || !rep.Clean() {
			t.Fatal("the store is not sound:", rep, err)
		}
		if h.stores[i], err = store.OpenToRead(h.cows[i]); err != nil {
			t.Fatal(err)
		}
	}
	h.originHas = contentOf(t, h.origin)
	return h
}

func contentOf(t testing.TB, dev block.Device) []byte {
	t.Helper()
	p := make([]byte, dev.Size())
	if _, err := dev.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func deviceWith(t testing.TB, content []byte) *block.Memory {
	t.Helper()
	dev := block.NewMemory(int64(len(content)))
	for off := 0; off < len(content); off += 4096 { // zeros stay holes
		p := content[off:min(off+4096, len(content))]
		if bytes.Count(p, []byte{0}) == len(p) {
			continue
		}
		if _, err := dev.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	return dev
}

func sent(t testing.TB, from *stream.Source, o stream.SendOptions) []byte {
	t.Helper()
	var b bytes.Buffer
	count, err := stream.Send(context.Background(), &b, from, o)
	if err != nil {
		t.Fatal(err)
	}
	r, err := stream.NewReader(bytes.NewReader(b.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.Check(context.Background(), nil, nil)
	if err != nil || got.Count != count {
		t.Fatalf("checked: %+v, %v; sent %+v", got.Count, err, count)
	}
	return b.Bytes()
}

func apply(target block.Device, s []byte, o stream.ApplyOptions) (stream.Applied, error) {
	r, err := stream.NewReader(bytes.NewReader(s))
	if err != nil {
		return stream.Applied{}, err
	}
	return r.Apply(context.Background(), target, o)
}

func mustApply(t testing.TB, target block.Device, s []byte, o stream.ApplyOptions, want []byte) stream.Applied {
	t.Helper()
	got, err := apply(target, s, o)
	if err != nil {
		t.Fatal(err)
	}
	if at := firstDifference(contentOf(t, target), want); at >= 0 {
		t.Fatalf("the target differs at byte %d", at)
	}
	return got
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// Random histories: a copy of what was becomes a copy of what is, by each kind of stream; the same stream once more
// changes nothing.
func TestRandomHistories(t *testing.T) {
	rounds := uint64(60)
	if testing.Short() {
		rounds = 20
	}
	for seed := range rounds {
		r := rand.New(rand.NewPCG(seed, 2))
		size := 512 * (200 + r.Int64N(400)) // the last block may be short
		h := newHistory(t, seed, size, 1<<r.IntN(6))
		o := stream.SendOptions{Plain: r.IntN(2) == 0, DropUnchanged: r.IntN(2) == 0}
		for _, c := range []struct {
			old, new   *store.Store
			from, want []byte
		}{
			{nil, h.stores[0], h.originHas, h.states[0]},
			{h.stores[0], h.stores[1], h.states[0], h.states[1]},
			{h.stores[1], nil, h.states[1], h.originHas},
		} {
			from, err := stream.Between(h.origin, c.old, c.new)
			if err != nil {
				t.Fatal(err)
			}
			s := sent(t, from, o)
			target := deviceWith(t, c.from)
			first := mustApply(t, target, s, stream.ApplyOptions{}, c.want)
			again := mustApply(t, target, s, stream.ApplyOptions{}, c.want)
			if again.Written != 0 || again.Present != again.Data+again.Zero || first.Written+first.Present != again.Present {
				t.Fatalf("seed %d: first %+v, again %+v", seed, first, again)
			}
		}
		s := sent(t, stream.Whole(h.origin), o)
		target := block.NewMemory(size)
		mustApply(t, target, s, stream.ApplyOptions{}, h.originHas)
		if target.Allocated() > h.origin.Allocated() {
			t.Errorf("seed %d: %d bytes are allocated, of the origin %d", seed, target.Allocated(), h.origin.Allocated())
		}
		mustApply(t, target, s, stream.ApplyOptions{}, h.originHas)
		noise := deviceWith(t, blocktest.Pattern(int(size), seed))
		mustApply(t, noise, s, stream.ApplyOptions{Force: true}, h.originHas)
	}
}

// A stream that is cut at any byte is refused; what it wrote until then is old or new, block by block, and the whole
// stream finishes it.
func TestCutAnywhere(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	h := newHistory(t, 3, 24<<10, 8)
	from, err := stream.Between(h.origin, h.stores[0], h.stores[1])
	if err != nil {
		t.Fatal(err)
	}
	s := sent(t, from, stream.SendOptions{})
	for n := range s {
		target := deviceWith(t, h.states[0])
		_, err := apply(target, s[:n], stream.ApplyOptions{CompareFirst: 1})
		if !errors.Is(err, stream.ErrFormat) {
			t.Fatalf("cut at byte %d: %v", n, err)
		}
		oldOrNew(t, contentOf(t, target), h.states[0], h.states[1], stream.Block)
		mustApply(t, target, s, stream.ApplyOptions{}, h.states[1])
	}
	if _, err := apply(deviceWith(t, h.states[0]), append(bytes.Clone(s), 0), stream.ApplyOptions{}); !errors.Is(err, stream.ErrFormat) {
		t.Errorf("a byte behind the end: %v", err)
	}
}

func oldOrNew(t testing.TB, has, old, new []byte, unit int) {
	t.Helper()
	for off := 0; off < len(has); off += unit {
		end := min(off+unit, len(has))
		if p := has[off:end]; !bytes.Equal(p, old[off:end]) && !bytes.Equal(p, new[off:end]) {
			t.Fatalf("byte %d is neither old nor new", off)
		}
	}
}

// Each changed bit of a stream is noticed before its frame is used.
func TestChangedAnywhere(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	h := newHistory(t, 5, 24<<10, 8)
	from, err := stream.Between(h.origin, h.stores[0], h.stores[1])
	if err != nil {
		t.Fatal(err)
	}
	for _, plain := range []bool{false, true} {
		s := sent(t, from, stream.SendOptions{Plain: plain})
		for at := range s {
			bad := bytes.Clone(s)
			bad[at] ^= 1 << (at % 8)
			target := deviceWith(t, h.states[0])
			if _, err := apply(target, bad, stream.ApplyOptions{}); !errors.Is(err, stream.ErrFormat) {
				t.Fatalf("byte %d of %d changed: %v", at, len(s), err)
			}
			oldOrNew(t, contentOf(t, target), h.states[0], h.states[1], stream.Block)
		}
	}
}

// Whole frames that are left out, repeated or exchanged are noticed, although each has its digest.
func TestFramesThatMove(t *testing.T) {
	size := int64(5 << 20)
	disk := deviceWith(t, blocktest.Pattern(int(size), 9))
	s := sent(t, stream.Whole(disk), stream.SendOptions{Plain: true})
	frames := framesOf(t, s)
	if len(frames) < 6 {
		t.Fatalf("only %d frames", len(frames))
	}
	for name, order := range map[string][]int{
		"left out": {0, 2, 3, 4, 5}, "repeated": {0, 1, 1, 2, 3, 4, 5}, "exchanged": {0, 2, 1, 3, 4, 5}, "no end": {0, 1, 2, 3, 4},
	} {
		bad := bytes.Clone(s[:frames[0]])
		for _, i := range order {
			bad = append(bad, s[frames[i]:frames[i+1]]...)
		}
		target := block.NewMemory(size)
		if _, err := apply(target, bad, stream.ApplyOptions{}); !errors.Is(err, stream.ErrFormat) && !errors.As(err, new(*stream.MismatchError)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// framesOf returns where the frames begin, and the end.
func framesOf(t *testing.T, s []byte) (starts []int) {
	t.Helper()
	number := func(at int) int {
		return int(s[at]) | int(s[at+1])<<8 | int(s[at+2])<<16 | int(s[at+3])<<24
	}
	at := 20 + number(16) + 16
	for at < len(s) {
		starts = append(starts, at)
		at += 32 + number(at+4) + number(at+12)
	}
	return append(starts, at)
}

// A target that is another disk is refused with the place, untouched.
func TestWrongTarget(t *testing.T) {
	h := newHistory(t, 7, 512<<10, 8)
	from, err := stream.Between(h.origin, h.stores[0], h.stores[1])
	if err != nil {
		t.Fatal(err)
	}
	s := sent(t, from, stream.SendOptions{DropUnchanged: true})
	var mismatch *stream.MismatchError
	changed := 0
	for off := 0; off < len(h.originHas); off += stream.Block {
		wrong := bytes.Clone(h.states[0])
		wrong[off+stream.Block/2] ^= 1
		blockChanges := !bytes.Equal(h.states[0][off:off+stream.Block], h.states[1][off:off+stream.Block])
		target := deviceWith(t, wrong)
		_, err := apply(target, s, stream.ApplyOptions{})
		if !blockChanges {
			if err != nil {
				t.Fatalf("byte %d, which the stream does not replace: %v", off, err)
			}
			continue
		}
		changed++
		if !errors.As(err, &mismatch) || mismatch.Off != int64(off) {
			t.Fatalf("byte %d: %v", off, err)
		}
		if !bytes.Equal(contentOf(t, target), wrong) {
			t.Fatalf("byte %d: the target was written to", off)
		}
		r, err := stream.NewReader(bytes.NewReader(s))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := r.Check(context.Background(), target, nil); err != nil || got.FirstWrong != int64(off) || got.Differs != stream.Block {
			t.Fatalf("byte %d: Check %+v, %v", off, got, err)
		}
	}
	if changed == 0 {
		t.Fatal("nothing changed")
	}
	if _, err := apply(block.NewMemory(1<<20), s, stream.ApplyOptions{}); !errors.Is(err, stream.ErrSize) {
		t.Errorf("another size: %v", err)
	}
}

// What is compared before anything is written is counted in bytes of records, however far apart they are.
func TestWrongTargetFarApart(t *testing.T) {
	const size, step, run = 512 << 20, 16 << 20, 64 << 10
	old, new := block.NewMemory(size), block.NewMemory(size)
	for off := int64(0); off < size; off += step {
		if _, err := new.WriteAt(blocktest.Pattern(run, uint64(off)), off); err != nil {
			t.Fatal(err)
		}
	}
	s := sent(t, stream.Of(old, new, func(off, n int64) ([]block.Extent, error) {
		if at := off % step; at >= run {
			return []block.Extent{{Length: min(n, step-at)}}, nil
		}
		return []block.Extent{{Length: run, Flags: 1}}, nil
	}), stream.SendOptions{Plain: true})
	if len(s) < size/step*run {
		t.Fatalf("a stream of %d bytes", len(s))
	}
	if _, err := old.WriteAt([]byte{1}, size-step); err != nil {
		t.Fatal(err)
	}
	var mismatch *stream.MismatchError
	got, err := apply(old, s, stream.ApplyOptions{})
	if !errors.As(err, &mismatch) || mismatch.Off != size-step || got.Written != 0 {
		t.Errorf("%v, %d bytes were written", err, got.Written)
	}
}

// A whole disk goes to zeros only, also behind its last record.
func TestWholeDiskWantsZeros(t *testing.T) {
	size := int64(1 << 20)
	disk := block.NewMemory(size)
	if _, err := disk.WriteAt(blocktest.Pattern(8192, 1), 64<<10); err != nil {
		t.Fatal(err)
	}
	s := sent(t, stream.Whole(disk), stream.SendOptions{})
	for _, off := range []int64{0, 60 << 10, 64 << 10, 72 << 10, size - 1} {
		target := block.NewMemory(size)
		if _, err := target.WriteAt([]byte{1}, off); err != nil {
			t.Fatal(err)
		}
		before := contentOf(t, target)
		var mismatch *stream.MismatchError
		if _, err := apply(target, s, stream.ApplyOptions{}); !errors.As(err, &mismatch) || mismatch.Off/stream.Block != off/stream.Block {
			t.Errorf("byte %d: %v", off, err)
		}
		if !bytes.Equal(contentOf(t, target), before) {
			t.Errorf("byte %d: the target was written to", off)
		}
		mustApply(t, target, s, stream.ApplyOptions{Force: true}, contentOf(t, disk))
	}
}

// Power fails while a stream is applied: sectors are written in any order. The same stream finishes it.
func TestPowerCutWhileReceiving(t *testing.T) {
	h := newHistory(t, 11, 64<<10, 8)
	from, err := stream.Between(h.origin, h.stores[0], h.stores[1])
	if err != nil {
		t.Fatal(err)
	}
	s := sent(t, from, stream.SendOptions{})
	var power blocktest.Power
	target := power.NewCrash("target", h.states[0])
	images, torn := 0, int64(0)
	power.Observe(func(blocktest.Op) {
		for i := range power.Cut().Images(blocktest.Choices{Random: 10, Seed: uint64(images)}) {
			images++
			disk := deviceWith(t, i.Disk(target))
			torn += mustApply(t, disk, s, stream.ApplyOptions{}, h.states[1]).Repaired
		}
	})
	if _, err := apply(target, s, stream.ApplyOptions{}); err != nil {
		t.Fatal(err)
	}
	if images < 100 || torn == 0 {
		t.Fatalf("%d images, %d bytes of torn blocks", images, torn)
	}
	if !bytes.Equal(target.Durable(), h.states[1]) {
		t.Error("Apply returned before the target was durable")
	}
}

// A sender that begins where a receiver stopped.
func TestResume(t *testing.T) {
	size := int64(8 << 20)
	content := blocktest.Pattern(int(size), 21)
	s := sent(t, stream.Whole(deviceWith(t, content)), stream.SendOptions{})
	target := block.NewMemory(size)
	got, err := apply(target, s[:len(s)/2], stream.ApplyOptions{CompareFirst: 1})
	if !errors.Is(err, stream.ErrFormat) || got.Reached == 0 || got.Reached == size {
		t.Fatalf("cut: %+v, %v", got, err)
	}
	rest := sent(t, stream.Whole(deviceWith(t, content)), stream.SendOptions{From: got.Reached})
	if len(rest) >= len(s)*3/4 {
		t.Errorf("the rest has %d bytes of %d", len(rest), len(s))
	}
	mustApply(t, target, rest, stream.ApplyOptions{}, content)
}

// Failures of either side surface, and nothing is called done.
func TestFailures(t *testing.T) {
	h := newHistory(t, 13, 256<<10, 8)
	from, err := stream.Between(h.origin, h.stores[0], h.stores[1])
	if err != nil {
		t.Fatal(err)
	}
	s := sent(t, from, stream.SendOptions{})
	boom := errors.New("boom")
	for _, kind := range []blocktest.Kind{blocktest.Read, blocktest.Write, blocktest.Flush} {
		target := blocktest.NewFaulty(deviceWith(t, h.states[0]), blocktest.FailKind(kind, boom))
		if _, err := apply(target, s, stream.ApplyOptions{}); !errors.Is(err, boom) {
			t.Errorf("%v fails: %v", kind, err)
		}
	}
	bad := blocktest.NewFaulty(h.origin, blocktest.FailKind(blocktest.Read, boom))
	if _, err := stream.Send(context.Background(), io.Discard, stream.Whole(bad), stream.SendOptions{}); !errors.Is(err, boom) {
		t.Errorf("reading fails: %v", err)
	}
	if _, err := stream.Send(context.Background(), failing{boom}, from, stream.SendOptions{}); !errors.Is(err, boom) {
		t.Errorf("writing fails: %v", err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(boom)
	if _, err := stream.Send(ctx, io.Discard, from, stream.SendOptions{}); !errors.Is(err, boom) {
		t.Errorf("cancelled sender: %v", err)
	}
	// A receiver whose sender sends nothing more ends when its context does.
	pr, pw := io.Pipe()
	defer pw.Close()
	go pw.Write(s[:len(s)-20])
	r, err := stream.NewReader(pr)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(ctx, deviceWith(t, h.states[0]), stream.ApplyOptions{}); !errors.Is(err, boom) {
		t.Errorf("cancelled receiver: %v", err)
	}
}

// The error of a file that is sent or received names it, and says once what failed.
func TestFailuresSayItOnce(t *testing.T) {
	h := newHistory(t, 14, 256<<10, 8)
	from, err := stream.Between(h.origin, h.stores[0], h.stores[1])
	if err != nil {
		t.Fatal(err)
	}
	s := sent(t, from, stream.SendOptions{})
	for _, op := range []blocktest.Kind{blocktest.Read, blocktest.Write} {
		file := &fs.PathError{Op: op.String(), Path: "target.img", Err: errors.New("at byte 0: broken")}
		target := blocktest.NewFaulty(deviceWith(t, h.states[0]), blocktest.FailKind(op, file))
		if _, err := apply(target, s, stream.ApplyOptions{}); err == nil || strings.Count(err.Error(), op.String()+" ") != 1 {
			t.Errorf("%v: %v", op, err)
		}
	}
	file := &fs.PathError{Op: "read", Path: "disk.img", Err: errors.New("at byte 0: broken")}
	bad := blocktest.NewFaulty(h.origin, blocktest.FailKind(blocktest.Read, file))
	broken, err := stream.Between(bad, h.stores[0], h.stores[1])
	if err != nil {
		t.Fatal(err)
	}
	for _, source := range []*stream.Source{stream.Whole(bad), broken} {
		_, err := stream.Send(context.Background(), io.Discard, source, stream.SendOptions{})
		if !errors.Is(err, file) || strings.Count(err.Error(), "read ") != 1 || strings.Count(err.Error(), "of the disk at byte") != 1 {
			t.Error(err)
		}
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// A plain stream of runs of 16 KiB has at most three percent more than the bytes that changed.
func TestOverhead(t *testing.T) {
	size := int64(16 << 20)
	origin, cow := deviceWith(t, blocktest.Pattern(int(size), 1)), block.NewMemory(2*size)
	snap, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{ChunkSectors: 32})
	if err != nil {
		t.Fatal(err)
	}
	changed := int64(0)
	for off := int64(0); off < size; off += 64 << 10 {
		if _, err := snap.WriteAt(blocktest.Pattern(16<<10, uint64(off)+2), off); err != nil {
			t.Fatal(err)
		}
		changed += 16 << 10
	}
	if err := snap.Close(); err != nil {
		t.Fatal(err)
	}
	rep, err := check.Run(context.Background(), cow, check.Options{Origin: origin})
	if err != nil || !rep.Clean() {
		t.Fatal(rep, err)
	}
	st, err := store.OpenToRead(cow)
	if err != nil {
		t.Fatal(err)
	}
	from, err := stream.Between(origin, nil, st)
	if err != nil {
		t.Fatal(err)
	}
	s := sent(t, from, stream.SendOptions{Plain: true})
	if over := float64(int64(len(s))-changed) / float64(changed); over > 0.03 || over < 0 {
		t.Errorf("%d bytes for %d, %.2f%% more", len(s), changed, 100*over)
	}
}

// What a hostile stream says costs no more than its bytes.
func FuzzReader(f *testing.F) {
	disk := block.NewMemory(64 << 10)
	if _, err := disk.WriteAt(blocktest.Pattern(8192, 1), 8192); err != nil {
		f.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := stream.Send(context.Background(), &b, stream.Whole(disk), stream.SendOptions{}); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, s []byte) {
		r, err := stream.NewReader(bytes.NewReader(stream.Sealed(s)))
		if err != nil {
			return
		}
		if r.Header().Size > 1<<24 {
			return
		}
		target := block.NewMemory(r.Header().Size)
		if _, err := r.Apply(context.Background(), target, stream.ApplyOptions{}); err == nil {
			again, err := stream.NewReader(bytes.NewReader(stream.Sealed(s)))
			if err != nil {
				t.Fatal(err)
			}
			if got, err := again.Check(context.Background(), target, nil); err != nil || got.Differs != 0 {
				t.Fatal(fmt.Sprint(got, err))
			}
		}
	})
}
