package snapshot

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/store"
)

// The errors of handover and merge (docs/spec/dm-snapshot.md §5.12).
var (
	ErrPairing           = errors.New("the COW device is in use by another snapshot, or another handover of its store is waiting")
	ErrAlreadyMerging    = errors.New("a snapshot is already merging")
	ErrResumeSource      = errors.New("the source of a handover can't be resumed before the handover is complete")
	ErrSourceRunning     = errors.New("the source of the handover is not suspended")
	ErrHandoverCancelled = errors.New("the handover was cancelled")
)

// handoverSource returns the active snapshot whose store a newly loaded table with the same COW device will take over,
// or nil when there is none, or ErrPairing when another table waits for it already (or uses the device otherwise). o.mu
// is held.
func (o *Origin) handoverSource(cow block.Device) (*Snapshot, error) {
	var source *Snapshot
	for _, s := range o.snapshots {
		if !block.Same(s.cow, cow) || s.drained() {
			continue
		}
		if source != nil || !s.active || s.handsOver() {
			return nil, ErrPairing
		}
		source = s
	}
	for _, m := range []*Merging{o.merging.Load(), o.waiting} {
		if m != nil && block.Same(m.cow, cow) {
			return nil, ErrPairing
		}
	}
	return source, nil
}

// canActivate refuses a new snapshot while a merge is under way: what is not merged yet is not on the origin's disk, so
// the snapshot would show a mixture, and what an existing store shows was not preserved by the steps so far. o.mu is
// held.
func (o *Origin) canActivate() error {
	if o.merging.Load() == nil {
		return nil
	}
	return fmt.Errorf("%w: a snapshot made before the merge is complete would show a mixture of old and new content", ErrAlreadyMerging)
}

// drained: the store was handed over. handsOver: another table waits for it. Both with life or origin.mu held.
func (s *Snapshot) drained() bool   { return s.store == nil && s.source == nil }
func (s *Snapshot) handsOver() bool { return s.destination != nil || s.mergeWaits != nil }

// Resume activates a loaded snapshot, or resumes a suspended one. The destination of a handover first takes over the
// store of its source, which must be suspended; the source is invalid from then on, in memory only
// (docs/spec/dm-snapshot.md §5.12). Of the destination's options only the O of Store, the features and Sync are used:
// chunk size and kind are those of the store.
//
// A snapshot that was active before always resumes, so that an operation that suspended it, and was refused, can be
// undone.
//
// Errors: ErrResumeSource, ErrSourceRunning, fs.ErrClosed; for a snapshot that was not active before,
// ErrAlreadyMerging, and the error of writing out what is in memory of the origin. Resuming a snapshot that is not
// suspended does nothing.
func (s *Snapshot) Resume() error {
	o := s.origin
	o.writeOut() // writes out most of the dirty bytes before mu is locked; its error is returned again below
	o.mu.Lock()  // no origin write is in flight, so no exception is pending (docs/spec/dm-snapshot.md §8.1, number 13)
	defer o.mu.Unlock()
	switch {
	case s.closed:
		return fs.ErrClosed
	case !s.suspended:
		return nil
	case s.handsOver():
		return ErrResumeSource
	}
	if !s.active && !s.drained() {
		if err := s.activate(); err != nil {
			return err
		}
	}
	s.suspended = false
	s.life.Unlock()
	return nil
}

// activate makes origin writes keep what s shows from now on. o.mu is held for writing.
func (s *Snapshot) activate() error {
	if s.source == nil {
		if err := s.origin.canActivate(); err != nil {
			return err
		}
	}
	// Write out dirty bytes first: s shows the disk.
	if err := s.origin.dev.WriteOut(); err != nil {
		return err
	}
	if s.source != nil {
		if err := s.takeOver(s.source); err != nil {
			return err
		}
	}
	s.active = true
	return nil
}

// takeOver moves the store of src to s. Both are suspended, so life of both is held for writing; o.mu is
// too.
func (s *Snapshot) takeOver(src *Snapshot) error {
	if !src.suspended {
		return ErrSourceRunning
	}
	o := s.origin
	o.remove(s)
	s.invalid.Store(src.invalid.Load()) // before the source becomes invalid
	s.unmarked.Store(src.unmarked.Load())
	s.failed.Store(src.failed.Load())
	s.needed.Store(src.needed.Load())
	s.store, s.source = src.giveStore(), nil
	if s.store != nil {
		if s.store.Transient() {
			s.opts.Store = Transient
		} else if s.opts.Store == Transient {
			s.opts.Store = src.opts.Store
		}
	}
	s.overflowed.Store(src.overflowed.Load())
	o.insert(s) // sorted again: its chunk size is known now
	return nil
}

// giveStore leaves s without a store. life and origin.mu are held for writing.
func (s *Snapshot) giveStore() *store.Store {
	st := s.store
	s.store, s.active = nil, false
	s.destination, s.mergeWaits = nil, nil
	s.invalid.Store(true)
	s.unmarked.Store(nil)
	s.origin.room.made() // nothing waits for s any more
	return st
}

// cancelHandover ends the handover for both sides when s is closed. origin.mu is held for writing.
func (s *Snapshot) cancelHandover() {
	if s.source != nil {
		s.source.destination, s.source = nil, nil
		return
	}
	if d := s.destination; d != nil {
		d.source, s.destination = nil, nil
		d.invalid.Store(true)
		notify(d.opts, Event{Kind: EventHandoverCancelled, Text: "Cancelling snapshot handover."})
	}
	if m := s.mergeWaits; m != nil {
		m.source, s.mergeWaits = nil, nil
		notify(m.opts, Event{Kind: EventHandoverCancelled, Text: "Cancelling snapshot handover."})
	}
}

// LoadMerge is the constructor of a snapshot-merge table: it loads the store on cow, or becomes the
// destination of a handover from the active snapshot of o that has it. Nothing happens until Resume.
//
// Errors: those of store.Open, ErrPairing, ErrAlreadyMerging when another merge is loaded on o, and store.ErrNoMerge
// for a transient store, always (docs/spec/dm-snapshot.md §8.2, H3). An origin that ends before a chunk of the store is
// refused. Of opts only the O of Store, Sync and Notify are used.
func (o *Origin) LoadMerge(cow block.Device, opts Options) (*Merging, error) {
	if opts.Store == Transient {
		return nil, store.ErrNoMerge
	}
	if err := o.checkCOW(cow); err != nil {
		return nil, err
	}
	m := &Merging{origin: o, cow: cow, opts: opts}
	o.mu.Lock()
	source, err := o.canMerge(cow)
	if err == nil {
		if m.source = source; source != nil {
			source.mergeWaits = m
		}
		o.waiting = m
	}
	o.mu.Unlock()
	if source != nil || err != nil {
		if err != nil {
			return nil, err
		}
		return m, nil
	}
	st, err := m.open()
	if err != nil {
		m.Close()
		return nil, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	m.store.Store(st)
	return m, nil
}

// canMerge returns the source of a handover to a merge, if any, or why there can't be a merge. o.mu is
// held.
func (o *Origin) canMerge(cow block.Device) (*Snapshot, error) {
	if o.merging.Load() != nil || o.waiting != nil {
		return nil, ErrAlreadyMerging
	}
	source, err := o.handoverSource(cow)
	if source != nil && source.store.Transient() {
		return nil, store.ErrNoMerge
	}
	return source, err
}

// open loads the merge's store from its COW device and checks it against the origin.
func (m *Merging) open() (*store.Store, error) {
	st, err := store.Open(m.cow)
	if err != nil {
		return nil, err
	}
	if err := store.CheckBlockSize(st.Layout(), m.origin.dev); err != nil {
		return nil, err
	}
	return st, st.CheckOrigin(m.origin.dev.Size())
}

// Resume activates the merge: from now on requests to the origin are answered with the merged content, and Step can be
// called. A handover's source must be suspended; its exceptions are made durable first, and it is invalid afterwards,
// in memory only (docs/spec/dm-snapshot.md §5.12, §7.7).
//
// Errors: ErrSourceRunning; that of the source's last Sync, or of a Flush when the store was loaded as invalid,
// with nothing changed.
func (m *Merging) Resume() error { return m.resume(false) }

// resume is Resume. It refuses a handover's source that is invalid, with mustBeValid: the merge would be the origin alone.
func (m *Merging) resume(mustBeValid bool) error {
	o := m.origin
	o.writeOut() // as in Snapshot.Resume
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.merging.Load() == m {
		return nil
	}
	if o.waiting != m {
		return fs.ErrClosed
	}
	if err := o.dev.WriteOut(); err != nil {
		return err
	}
	handed := m.source != nil
	if src := m.source; src != nil {
		if !src.suspended {
			return ErrSourceRunning
		}
		if mustBeValid && src.invalid.Load() { // what was written out above may have been the cause
			return src.store.Err()
		}
		if !src.invalid.Load() {
			// A merge reads the slots on disk.
			if err := src.store.Sync(); err != nil {
				return err
			}
			if err := src.store.CheckOrigin(m.origin.dev.Size()); err != nil {
				return err
			}
		}
		m.overflowed = src.overflowed.Load()
		m.store.Store(src.giveStore())
		m.source = nil
	}
	st := m.store.Load()
	if st == nil {
		return ErrHandoverCancelled
	}
	if m.invalid = errors.Is(st.Err(), store.ErrInvalid); m.invalid && !handed {
		if err := settleInvalid(st); err != nil {
			return err
		}
	}
	o.waiting = nil
	o.merging.Store(m)
	return nil
}

// BeginMerge hands over the snapshot's store to a merge into its origin and activates it: LoadMerge, Suspend, Resume.
// The origin shows the snapshot's content at once; Step copies it. The snapshot itself reports Invalid and refuses
// requests from then on (docs/spec/dm-snapshot.md §7.7); close it when convenient.
//
// When it fails the snapshot is as before, suspended if it was. A snapshot that becomes invalid meanwhile is refused
// (store.ErrInvalid): what is written out of memory of the origin needs its exceptions, and its COW device may fail. One that was
// invalid before is merged as the kernel does it: the origin shows itself alone (docs/spec/dm-snapshot.md §7.5).
func (s *Snapshot) BeginMerge() (*Merging, error) {
	return s.beginMerge(func() error { return nil }, !s.invalid.Load())
}

// BeginMergeAfter is BeginMerge of a snapshot that must be valid, and calls ready before the origin shows the snapshot's content, when the
// snapshot is suspended. An error of ready refuses the merge. BeginMergeAfter may fail after ready succeeded.
func (s *Snapshot) BeginMergeAfter(ready func() error) (*Merging, error) {
	return s.beginMerge(ready, true)
}

func (s *Snapshot) beginMerge(ready func() error, mustBeValid bool) (*Merging, error) {
	suspended, err := s.isSuspended()
	if err != nil {
		return nil, err
	}
	m, err := s.origin.LoadMerge(s.cow, s.opts)
	if err != nil {
		return nil, err
	}
	if err = s.Suspend(); err == nil {
		err = ready()
	}
	if err == nil {
		err = m.resume(mustBeValid)
	}
	if err != nil {
		m.Close()
		if !suspended {
			err = errors.Join(err, s.Resume())
		}
		return nil, err
	}
	return m, s.Resume()
}
