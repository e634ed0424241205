package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/gate"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// SyncMode says when a write to a snapshot is durable.
type SyncMode uint8

const (
	SyncFlush  SyncMode = iota // when a later Flush, or the write's own FUA, returns
	SyncAlways                 // when it returns
)

// ErrOverflow reports a write to a PO snapshot whose COW device was full once (docs/spec/dm-snapshot.md §6.2).
var ErrOverflow = errors.New("snapshot overflowed")

// Options are how a COW device is to be used. The zero value is a persistent store ("P") that exists
// already or gets the kernel's default chunk size, durable at Flush.
type Options struct {
	Store        StoreType
	ChunkSectors uint32 // for a new store, 0: 32; an existing store's own size always wins
	Features
	Sync   SyncMode
	OnFull FullPolicy
	// FullPolicy, unless it is nil, is called for the policy instead of OnFull, each time a write finds no space. It may
	// be called concurrently and must neither block nor call back.
	FullPolicy func() FullPolicy
	Grow       Growth
	Size       int64 // of the snapshot in bytes, a multiple of 512; 0: the origin's
	// Fetched: reads of the origin may wait for a server, and what was read once does not. Changes call Fetch first.
	Fetched bool

	// Notify is called when something happens that no request reports. It may be called from any
	// goroutine, inside requests, and must neither block nor call back.
	Notify func(Event)
}

// A Snapshot shows its origin as it was when the snapshot was activated, plus what was written to it.
// It is a block.Device; every method may be called concurrently.
//
// Requests to a suspended snapshot wait until it is resumed or closed.
type Snapshot struct {
	origin *Origin
	cow    block.Device
	opts   Options
	size   int64

	suspending sync.Mutex   // one Suspend or Close at a time
	life       sync.RWMutex // see the order of locks in origin.go

	// Written with life and origin.mu held for writing, so either may be held to read them.
	store       *store.Store // nil while a handover is awaited, and after this one's was given away
	active      bool         // resumed once: origin writes make exceptions
	source      *Snapshot    // whose store is awaited
	destination *Snapshot    // which awaits this one's store; for a Merging it is Origin.waiting
	mergeWaits  *Merging
	closed      bool
	suspended   bool // life is held for writing by Suspend or Load

	gate       gate.Gate
	overflowed atomic.Bool
	full       atomic.Bool  // the last write that needed space found none
	fullAt     atomic.Int64 // and it was one in place, whose byte in the COW device is one less; 0: it was not
	growing    sync.Mutex

	invalid      atomic.Bool           // lost, and origin writes may continue: it is marked, or the policy does not require the mark
	unmarked     atomic.Pointer[error] // lost, and why it could not be marked; see invalidate
	failed       atomic.Bool           // lost because a device failed
	needed       atomic.Bool           // dirty bytes of the origin wait for a Sync of the store
	invalidating sync.Mutex

	copies, fills copyCounter
	noRooms       atomic.Uint64
}

// Attach loads the store on cow, or makes a new one there when its magic is zero, and activates it as a snapshot of o:
// Load and Resume. From then on every write to o, of any size, is preserved (docs/spec/dm-snapshot.md §8.2, H7).
func (o *Origin) Attach(cow block.Device, opts Options) (*Snapshot, error) {
	return resumed(o.Load(cow, opts))
}

// resumed resumes a snapshot that was loaded.
func resumed(s *Snapshot, err error) (*Snapshot, error) {
	if err != nil {
		return nil, err
	}
	if err := s.Resume(); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Load is the constructor of a snapshot table (docs/spec/dm-snapshot.md §5.1): the snapshot is suspended and inactive
// until Resume: it gets no exceptions, and its requests wait.
//
// When an active snapshot of o has the same COW device, this one becomes the destination of a handover: nothing is
// read, and Resume takes over the store of the other one (§5.12).
//
// The caller keeps cow open until Close. Errors: those of store.Open and store.Create, ErrSameDevice,
// ErrPassdown, ErrChunkNotSet, ErrPairing; ondisk.ErrSealed for a sealed layer on a device that can be written;
// ErrAlreadyMerging while a merge is under way, before cow is read or written.
func (o *Origin) Load(cow block.Device, opts Options) (*Snapshot, error) {
	return o.load(cow, opts, func() (*store.Store, error) { return openStore(o.dev, cow, opts) })
}

// AttachStore is Attach for a store that is open, of which nothing is read: a new one, or one that another snapshot had
// that is not used any more.
func (o *Origin) AttachStore(st *store.Store, opts Options) (*Snapshot, error) {
	return resumed(o.load(st.Device(), opts, func() (*store.Store, error) {
		return st, store.CheckBlockSize(st.Layout(), o.dev)
	}))
}

// load is Load with a store that open returns.
func (o *Origin) load(cow block.Device, opts Options, open func() (*store.Store, error)) (*Snapshot, error) {
	s, err := o.newSnapshot(cow, opts)
	if err != nil {
		return nil, err
	}
	o.mu.Lock()
	source, err := o.handoverSource(cow)
	if err == nil && source == nil {
		err = o.canActivate()
	}
	if source != nil {
		s.source, source.destination = source, s
		o.insert(s)
	}
	o.mu.Unlock()
	if source != nil || err != nil {
		return s.orNil(err)
	}
	// Reading a large store takes long, so the lock is released: this snapshot is not active yet and does not depend on
	// origin writes. The same COW device may be loaded concurrently, so the list is checked again.
	if s.store, err = open(); err != nil {
		return nil, err
	}
	s.invalid.Store(errors.Is(s.store.Err(), store.ErrInvalid))
	o.mu.Lock()
	defer o.mu.Unlock()
	if source, err := o.handoverSource(cow); source != nil || err != nil {
		return nil, ErrPairing
	}
	o.insert(s)
	return s, nil
}

// CheckOrigin returns an error that wraps store.ErrOriginTooSmall when the origin ends before an exception of the store
// begins. Load and Attach accept such an origin, as the kernel does: a caller that wants to refuse it calls CheckOrigin
// between Load and Resume, before anything is written to the COW device.
func (s *Snapshot) CheckOrigin() error {
	if s.store == nil { // waits for a handover
		return nil
	}
	return s.store.CheckOrigin(s.origin.dev.Size())
}

func (s *Snapshot) orNil(err error) (*Snapshot, error) {
	if err != nil {
		return nil, err
	}
	return s, nil
}

// newSnapshot checks what can be checked without reading, and returns a suspended snapshot that is in
// no list.
func (o *Origin) newSnapshot(cow block.Device, opts Options) (*Snapshot, error) {
	if err := o.checkCOW(cow); err != nil {
		return nil, err
	}
	if err := opts.Check(); err != nil {
		return nil, err
	}
	size := opts.Size
	if size == 0 {
		size = o.dev.Size()
	}
	if size < 0 || size%block.SectorSize != 0 || size > o.dev.Size() {
		return nil, fmt.Errorf("snapshot of %d bytes is no whole number of sectors within the origin's %d bytes", size, o.dev.Size())
	}
	s := &Snapshot{origin: o, cow: cow, opts: opts, size: size, suspended: true}
	s.life.Lock()
	return s, nil
}

// openStore loads the store of a table with the options opts, or creates it (docs/spec/dm-snapshot.md §2.6).
func openStore(origin, cow block.Device, opts Options) (*store.Store, error) {
	sectors := opts.ChunkSectors
	if opts.Store == Transient {
		if sectors == 0 {
			return nil, ErrChunkNotSet
		}
		l, err := newLayout(sectors, origin, cow)
		if err != nil {
			return nil, err
		}
		return store.NewTransient(cow, l), nil
	}
	st, err := store.Open(cow)
	if errors.Is(err, ondisk.ErrNoStore) {
		if sectors == 0 {
			sectors = max(ondisk.KernelDefaultChunkSectors, uint32(block.BlockSize(cow)/block.SectorSize))
		}
		l, err := newLayout(sectors, origin, cow)
		if err != nil {
			return nil, err
		}
		return store.Create(cow, l, false)
	}
	if err != nil {
		return nil, err
	}
	if err := store.CheckBlockSize(st.Layout(), origin); err != nil {
		return nil, err
	}
	if found := st.Layout().ChunkSectors; sectors != 0 && found != sectors {
		notify(opts, Event{Kind: EventNotice,
			Text: fmt.Sprintf("chunk size %d in device metadata overrides table chunk size of %d.", found, sectors)})
	}
	if st.Sealed() && !readOnly(cow) {
		return nil, ondisk.ErrSealed
	}
	if err := settleInvalid(st); err != nil {
		return nil, err
	}
	if errors.Is(st.Err(), store.ErrInvalid) {
		notify(opts, Event{Kind: EventNotice, Text: "Snapshot is marked invalid."})
	}
	return st, nil
}

// readOnly reports whether a COW device is known to refuse writes. A sealed layer is attached on such a device only: the
// engine would write to its chunks in place.
func readOnly(cow block.Device) bool {
	d, ok := cow.(interface{ ReadOnly() bool })
	return ok && d.ReadOnly()
}

// newLayout checks a table's chunk size against both devices.
func newLayout(sectors uint32, devs ...block.Device) (ondisk.Layout, error) {
	l, err := ondisk.NewLayout(sectors)
	if err != nil {
		return l, err
	}
	return l, store.CheckBlockSize(l, devs...)
}

func notify(opts Options, e Event) {
	if opts.Notify != nil {
		opts.Notify(e)
	}
}

// Suspend waits until no request is in flight and makes new ones wait, until Resume or Close. Origin writes still make
// exceptions. Suspending a suspended snapshot does nothing: suspensions do not nest.
func (s *Snapshot) Suspend() error {
	s.suspending.Lock()
	defer s.suspending.Unlock()
	if already, err := s.isSuspended(); already || err != nil {
		return err
	}
	s.life.Lock() // waits for requests in flight, and for nothing else
	s.origin.mu.Lock()
	defer s.origin.mu.Unlock()
	s.suspended = true
	return nil
}

// isSuspended fails for a snapshot that is closed.
func (s *Snapshot) isSuspended() (bool, error) {
	s.origin.mu.RLock()
	defer s.origin.mu.RUnlock()
	if s.closed {
		return false, fs.ErrClosed
	}
	return s.suspended, nil
}

// Close makes the snapshot's exceptions durable and removes it from its origin. Waiting and later requests fail with
// fs.ErrClosed. Nothing else is written: the store can be loaded again (docs/spec/dm-snapshot.md §5.13). The COW device
// stays open. The error is that of the last Sync.
func (s *Snapshot) Close() error {
	s.suspending.Lock()
	defer s.suspending.Unlock()
	s.origin.mu.Lock()
	held := s.suspended
	s.suspended = false // the goroutine that resets it owns the lock on life
	s.origin.mu.Unlock()
	if !held {
		s.life.Lock()
	}
	defer s.life.Unlock()
	s.origin.mu.Lock()
	defer s.origin.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	err := s.settle()
	s.origin.remove(s)
	s.cancelHandover()
	s.origin.dev.WriteOut() // the next Flush returns an error; it does not concern s
	return err
}

// settle makes the exceptions of s durable before it leaves the list: then no dirty bytes of the origin depend on it.
// Acknowledged origin writes are not discarded to protect s: when they wait for exceptions that can't be made durable,
// s becomes invalid. origin.mu is held for writing.
func (s *Snapshot) settle() error {
	switch {
	case s.store == nil:
		return nil
	case s.lost():
		return s.markAgain()
	}
	err := s.store.Sync()
	if err == nil {
		s.needed.Store(false)
	} else if s.needed.Load() {
		s.invalidate(reasonIO, err)
		err = errors.Join(err, s.markFailure())
	}
	return err
}

// Size returns the size in bytes.
func (s *Snapshot) Size() int64 { return s.size }

// BlockSize returns the logical block size in bytes: the larger of origin's and COW device's.
func (s *Snapshot) BlockSize() int { return max(block.BlockSize(s.origin.dev), block.BlockSize(s.cow)) }

// Identity is that of the pair of origin and COW device: a snapshot is another disk than either.
func (s *Snapshot) Identity() string {
	origin, cow := block.Identity(s.origin.dev), block.Identity(s.cow)
	if origin == "" || cow == "" {
		return ""
	}
	return fmt.Sprintf("snapshot in %s of %s", cow, origin)
}

// ChangeLabel is store.Store.ChangeLabel of the snapshot's store.
func (s *Snapshot) ChangeLabel(change func(sector []byte)) error {
	st := s.Store()
	if st == nil {
		return store.ErrInvalid // handed over
	}
	return st.ChangeLabel(change)
}

// Store returns the store, nil while there is none (see Load). The caller must not add exceptions to it, or drop some,
// while the snapshot is used.
func (s *Snapshot) Store() *store.Store {
	s.origin.mu.RLock()
	defer s.origin.mu.RUnlock()
	return s.store
}

// COW returns the COW device.
func (s *Snapshot) COW() block.Device { return s.cow }

// chunkSectors is the chunk size in force, 0 while there is no store. life or origin.mu is held.
func (s *Snapshot) chunkSectors() uint32 {
	if s.store == nil {
		return 0
	}
	return s.store.Layout().ChunkSectors
}

// usable returns why requests are refused. life is held.
func (s *Snapshot) usable() error {
	switch {
	case s.closed:
		return fs.ErrClosed
	case s.store == nil:
		return fmt.Errorf("%w: its store was handed over", store.ErrInvalid)
	case s.lost():
		return s.store.Err()
	}
	return nil
}

// lost reports whether the snapshot is invalid, marked on disk or not.
func (s *Snapshot) lost() bool { return s.invalid.Load() || s.unmarked.Load() != nil }

// writable returns why writes are refused. life is held.
func (s *Snapshot) writable() error {
	if s.overflowed.Load() {
		if err := s.usable(); err != nil {
			return err
		}
		return ErrOverflow
	}
	return s.usable()
}

// Status returns the status of the snapshot. It does not wait for requests.
func (s *Snapshot) Status() Status {
	s.origin.mu.RLock()
	defer s.origin.mu.RUnlock()
	st := Status{Target: TargetSnapshot, State: StateOK, Length: uint64(s.size) / block.SectorSize,
		Store: s.opts.Store, Features: s.opts.Features, Overflowed: s.overflowed.Load()}
	if s.store == nil {
		if s.source == nil {
			st.State = StateInvalid
		}
		return st
	}
	st.ChunkSectors, st.Exceptions, st.Usage = s.chunkSectors(), s.store.Len(), s.store.Usage()
	st.Full, st.Unmarked, st.Err = s.full.Load(), s.unmarked.Load() != nil, s.store.Err()
	switch {
	case s.lost():
		st.State = StateInvalid
	case st.Err != nil:
		st.State = StateFailed
	case st.Overflowed:
		st.State = StateOverflow
	}
	return st
}
