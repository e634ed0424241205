package snapshot_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// The tests named TestCnnn are the points of the specification's conformance checklist;
// docs/kernel-parity.md lists them. c is 8 sectors unless a test says otherwise.

const sector = 512

// A rig is an origin in memory whose disk, like each COW device, records what is done to it and can be
// made to fail or to wait.
type rig struct {
	t      *testing.T
	log    blocktest.Log
	memory *block.Memory // the origin's bytes
	disk   *blocktest.Faulty
	origin *snapshot.Origin
	before []byte // the origin's first content

	notifying sync.Mutex // guards events, which concurrent requests report
	events    []snapshot.Event
}

// notify is Options.Notify.
func (r *rig) notify(e snapshot.Event) {
	r.notifying.Lock()
	defer r.notifying.Unlock()
	r.events = append(r.events, e)
}

// newRig makes an origin of the given number of sectors, filled with noise.
func newRig(t *testing.T, sectors int64, opts ...snapshot.OriginOption) *rig {
	r := &rig{t: t, before: blocktest.Pattern(int(sectors*sector), 1)}
	r.memory = block.MemoryFrom(r.before)
	r.disk = blocktest.NewFaulty(r.memory, nil)
	r.origin = snapshot.NewOrigin(r.log.Record("ORIGIN", r.disk), opts...)
	return r
}

// A cow is one COW device of a rig.
type cow struct {
	memory *block.Memory
	faults *blocktest.Faulty
	dev    block.Device
}

// cow makes an empty COW device of the given number of sectors.
func (r *rig) cow(name string, sectors int64) *cow {
	return r.cowOf(name, make([]byte, sectors*sector))
}

// cowOf makes a COW device with a content. A store on it is checked when the test ends.
func (r *rig) cowOf(name string, content []byte) *cow {
	c := &cow{memory: block.MemoryFrom(content)}
	c.faults = blocktest.NewFaulty(c.memory, nil)
	c.dev = r.log.Record(name, c.faults)
	return c
}

// attach activates a snapshot, closes it when the test ends, and checks its store then, unless the
// store is invalid or the test failed it on purpose.
func (r *rig) attach(c *cow, o snapshot.Options) *snapshot.Snapshot {
	r.t.Helper()
	o.Notify = r.notify
	s, err := r.origin.Attach(c.dev, o)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		c.faults.Set(nil)
		r.disk.Set(nil)
		if err := s.Close(); err == nil && o.Store != snapshot.Transient {
			checkStore(r.t, c.memory)
		}
	})
	return s
}

// standard is a rig with one persistent snapshot of chunk size 8 in a COW device of the given number of sectors.
func standard(t *testing.T, originSectors, cowSectors int64) (*rig, *cow, *snapshot.Snapshot) {
	r := newRig(t, originSectors)
	c := r.cow("COW", cowSectors)
	s := r.attach(c, snapshot.Options{ChunkSectors: 8})
	r.log.Clear()
	return r, c, s
}

// merging hands s over to a merge that is closed when the test ends.
func (r *rig) merging(s *snapshot.Snapshot) *snapshot.Merging {
	r.t.Helper()
	m, err := s.BeginMerge()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { m.Close() })
	return m
}

// ops takes the log: one operation a line, in sectors.
func (r *rig) ops() string { return r.log.String() }

// wantOps compares the log with the lines, separated by semicolons, and clears it.
func (r *rig) wantOps(want string) {
	r.t.Helper()
	var lines []string
	for _, op := range r.log.Take() {
		lines = append(lines, op.String())
	}
	if got := strings.Join(lines, "; "); got != want {
		r.t.Errorf("operations\n got %s\nwant %s", got, want)
	}
}

// fill returns n sectors of the byte x.
func fill(sectors int64, x byte) []byte { return bytes.Repeat([]byte{x}, int(sectors*sector)) }

// write writes n sectors of x at a sector of dev, which must succeed.
func write(t *testing.T, dev block.Device, at, n int64, x byte) {
	t.Helper()
	if _, err := dev.WriteAt(fill(n, x), at*sector); err != nil {
		t.Fatalf("write %d+%d: %v", at, n, err)
	}
}

// fails writes likewise and wants an error.
func fails(t *testing.T, dev block.Device, at, n int64) error {
	t.Helper()
	_, err := dev.WriteAt(fill(n, 0xee), at*sector)
	if err == nil {
		t.Fatalf("write %d+%d succeeded", at, n)
	}
	return err
}

// read reads sectors.
func read(t *testing.T, dev block.Device, at, n int64) []byte {
	t.Helper()
	b := make([]byte, n*sector)
	if _, err := dev.ReadAt(b, at*sector); err != nil {
		t.Fatalf("read %d+%d: %v", at, n, err)
	}
	return b
}

// wantRead reads n sectors and wants these bytes.
func wantRead(t *testing.T, dev block.Device, at int64, want []byte) {
	t.Helper()
	if got := read(t, dev, at, int64(len(want)/sector)); !bytes.Equal(got, want) {
		t.Errorf("sectors %d+%d differ first at byte %d", at, len(want)/sector, firstDifference(got, want))
	}
}

// old returns the origin's first content.
func (r *rig) old(at, n int64) []byte { return r.before[at*sector : (at+n)*sector] }

// wantStatus compares the status text.
func wantStatus(t *testing.T, s interface{ Status() snapshot.Status }, want string) {
	t.Helper()
	if got := s.Status().Text(); got != want {
		t.Errorf("status %q, want %q", got, want)
	}
}

func flush(t *testing.T, dev block.Device) {
	t.Helper()
	if err := dev.Flush(); err != nil {
		t.Fatal(err)
	}
}

// step makes one step of a merge.
func step(t *testing.T, m *snapshot.Merging, max uint64) uint64 {
	t.Helper()
	n, err := m.Step(max)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// finish steps to the end.
func finish(t *testing.T, m *snapshot.Merging) {
	t.Helper()
	for step(t, m, 0) > 0 {
	}
}

// pair is an exception as tests write it: origin chunk, COW chunk.
type pair [2]uint64

// image builds a COW device by hand: a header, and slots from area 0 on, whatever they say. Each COW chunk
// that a slot names in the device is filled with a byte of its own (content).
func image(c uint32, sectors int64, slots ...pair) []byte {
	b := make([]byte, sectors*sector)
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: c}.Encode(b)
	l := ondisk.Layout{ChunkSectors: c}
	for i, p := range slots {
		at := l.SlotOffset(ondisk.Slot{Area: uint64(i) / l.SlotsPerArea(), Index: uint64(i) % l.SlotsPerArea()})
		ondisk.Exception{Old: ondisk.OriginChunk(p[0]), New: ondisk.COWChunk(p[1])}.Encode(b[at:])
		if off := l.COWOffset(ondisk.COWChunk(p[1])); p[1] > 1 && p[1] < 1<<30 && off+l.ChunkBytes() <= int64(len(b)) && l.IsData(ondisk.COWChunk(p[1])) {
			copy(b[off:off+l.ChunkBytes()], content(c, p[1]))
		}
	}
	return b
}

// content is what image puts in a COW chunk.
func content(c uint32, chunk uint64) []byte { return fill(int64(c), byte(0x80+chunk%0x7f)) }

// slot reads a slot of a COW image.
func slot(b []byte, c uint32, area, index uint64) pair {
	l := ondisk.Layout{ChunkSectors: c}
	e := ondisk.DecodeException(b[l.SlotOffset(ondisk.Slot{Area: area, Index: index}):])
	return pair{uint64(e.Old), uint64(e.New)}
}

// setHeader changes a 32-bit field of the header: 0 magic, 1 valid, 2 version, 3 chunk size.
func setHeader(b []byte, field int, v uint32) []byte {
	binary.LittleEndian.PutUint32(b[4*field:], v)
	return b
}

// loads wants a COW image to load, and returns the snapshot on an origin of 1024 chunks.
func loads(t *testing.T, img []byte) (*rig, *cow, *snapshot.Snapshot) {
	t.Helper()
	h := ondisk.DecodeHeader(img)
	r := newRig(t, 1024*int64(h.ChunkSectors))
	c := r.cowOf("COW", img)
	return r, c, r.attach(c, snapshot.Options{})
}

// refuses wants a COW image not to load with an error that says this, and not to be touched.
func refuses(t *testing.T, img []byte, want string) {
	t.Helper()
	r := newRig(t, 1024)
	c := r.cowOf("COW", img)
	_, err := r.origin.Attach(c.dev, snapshot.Options{})
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want one with %q", err, want)
	}
	var corrupt *ondisk.CorruptError
	if !errors.As(err, &corrupt) {
		t.Errorf("error %v is no CorruptError", err)
	}
	if !bytes.Equal(c.memory.Bytes(), img) {
		t.Error("the refused COW device was touched")
	}
}

var errDisk = errors.New("the disk fails")

// failing fails operations of a kind that touch a range of sectors.
func failing(k blocktest.Kind, at, n int64) blocktest.Decide {
	return func(op blocktest.Op) error {
		if op.Kind == k && (k == blocktest.Flush || op.Overlaps(at*sector, n*sector)) {
			return errDisk
		}
		return nil
	}
}

// failingWrites fails every kind of change to a range of sectors.
func failingWrites(at, n int64) blocktest.Decide {
	return func(op blocktest.Op) error {
		if op.Kind.Changes() && op.Overlaps(at*sector, n*sector) {
			return errDisk
		}
		return nil
	}
}

// isFull and isInvalid classify the error of a refused write.
func isFull(err error) bool    { return errors.Is(err, store.ErrFull) }
func isInvalid(err error) bool { return errors.Is(err, store.ErrInvalid) }
