package snapshot

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/gate"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// ErrMergeFailed reports a step of a merge that failed, and writes that waited for it.
var ErrMergeFailed = errors.New("merge failed")

// ErrReopen reports a merge that can't continue with the open devices: a flush of one of them failed, and it fails
// every later one (see block.Device). The merge can continue, with nothing lost but what was not flushed, after the
// devices have been closed, opened and loaded again.
var ErrReopen = errors.New("a flush failed, so the merge can continue only after the devices have been opened again")

// Merging is an origin into which a snapshot is being merged back (docs/spec/dm-snapshot.md §7). It shows the origin
// overlaid with the remaining exceptions of the snapshot, is preserved for the other snapshots like any origin, and
// makes no exceptions itself.
//
// Requests go to the [Origin], which passes them on from Resume until Close. Step merges one window at a time. What is
// not merged yet stays in the COW device, where writes to it go too.
type Merging struct {
	origin *Origin
	cow    block.Device
	opts   Options

	// source hands its store over to m; origin.mu guards it.
	source *Snapshot

	store      atomic.Pointer[store.Store] // nil before a handover
	overflowed bool                        // as it was handed over
	invalid    bool                        // as it was loaded or handed over: m is the origin alone (docs/spec/dm-snapshot.md §7.5)

	gate     gate.Gate   // owners: writers, of their chunks, and a step, of its window
	stepping sync.Mutex  // one step at a time
	gathered []byte      // copyGathered's, for the next window
	ahead    *window     // copied, to be merged by the next step; stepping guards it
	failed   atomic.Bool // the last step failed
	failures atomic.Uint64
	requests atomic.Uint64 // to the origin, while m is active
}

// Requests is the number of requests to m so far. The loop that calls Step slows down while it grows.
func (m *Merging) Requests() uint64 { return m.requests.Load() }

// readAt reads the merged content. It does not wait for a step: the COW device keeps a chunk that is being merged,
// nothing is reserved there any more, and once the exception is gone the origin has the same bytes
// (docs/spec/dm-snapshot.md §7.5).
func (m *Merging) readAt(p []byte, off int64) (int, error) {
	m.requests.Add(1)
	o := m.origin
	if err := block.CheckRange("read", off, int64(len(p)), o.Size()); err != nil {
		return 0, err
	}
	st := m.store.Load()
	for done := int64(0); done < int64(len(p)); {
		pc := m.nextPiece(st, off+done, int64(len(p))-done)
		from, dev := m.place(pc)
		if _, err := dev.ReadAt(p[done:done+pc.n], from); err != nil {
			return int(done), err
		}
		done += pc.n
	}
	return len(p), nil
}

// nextPiece is nextPiece of the merged content. The exceptions of a store that is invalid but still in memory, because
// it was handed over, are ignored.
func (m *Merging) nextPiece(st *store.Store, off, n int64) piece {
	if m.invalid {
		return piece{off: off, n: n}
	}
	return nextPiece(st, off, n)
}

// place returns where a piece is kept.
func (m *Merging) place(pc piece) (int64, block.Device) {
	if pc.mapped {
		return pc.cow, m.cow
	}
	return pc.off, m.origin.dev
}

// change applies pl to n > 0 bytes at off. origin.mu is held for reading.
func (m *Merging) change(pl payload, off, n int64) error {
	m.requests.Add(1)
	st := m.store.Load()
	durable := pl.durable
	pl.durable = false
	for done := int64(0); done < n; {
		k, err := m.changePiece(st, pl.part(done, n-done), off+done, n-done)
		if err != nil {
			return err
		}
		done += k
	}
	if durable {
		return m.flush()
	}
	return nil
}

// changePiece applies the first piece of pl and returns its length. It waits while a step owns the piece's chunks;
// afterwards they are the origin's. When that step failed, the write fails with it (docs/spec/dm-snapshot.md §7.6).
func (m *Merging) changePiece(st *store.Store, pl payload, off, n int64) (int64, error) {
	pc := m.nextPiece(st, off, n)
	first, count := chunks(st.Layout(), pc.off, pc.n)
	failures := m.failures.Load()
	owned := m.gate.Own(span(first, count))
	defer owned.Release()
	if m.failures.Load() != failures {
		return 0, fmt.Errorf("%w while the write was held back", ErrMergeFailed)
	}
	pc = m.nextPiece(st, off, pc.n)
	if pc.mapped {
		// A store that failed may or may not have dropped the exception on disk. If it did, a write to its chunk would
		// be lost.
		if err := st.Err(); err != nil {
			return 0, err
		}
	} else if err := m.origin.preserve(pc.off, pc.n); err != nil {
		return 0, err
	}
	at, dev := m.place(pc)
	err := pl.part(0, pc.n).put(dev, at, pc.n)
	if pc.mapped && m.opts.onFull() != FullInvalidate && block.IsNoSpace(err) {
		// The chunk was trimmed and has no space on the file system.
		err = &noRoomError{m.opts.onFull() == FullPause, err}
	}
	return pc.n, err
}

// flush makes completed writes durable on both devices (docs/spec/dm-snapshot.md §7.5).
func (m *Merging) flush() error {
	st := m.store.Load()
	if errors.Is(st.Err(), store.ErrInvalid) {
		return m.origin.dev.Flush() // it is the origin alone
	}
	return errors.Join(st.Sync(), m.origin.dev.Flush())
}

// extents returns the holes of the merged content.
func (m *Merging) extents(off, n int64) ([]block.Extent, error) {
	if err := block.CheckRange("extents", off, n, m.origin.Size()); err != nil {
		return nil, err
	}
	if m.invalid {
		return block.Extents(m.origin.dev, off, n)
	}
	return gatherExtents(m.store.Load(), off, n, func(pc piece) ([]block.Extent, error) {
		at, dev := m.place(pc)
		return block.Extents(dev, at, pc.n)
	})
}

// Step merges the last exceptions of the store, at most max of them, and returns how many; with max 0 exactly the run
// that the kernel would merge (docs/spec/dm-snapshot.md §7.3). 0 and no error: the merge is complete.
//
// In order: the other snapshots keep what they show; new writes to the window wait, and those in flight are waited for;
// COW to origin, in the order of the origin; flush of the origin; the exceptions are dropped, durably; waiting writes
// continue, to the origin. Until the drop the same step can be repeated with the same result, so a crash at any point
// is harmless. The last Step, which finds nothing to merge, makes durable that the store is empty, and every completed
// write on both devices.
//
// A failed step leaves the exceptions where they are, fails the writes that waited for it, and sets the status "Merge
// failed". The next Step tries again; after a failure of the store it loads the store again first, so that memory
// agrees with the disk (docs/spec/dm-snapshot.md §8.2, H1, H2). That does not help after a failed flush, since the
// device fails all later ones: the error is also ErrReopen.
//
// When another snapshot, whose policy is to wait for space (FullPause), has none for the chunks that it must keep, Step
// changes nothing and returns that error at once, a block.RetryLater.
//
// Errors: ErrMergeFailed with its cause; the cause alone for an invalid store, and for a lack of space that the caller
// is to wait for. Steps exclude each other; everything else may be called meanwhile.
func (m *Merging) Step(max uint64) (merged uint64, err error) { return m.StepAhead(max, 0) }

// StepAhead is Step for a merge that has no clients. While the origin is flushed and the exceptions are dropped, it copies
// the ahead exceptions before them, which the next step merges, whatever its max is: the disk writes one window while
// the next is copied. When that copy fails, the next step copies again, and reports it.
//
// Writes to chunks that were copied ahead wait until the next step has merged them, or until CancelAhead or Close.
func (m *Merging) StepAhead(max, ahead uint64) (merged uint64, err error) {
	m.stepping.Lock()
	defer m.stepping.Unlock()
	err = m.origin.changing(func() error {
		merged, err = m.stepNow(max, ahead)
		return err
	})
	return merged, err
}

// CancelAhead forgets what StepAhead copied ahead. It waits for a step in progress.
func (m *Merging) CancelAhead() {
	m.stepping.Lock()
	defer m.stepping.Unlock()
	m.cancelAhead()
}

func (m *Merging) cancelAhead() {
	if m.ahead != nil {
		m.ahead.owned.Release()
		m.ahead = nil
	}
}

// A window is exceptions that a step merges, the last ones of the store in slot order: preserved for the other
// snapshots, owned in the gate, and copied.
type window struct {
	store      *store.Store // that they were read from
	exceptions []ondisk.Exception
	owned      gate.Owned
}

// stepNow does a step. stepping is held.
func (m *Merging) stepNow(max, ahead uint64) (merged uint64, err error) {
	m.origin.mu.RLock()
	defer m.origin.mu.RUnlock()
	if err := m.reload(); err != nil {
		m.cancelAhead()
		return 0, m.fail(storeReadError, err)
	}
	st := m.store.Load()
	if m.ahead != nil && m.ahead.store != st {
		m.cancelAhead()
	}
	if err := st.Err(); err != nil {
		m.cancelAhead()
		return 0, err
	}
	w := m.ahead
	m.ahead = nil
	if w == nil {
		exceptions, err := lastWindow(st, max)
		if err != nil {
			return 0, m.fail(storeReadError, fmt.Errorf("read the last exceptions: %w", err))
		}
		if len(exceptions) == 0 {
			if err := m.complete(st); err != nil {
				return 0, m.fail(storeWriteError, fmt.Errorf("make the end of the merge durable: %w", err))
			}
			m.failed.Store(false)
			return 0, nil
		}
		var line string
		if w, line, err = m.copyWindow(st, exceptions); err != nil {
			if waitsForRoom(err) {
				return 0, err
			}
			return 0, m.fail(line, err)
		}
	}
	defer w.owned.Release()
	copied := m.copyAhead(w, ahead)
	line, err := m.dropWindow(w)
	m.ahead = <-copied
	if err != nil {
		m.cancelAhead()
		return 0, m.fail(line, err)
	}
	m.failed.Store(false)
	return uint64(len(w.exceptions)), nil
}

// copyAhead begins to copy the max exceptions before w, and sends them, or nil if there are none or that failed.
func (m *Merging) copyAhead(w *window, max uint64) <-chan *window {
	copied := make(chan *window, 1)
	if max == 0 {
		copied <- nil
		return copied
	}
	all, err := w.store.Last(uint64(len(w.exceptions)) + max)
	if err != nil || len(all) <= len(w.exceptions) {
		copied <- nil
		return copied
	}
	go func() {
		next, _, err := m.copyWindow(w.store, all[:len(all)-len(w.exceptions)])
		if err != nil {
			next = nil
		}
		copied <- next
	}()
	return copied
}

// complete makes the empty store durable: when a step failed after it had cleared the slots, and st was loaded again,
// that may be in the cache only.
func (m *Merging) complete(st *store.Store) error {
	if err := st.Settle(); err != nil {
		return err
	}
	return m.flush()
}

// copyWindow has the other snapshots keep what the window covers, owns its chunks and copies them. line is the text of
// the event for err.
func (m *Merging) copyWindow(st *store.Store, exceptions []ondisk.Exception) (w *window, line string, err error) {
	runs := runsByOrigin(slices.Clone(exceptions))
	spans := make([]gate.Span, len(runs))
	for i, r := range runs {
		off, n := m.originRange(st.Layout(), r)
		if err := m.origin.preserve(off, n); err != nil {
			return nil, writeError, err
		}
		spans[i] = span(r.Old, r.Count)
	}
	owned := m.gate.Own(spans...)
	if err := m.copyRuns(st.Layout(), runs); err != nil {
		owned.Release()
		var ce *block.CopyError
		if errors.As(err, &ce) && ce.Op == "read" {
			return nil, readError, err
		}
		return nil, writeError, err
	}
	return &window{st, exceptions, owned}, "", nil
}

// dropWindow makes a copied window durable on the origin, then drops its exceptions. line is the text of the event for err.
func (m *Merging) dropWindow(w *window) (line string, err error) {
	if err := m.origin.dev.Flush(); err != nil {
		return flushError, fmt.Errorf("flush the origin: %w", err)
	}
	if err := w.store.DropLast(w.exceptions); err != nil {
		return storeWriteError, fmt.Errorf("clear the slots of merged chunks: %w", err)
	}
	return "", nil
}

// originRange is the byte range of a run on the origin, cut at its end, which the last chunk may extend past.
func (m *Merging) originRange(l ondisk.Layout, r store.Run) (off, n int64) {
	off, end := l.OriginRange(r.Old, r.Count, m.origin.dev.Size())
	return off, end - off
}

// lastWindow returns the exceptions that a step of at most max merges, 0 meaning the kernel's run.
func lastWindow(st *store.Store, max uint64) ([]ondisk.Exception, error) {
	if max > 0 {
		return st.Last(max)
	}
	r, err := st.LastRun()
	if err != nil || r.Count == 0 {
		return nil, err
	}
	return st.Last(r.Count)
}

// runsByOrigin sorts a window by origin chunk and joins what is consecutive on both sides.
func runsByOrigin(window []ondisk.Exception) []store.Run {
	slices.SortFunc(window, func(a, b ondisk.Exception) int { return cmp.Compare(a.Old, b.Old) })
	var runs []store.Run
	for _, e := range window {
		if k := len(runs) - 1; k >= 0 && runs[k].Old+ondisk.OriginChunk(runs[k].Count) == e.Old && runs[k].New+ondisk.COWChunk(runs[k].Count) == e.New {
			runs[k].Count++
		} else {
			runs = append(runs, store.Run{Old: e.Old, New: e.New, Count: 1})
		}
	}
	return runs
}

// reload opens the store again after it failed, past the cache (see store.Open): after a failed flush of cleared slots
// the cache shows an empty store. On an error the old store stays. stepping is held.
func (m *Merging) reload() error {
	st := m.store.Load()
	if !errors.Is(st.Err(), store.ErrFailed) {
		return nil
	}
	// Writers may still use the old store. It refuses their writes to chunks in the COW device, and both have the same
	// exceptions for all other chunks, so either can be used: the chunks for which the two differ were copied to the
	// origin before their drop failed.
	fresh, err := m.open()
	if err != nil {
		return fmt.Errorf("load the exception store again: %w", err)
	}
	m.store.Store(fresh)
	return nil
}

// What the kernel logs when a merge step fails: the texts of EventMergeFailed.
const (
	readError       = "Read error: shutting down merge"
	writeError      = "Write error: shutting down merge"
	flushError      = "Flush after merge failed: shutting down merge"
	storeReadError  = "Read error in exception store: shutting down merge"
	storeWriteError = "Write error in exception store: shutting down merge"
)

// fail marks the merge as failed because of err. line is the text of the event.
func (m *Merging) fail(line string, err error) error {
	m.failed.Store(true)
	m.failures.Add(1)
	err = fmt.Errorf("%w: %w", ErrMergeFailed, err)
	if m.origin.dev.Flush() != nil || m.cow.Flush() != nil {
		err = fmt.Errorf("%w; %w", err, ErrReopen)
	}
	notify(m.opts, Event{Kind: EventMergeFailed, Text: line, Err: err})
	return err
}

// Status returns the status of the merge.
func (m *Merging) Status() Status {
	s := Status{Target: TargetMerge, State: StateMerging, Overflowed: m.overflowed,
		Length: uint64(m.origin.Size()) / block.SectorSize, Store: m.opts.Store, Features: m.opts.Features}
	st := m.store.Load()
	if st == nil {
		return s
	}
	s.ChunkSectors, s.Exceptions, s.Usage = st.Layout().ChunkSectors, st.Len(), st.Usage()
	switch {
	case errors.Is(st.Err(), store.ErrInvalid):
		s.State = StateInvalid
	case m.failed.Load():
		s.State = StateMergeFailed
	}
	return s
}

// Store returns the store being merged.
func (m *Merging) Store() *store.Store { return m.store.Load() }

// Close deactivates the merge. A step in progress is completed first. When exceptions are left, the origin alone is a
// mixture of both contents: load the store again, as a merge or as a snapshot, with no request to the origin in
// between. A pending handover is cancelled. The COW device stays open.
func (m *Merging) Close() error {
	m.stepping.Lock()
	defer m.stepping.Unlock()
	m.cancelAhead()
	o := m.origin
	o.mu.Lock()
	defer o.mu.Unlock()
	if m.source != nil {
		m.source.mergeWaits, m.source = nil, nil
	}
	if o.waiting == m {
		o.waiting = nil
	}
	if o.merging.Load() != m {
		return nil
	}
	err := m.flush()
	o.merging.Store(nil)
	return err
}
