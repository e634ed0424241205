package snapshot

import (
	"maps"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/scratch"
)

// An origin write mustn't reach the disk before the exceptions are durable that keep what it replaces, and what
// is given to a file is on the disk whenever the kernel pleases. So a write either waits for two flushes of
// every COW device, or what it writes waits in memory, and many writes share the flushes:
//
//	WriteAt    copy to the COW devices · commit · hold           -> acknowledged
//	writeOut   Sync the stores · write what was held, in order
//	Flush      writeOut · flush the origin                       -> durable
//
// Everything held lies in chunks that every active snapshot has an exception for; that was so when it was
// put there, and before the list of snapshots changes all of it is written. So snapshots never look here.
const (
	heldUnit = 4096    // bytes of a heldBlock
	heldMost = 1 << 20 // bytes of a write that may be held
)

// held are the bytes that wait for the exceptions of what they replace.
type held struct {
	limit int64         // bytes; 0: nothing is held
	delay time.Duration // after which it is written out without being asked for

	writing sync.Mutex    // one round of writing out at a time; taken with Origin.mu held for reading or writing
	rounds  atomic.Uint64 // that have begun
	err     error         // of the last one; writing is held

	mu      sync.Mutex
	fresh   map[int64]*heldBlock // by offset / heldUnit
	leaving map[int64]*heldBlock // being written out; unchanged until that is done
	left    uint64               // how often leaving was emptied
	timer   *time.Timer

	blocks  atomic.Int64 // in both maps; changed with mu held
	failing atomic.Bool  // the last round failed
}

// A heldBlock is what is held of heldUnit bytes: the sectors whose bits are set.
type heldBlock struct {
	sectors uint8
	data    [heldUnit]byte
}

var heldBlocks = sync.Pool{New: func() any { return new(heldBlock) }}

// runs calls do for each stretch of bytes that b holds.
func (b *heldBlock) runs(do func(from, to int64)) {
	for left, at := uint(b.sectors), 0; left != 0; {
		skip := bits.TrailingZeros(left)
		n := bits.TrailingZeros(^(left >> skip))
		at += skip
		do(int64(at)*block.SectorSize, int64(at+n)*block.SectorSize)
		at, left = at+n, left>>(skip+n)
	}
}

// HoldWrites lets writes to the origin that are not FUA, and for which snapshots have to keep something, be
// acknowledged while their bytes are in memory: about limit bytes at most, and not much longer than delay. Reads
// see them; Flush makes them durable, like all others. A process that is killed loses them, as a disk with a volatile
// cache does when its power fails. Call it before the first write. By default nothing is held.
//
// Closing the last snapshot, or Flush, leaves nothing behind in memory.
func (o *Origin) HoldWrites(limit int64, delay time.Duration) {
	o.held.limit, o.held.delay = limit, delay
}

// holds reports whether a write is to be held: one that would have to wait, or that overlaps what waits.
func (h *held) holds(pl payload, off, n int64, waits bool) bool {
	return h.limit > 0 && pl.data != nil && !pl.durable && n <= heldMost && off%block.SectorSize == 0 && n%block.SectorSize == 0 &&
		(waits || h.overlaps(off, n))
}

// overlaps reports whether some of n > 0 bytes at off is held.
func (h *held) overlaps(off, n int64) bool {
	if h.blocks.Load() == 0 {
		return false
	}
	first, last := off/heldUnit, (off+n-1)/heldUnit
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, set := range []map[int64]*heldBlock{h.fresh, h.leaving} {
		if last-first < int64(len(set)) {
			for at := first; at <= last; at++ {
				if set[at] != nil {
					return true
				}
			}
			continue
		}
		for at := range set {
			if first <= at && at <= last {
				return true
			}
		}
	}
	return false
}

// put holds p, whole sectors at off. soon is called when it has been here for some time, or there is much of it.
func (h *held) put(p []byte, off int64, soon func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.fresh) == 0 {
		if h.fresh == nil {
			h.fresh = map[int64]*heldBlock{}
		}
		// When all is in place: a timer that fires before that finds nothing to do, and nobody sets it again.
		defer func() {
			if h.timer == nil {
				h.timer = time.AfterFunc(h.delay, soon)
			} else {
				h.timer.Reset(h.delay)
			}
		}()
	}
	for len(p) > 0 {
		at, in := off/heldUnit, off%heldUnit
		b := h.fresh[at]
		if b == nil {
			b = heldBlocks.Get().(*heldBlock)
			b.sectors = 0
			h.fresh[at] = b
			h.blocks.Add(1)
			if int64(len(h.fresh)) == h.limit/heldUnit/2 && h.timer != nil {
				h.timer.Reset(0)
			}
		}
		n := copy(b.data[in:], p)
		b.sectors |= uint8(1<<(n/block.SectorSize)-1) << (in / block.SectorSize)
		p, off = p[n:], off+int64(n)
	}
}

// full reports whether no more is to be held before some is written out.
func (h *held) full() bool { return h.blocks.Load()*heldUnit >= h.limit }

// lay puts what is held of len(p) bytes at off over p. h.mu is held.
func (h *held) lay(p []byte, off int64) {
	end := off + int64(len(p))
	for at := off / heldUnit; at*heldUnit < end; at++ {
		for _, b := range []*heldBlock{h.leaving[at], h.fresh[at]} { // the newer one last
			if b == nil {
				continue
			}
			b.runs(func(from, to int64) {
				start := at * heldUnit
				from, to = max(from, off-start), min(to, end-start)
				if from < to {
					copy(p[start+from-off:], b.data[from:to])
				}
			})
		}
	}
}

// readAt reads dev with what is held laid over it. Bytes that were held when the read began may have been written
// out, and be no longer here, when dev has been read: then dev is read again.
func (h *held) readAt(dev block.Device, p []byte, off int64) (int, error) {
	if h.blocks.Load() == 0 {
		return dev.ReadAt(p, off)
	}
	h.mu.Lock()
	left := h.left
	h.mu.Unlock()
	for {
		n, err := dev.ReadAt(p, off)
		if err != nil {
			return n, err
		}
		h.mu.Lock()
		if h.left == left {
			h.lay(p, off)
			h.mu.Unlock()
			return n, nil
		}
		left = h.left
		h.mu.Unlock()
	}
}

// take makes what is held ready to leave. What a failed round left goes before what came later: then again is true,
// and take is to be called once more. h.writing is held.
func (h *held) take() (again bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.leaving) > 0 {
		return len(h.fresh) > 0
	}
	h.leaving, h.fresh = h.fresh, nil
	return false
}

// gone forgets what has been written. h.writing is held.
func (h *held) gone() {
	h.mu.Lock()
	set := h.leaving
	h.leaving = nil
	h.left++
	h.blocks.Add(-int64(len(set)))
	h.mu.Unlock()
	for _, b := range set {
		heldBlocks.Put(b)
	}
}

// hold keeps p for a later round. o.mu is held for reading, and every active snapshot has exceptions, which may
// not be durable yet, for what p replaces.
func (o *Origin) hold(p []byte, off int64) error {
	h := &o.held
	if h.full() || h.failing.Load() {
		// After a failure nothing more is acknowledged before all is well again.
		if err := o.writeOut(); err != nil {
			return err
		}
	}
	h.put(p, off, o.writeOutSoon)
	return nil
}

// writeOutSoon is called by the timer. An error is there for the next write or Flush.
func (o *Origin) writeOutSoon() {
	// put arms the timer before its blocks are counted, with h.mu held: wait for it, or nothing is found to be written,
	// and nothing arms the timer again.
	o.held.mu.Lock()
	o.held.mu.Unlock()
	o.writeOutUnlocked()
}

// writeOutUnlocked is writeOut for callers without o.mu.
func (o *Origin) writeOutUnlocked() error {
	if o.held.blocks.Load() == 0 {
		return nil
	}
	o.mu.RLock()
	defer o.mu.RUnlock()
	return o.writeOut()
}

// writeOut writes to the origin's device all that was held when it was called; those who call it at the same
// time share the work. What can't be written stays held: a later call tries again, with the same bytes. o.mu is
// held for reading or writing.
//
// Errors: those of the device, and ErrNoRoom of a snapshot whose policy is to be protected.
func (o *Origin) writeOut() error {
	h := &o.held
	if h.blocks.Load() == 0 {
		return nil
	}
	mine := h.rounds.Load() + 1
	h.writing.Lock()
	defer h.writing.Unlock()
	if h.rounds.Load() >= mine {
		return h.err
	}
	h.rounds.Add(1)
	for again := true; again; {
		again = h.take()
		if h.err = o.writeOutTaken(); h.err != nil {
			break
		}
		h.gone()
	}
	h.failing.Store(h.err != nil)
	return h.err
}

// writeOutTaken is the order that matters: the exceptions are durable, then the origin changes. Whoever held
// something had committed its exceptions before.
func (o *Origin) writeOutTaken() error {
	if len(o.held.leaving) == 0 {
		return nil
	}
	var few [4]*Snapshot
	dirty := few[:0]
	for _, s := range o.snapshots {
		if s.active && s.store != nil && !s.invalid.Load() {
			dirty = append(dirty, s)
		}
	}
	if err := syncForOrigin(dirty); err != nil {
		return err
	}
	return writeHeld(o.dev, o.held.leaving)
}

// writeHeld writes blocks to dev in the order of their offsets, neighbours together.
func writeHeld(dev block.Device, set map[int64]*heldBlock) error {
	return scratch.With(scratch.Most, func(buf []byte) error {
		var at int64 // of buf[:n] on dev
		n := 0
		flush := func() error {
			if n == 0 {
				return nil
			}
			_, err := dev.WriteAt(buf[:n], at)
			n = 0
			return err
		}
		for _, k := range slices.Sorted(maps.Keys(set)) {
			b := set[k]
			var err error
			b.runs(func(from, to int64) {
				if err != nil {
					return
				}
				start := k*heldUnit + from
				if start != at+int64(n) || n+heldUnit > len(buf) {
					err = flush()
					at = start
				}
				n += copy(buf[n:], b.data[from:to])
			})
			if err != nil {
				return err
			}
		}
		return flush()
	})
}

// letHeldGo writes out what is held, before s leaves the list and its exceptions are nobody's concern. Bytes that
// were acknowledged are not dropped to protect s: when its exceptions can't be made durable it becomes invalid.
// origin.mu is held for writing.
func (s *Snapshot) letHeldGo() error {
	err := s.origin.writeOut()
	if err == nil || s.store == nil || s.noRoom(err) == nil {
		return err
	}
	s.invalidate(reasonIO, err)
	return s.origin.writeOut()
}
