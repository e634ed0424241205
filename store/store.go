// Package store keeps exceptions: which origin chunk of a snapshot is stored in which chunk of a COW
// device. It copies no data and never accesses an origin; package snapshot does.
//
//	st, err := store.Create(cow, layout, false) // or store.Open(cow)
//	r, err := st.Reserve(5, 1)                  // a COW chunk for origin chunk 5
//	_, err = cow.WriteAt(data, layout.COWOffset(r.New))
//	err = r.Commit()                            // Lookup finds it
//	err = st.Sync()                             // durable, together with its data
//
// A persistent store is in the kernel's format (docs/spec/dm-snapshot.md §2), a transient one is in memory only.
//
// # Guarantees
//
//   - The store on disk can be opened at every instant, by dmsnap and by the kernel. Between two Syncs it is exactly what
//     the last one wrote.
//   - After Sync returns nil, every exception committed before the call survives a crash.
//   - After a failed metadata write or flush the store refuses writes: every later Reserve, Commit, Sync and DropLast
//     returns an error that wraps [ErrFailed]. Nothing is retried. Lookups continue to work.
//   - Numbers in memory change only after their I/O succeeded (docs/spec/dm-snapshot.md §8.2, H1, H2).
//   - A store that was made invalid ([Store.Invalidate]) stays invalid.
//
// # Stages of an exception
//
//	Reserve    a COW chunk is allocated; usage grows; nothing is on disk
//	(caller)   writes the chunk's data at COWOffset(New)
//	Commit     Lookup finds it; a crash may still lose it
//	Sync       on disk and durable, together with its data
//
// # Concurrency
//
// All methods may be called concurrently, except LastRun, Last and DropLast: they belong to one merge, while nothing is
// reserved.
package store

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/chunkmap"
	"github.com/dmsnap/dmsnap/latency"
	"github.com/dmsnap/dmsnap/ondisk"
)

var (
	// ErrInvalid reports a store that is marked invalid, on disk or by Invalidate since.
	ErrInvalid = errors.New("snapshot is invalid")

	// ErrFull reports that the COW device has no space for another exception: its end is reached, or its file system has
	// no space left (then block.IsNoSpace is true as well).
	ErrFull = errors.New("COW device is full")

	// ErrFailed reports a store that refuses writes after a failed metadata write or flush.
	ErrFailed = errors.New("exception store failed")

	// ErrDataLost reports COW chunks of a failed store whose data was never flushed: what the COW device shows there is
	// neither what was written nor what was there before. See [Store.CheckData].
	ErrDataLost = errors.New("the data of a COW chunk was lost when its exception store failed")

	// ErrExists reports a Create over an existing store.
	ErrExists = errors.New("COW device already holds an exception store")

	// ErrOriginTooSmall reports an origin that ends before chunks that the store has exceptions for.
	ErrOriginTooSmall = errors.New("origin is too small")

	// ErrNoMerge reports a store that can't be merged: a transient one.
	ErrNoMerge = errors.New("a transient exception store can't be merged")
)

// position is the slot of the next exception: the kernel's current_area and current_committed.
type position struct {
	area  uint64
	index uint64 // slots used in area, 0 ≤ index < E; after a full area comes slot 0 of the next
}

// A Store is one COW device's exceptions. See the package comment for what may be concurrent.
type Store struct {
	dev       block.Device
	layout    ondisk.Layout
	header    ondisk.Header // as found or written; transient: zero
	format    string        // of the origin; empty: ondisk.RawFormat
	transient bool

	exceptions chunkmap.Map // those committed

	// durableBelow: an exception with a smaller New is certainly durable. Reservations ascend and are made durable in
	// order, so one number is enough. Transient: all are.
	durableBelow atomic.Uint64

	// lostFrom: the data of an exception whose New is not less was lost by the failure of the store. MaxUint64: of none.
	lostFrom atomic.Uint64

	mu        sync.Mutex
	moved     sync.Cond // the head of queue changed, or err was set
	err       error     // why the store refuses writes: wraps ErrInvalid or ErrFailed; nil: it accepts them
	sealed    bool      // it has an ondisk.SealedLabel
	next      ondisk.COWChunk
	reserved  position       // of the next reservation
	pos       position       // of the next exception that completes in order
	queue     []*reservation // not yet completed in order, oldest first
	ready     []Run          // completed in order, not yet durable
	unsynced  uint64         // exceptions in ready
	space     int64          // device bytes from the last area on to here have their space reserved
	openArea  uint64         // the area in use when space was first reserved
	openSpace int64          // bytes of it from its beginning on that have their space reserved
	noSpace   bool           // the device has no notion of reserving space
	commits   uint64         // exceptions committed since the store was opened

	marking sync.Mutex // one attempt to mark the header at a time
	marked  bool       // Invalidate has marked it; marking is held

	// Sync rounds, see sync.go. syncing guards tail and scrub.
	syncing sync.Mutex
	rounds  atomic.Uint64   // begun
	durable position        // of the next slot to be written
	written ondisk.COWChunk // exceptions whose New is less have their slots written
	flushed ondisk.COWChunk // exceptions whose New is less had their data flushed once
	tail    []byte          // the metadata block that holds slot durable, as on disk
	settled bool            // the end of the exceptions was written, durably, since Open
	scrub   bool            // what follows tail in its area may hold void slots

	syncs     atomic.Uint64
	syncTook  latency.Recorder // the rounds
	copyWaits latency.Recorder
}

// metaBlock is the unit in which slots are written, in bytes: a chunk, or 4 KiB of a larger one. Only blocks that
// changed are written; the format allows it (docs/spec/dm-snapshot.md §9.3), and the page cache need not read before it
// writes whole pages.
func metaBlock(l ondisk.Layout) int64 { return min(l.ChunkBytes(), 4096) }

func newStore(dev block.Device, l ondisk.Layout) *Store {
	s := &Store{dev: dev, layout: l}
	s.moved.L = &s.mu
	s.lostFrom.Store(math.MaxUint64)
	return s
}

// NewTransient returns an empty store that keeps its exceptions in memory and its data from COW chunk 0 on
// (docs/spec/dm-snapshot.md §5.14). What dev held before is ignored and will be overwritten.
func NewTransient(dev block.Device, l ondisk.Layout) *Store {
	s := newStore(dev, l)
	s.transient = true
	s.durableBelow.Store(math.MaxUint64)
	return s
}

// Layout returns the store's arithmetic.
func (s *Store) Layout() ondisk.Layout { return s.layout }

// Device returns the COW device.
func (s *Store) Device() block.Device { return s.dev }

// Transient reports whether the store keeps its exceptions in memory only.
func (s *Store) Transient() bool { return s.transient }

// Header returns the header as it was found or created; zero for a transient store.
func (s *Store) Header() ondisk.Header { return s.header }

// Lookup returns the COW chunk in which origin chunk old is stored.
func (s *Store) Lookup(old ondisk.OriginChunk) (ondisk.COWChunk, bool) {
	return s.exceptions.Get(old)
}

// LookupRun describes the longest uniform range of at most limit ≥ 1 origin chunks from old on: n chunks that are
// stored in new, new+1, …, or n chunks without an exception. A range with exceptions may be cut, after 65,536 chunks at
// the earliest. It takes the same time however many exceptions there are.
func (s *Store) LookupRun(old ondisk.OriginChunk, limit uint64) (new ondisk.COWChunk, n uint64, mapped bool) {
	return s.exceptions.Run(old, limit)
}

// Durable reports whether the exception that Lookup found in COW chunk new is durable. The origin chunk of an exception
// must not be overwritten before it is.
func (s *Store) Durable(new ondisk.COWChunk) bool { return uint64(new) < s.durableBelow.Load() }

// CheckData returns an error that wraps ErrDataLost when some of n > 0 bytes at off of the COW device, in chunks that have
// exceptions, were never on the disk and can't be trusted: the store failed before their chunk was flushed for the first
// time. After a failed flush the operating system shows what it could not write until it drops it, and then what the
// disk has, which in a new chunk is anything, mostly zeros. A chunk that was flushed once holds, after that, what it
// held then or what was written in place since, as on any disk.
//
// A reader calls it after it has read.
func (s *Store) CheckData(off, n int64) error {
	lost := s.lostFrom.Load()
	if last := uint64(off+n-1) >> s.layout.Shift(); last < lost {
		return nil
	}
	return fmt.Errorf("%w: %v", ErrDataLost, s.Err()) // an EIO, whatever the cause was
}

// Exceptions yields the committed exceptions in ascending order of their origin chunks, joined to runs as long as
// possible. Exceptions that are committed or dropped meanwhile may be among them or not.
func (s *Store) Exceptions() iter.Seq[Run] {
	return func(yield func(Run) bool) {
		for r := range s.exceptions.All() {
			if !yield(Run(r)) {
				return
			}
		}
	}
}

// LastOrigin returns the largest origin chunk that has an exception, or false when there is none.
func (s *Store) LastOrigin() (ondisk.OriginChunk, bool) { return s.exceptions.Max() }

// Len is the number of committed exceptions.
func (s *Store) Len() uint64 { return s.exceptions.Len() }

// Err returns why the store refuses writes, or nil: an error that wraps ErrInvalid or ErrFailed.
func (s *Store) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Dirty reports whether there are exceptions that are not durable before the next Sync.
func (s *Store) Dirty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.ready) > 0 || len(s.queue) > 0
}

// Usage is the numbers of a store's status line (docs/spec/dm-snapshot.md §6.6), in sectors.
type Usage struct {
	Allocated uint64 // next_free·c: header, areas and data, counted from the reservation on
	Total     uint64 // size of the COW device, not rounded to chunks
	Metadata  uint64 // header and areas
}

// String is the kernel's status text: "24/1024 16".
func (u Usage) String() string { return fmt.Sprintf("%d/%d %d", u.Allocated, u.Total, u.Metadata) }

// Usage returns the numbers as they are now. The size of the COW device is looked up again; if that fails, the last
// known one counts.
func (s *Store) Usage() Usage {
	size, err := block.Refresh(s.dev)
	if err != nil {
		size = s.dev.Size()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usageAt(size)
}

func (s *Store) usageAt(size int64) Usage {
	c := uint64(s.layout.ChunkSectors)
	u := Usage{Allocated: uint64(s.next) * c, Total: uint64(size) / ondisk.SectorSize}
	if !s.transient {
		u.Metadata = (s.pos.area + 2) * c
	}
	return u
}

// advance moves p by n slots.
func (s *Store) advance(p position, n uint64) position {
	e := s.layout.SlotsPerArea()
	i := p.index + n
	return position{p.area + i/e, i % e}
}

// retreat moves p back by n slots.
func (s *Store) retreat(p position, n uint64) position {
	e := s.layout.SlotsPerArea()
	i := p.area*e + p.index - n
	return position{i / e, i % e}
}

// fail makes err the store's error, unless it has one, and returns the store's error. A store that failed can still
// become invalid, which replaces its error.
func (s *Store) fail(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil || errors.Is(err, ErrInvalid) && !errors.Is(s.err, ErrInvalid) {
		s.err = err
	}
	s.moved.Broadcast()
	return s.err
}
