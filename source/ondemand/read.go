package ondemand

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/layer"
	"github.com/dmsnap/dmsnap/source/cache"
	"github.com/dmsnap/dmsnap/source/remote"
)

// A request is one read. Its deadline begins when it first needs the server.
type request struct {
	d      *Disk
	ctx    context.Context
	cancel context.CancelFunc
}

func (d *Disk) newRequest() *request { return &request{d: d} }

// context returns the request's; the requests of one read follow each other.
func (r *request) context() context.Context {
	if r.ctx == nil {
		r.ctx, r.cancel = remote.WithTimeout(r.d.ctx, r.d.timeout)
	}
	return r.ctx
}

func (r *request) end() {
	if r.cancel != nil {
		r.cancel()
	}
}

// wanted is a part that is not in the cache, and where it goes; nil: into the cache alone.
type wanted struct {
	part
	to []byte
}

// ReadAt reads what is in the cache, and fetches the rest.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange("read", off, int64(len(p)), d.size); err != nil || len(p) == 0 {
		return 0, err
	}
	if !d.direct {
		d.ahead.note(off, int64(len(p)))
	}
	if d.readVerified(p, off) {
		return len(p), nil
	}
	r := d.newRequest()
	defer r.end()
	var missing []wanted
	for rest, at := p, off; len(rest) > 0; {
		part, err := d.find(at, r)
		if err != nil {
			return 0, unavailable{err}
		}
		to := rest[:min(part.n, int64(len(rest)))]
		rest, at = rest[len(to):], at+int64(len(to))
		if part.blob == nil {
			clear(to)
			continue
		}
		if d.record != nil {
			d.recordUnit(part.unit)
		}
		if !part.blob.cache.Read(to, part.unit, int(part.at), part.frame.Length, part.frame.Content) {
			missing = append(missing, wanted{part, to})
		}
	}
	if len(missing) == 0 {
		return len(p), nil
	}
	if err := d.fetchAll(r.context(), missing); err != nil {
		return 0, unavailable{err}
	}
	return len(p), nil
}

// unavailable is the error of a read that needs the server: it is block.ErrUnavailable, too.
type unavailable struct{ error }

func (u unavailable) Unwrap() error        { return u.error }
func (u unavailable) Is(target error) bool { return target == block.ErrUnavailable }

// readVerified reads a range within one unit that was read before.
func (d *Disk) readVerified(p []byte, off int64) bool {
	f, at := d.verified(off, int64(len(p)))
	if f == nil {
		return false
	}
	_, err := f.ReadAt(p, at)
	return err == nil
}

// verified returns where a range within one unit that was read before is in the cache: a file, and a byte of it, or nil.
func (d *Disk) verified(off, n int64) (f *os.File, at int64) {
	unit := off / layer.UnitBytes
	if d.units == nil || (off+n-1)/layer.UnitBytes != unit {
		return nil, 0
	}
	b := d.units.get(unit)
	if b == nil {
		return nil, 0
	}
	return b.cache.Verified(unit, int(off-unit*layer.UnitBytes))
}

// A gathered is reads of the files of the cache.
type gathered struct {
	files []*os.File // keeps them open
	fds   []int
	reads []block.Read
	of    []int // their numbers in the reads of the disk
}

var gatherings = sync.Pool{New: func() any { return new(gathered) }}

// ReadCached reads ranges of units that were read before, as far as they are in memory; see [block.CacheReader].
func (d *Disk) ReadCached(reads []block.Read) (done int) {
	if len(reads) < 2 || d.alone.Load() {
		return 0
	}
	g := gatherings.Get().(*gathered)
	defer g.put()
	for i := range reads {
		r := &reads[i]
		if r.Done || len(r.P) == 0 || block.CheckRange("read", r.Off, int64(len(r.P)), d.size) != nil {
			continue
		}
		if f, at := d.verified(r.Off, int64(len(r.P))); f != nil {
			g.files, g.fds, g.of = append(g.files, f), append(g.fds, int(f.Fd())), append(g.of, i)
			g.reads = append(g.reads, block.Read{P: r.P, Off: at})
		}
	}
	done, can := block.ReadCachedFiles(g.fds, g.reads)
	if !can {
		d.alone.Store(true)
	}
	for k, i := range g.of {
		if r := &reads[i]; g.reads[k].Done {
			r.Done = true
			if !d.direct {
				d.ahead.note(r.Off, int64(len(r.P)))
			}
		}
	}
	return done
}

// put ends the use of the files.
func (g *gathered) put() {
	clear(g.files)
	clear(g.reads)
	g.files, g.fds, g.reads, g.of = g.files[:0], g.fds[:0], g.reads[:0], g.of[:0]
	gatherings.Put(g)
}

func (d *Disk) recordUnit(unit int64) {
	if _, before := d.seen.LoadOrStore(unit, nil); !before {
		off := unit * layer.UnitBytes
		d.record(block.Range{Off: off, Length: min(layer.UnitBytes, d.size-off)})
	}
}

// Bounds of one request.
const (
	mostTogether = 1 << 20 // bytes
	mostUnits    = 32
)

// fetchAll fetches parts, in requests of neighbours side by side.
func (d *Disk) fetchAll(ctx context.Context, missing []wanted) error {
	var running sync.WaitGroup
	var mu sync.Mutex
	var failed error
	for len(missing) > 0 {
		n := 1
		for n < len(missing) && together(missing[0], missing[n-1], missing[n]) {
			n++
		}
		group := missing[:n]
		missing = missing[n:]
		do := func() {
			if err := d.fetch(ctx, group); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = err
			}
		}
		if len(missing) == 0 {
			do() // also the only one
			break
		}
		running.Go(do)
	}
	running.Wait()
	return failed
}

// together reports whether next can be in one request with the parts from first to last.
func together(first, last, next wanted) bool {
	if next.blob != first.blob || next.unit/cache.SegmentUnits != first.unit/cache.SegmentUnits || next.unit < last.unit || next.unit >= first.unit+mostUnits {
		return false
	}
	end := next.frame.Off + int64(next.frame.Packed)
	return (next.frame == last.frame || next.frame.Off == last.frame.Off+int64(last.frame.Packed)) && end-first.frame.Off <= mostTogether
}

// claim is [cache.Blob.Claim] where the cache has space for what is fetched. Else others fetch it, too.
func claim(ctx context.Context, c *cache.Blob, unit, n int64) (release func(), err error) {
	release, err = c.Claim(ctx, unit, n)
	if err != nil && ctx.Err() == nil {
		return func() {}, nil
	}
	return release, err
}

// verifyAttempts is how often data with a wrong digest is fetched.
const verifyAttempts = 3

// fetch fetches parts whose frames are neighbours, those that nobody else has fetched meanwhile.
func (d *Disk) fetch(ctx context.Context, group []wanted) error {
	first, last := group[0], group[len(group)-1]
	if !d.direct {
		release, err := claim(ctx, first.blob.cache, first.unit, last.unit-first.unit+1)
		if err != nil {
			return block.WithPath(d.name, err)
		}
		defer release()
	}
	var err error
	for n := 1; ; n++ {
		rest := group[:0:0]
		for _, w := range group {
			if w.to == nil && w.blob.cache.Has(w.unit) || w.to != nil && w.blob.cache.Read(w.to, w.unit, int(w.at), w.frame.Length, w.frame.Content) {
				continue
			}
			rest = append(rest, w)
		}
		for len(rest) > 0 && err == nil {
			k := 1
			for k < len(rest) && together(rest[0], rest[k-1], rest[k]) {
				k++
			}
			err = d.receive(ctx, rest[:k])
			rest = rest[k:]
		}
		if err == nil || n == verifyAttempts || !errors.Is(err, layer.ErrCorrupt) {
			return err
		}
		err = nil
	}
}

// A received is memory for one request.
type received struct {
	packed  [mostTogether]byte
	content [mostUnits*layer.UnitBytes + layer.Spare]byte
	digests [mostUnits]layer.Digest
}

var memories = sync.Pool{New: func() any { return new(received) }}

// slotWait is how long a read waits for one of the slots: those that have them may wait for answers that never come.
const slotWait = time.Second

// slot waits until fewer requests are in flight, a read no longer than slotWait.
func (d *Disk) slot(ctx context.Context, read bool) (release func(), err error) {
	select {
	case d.slots <- struct{}{}:
		return func() { <-d.slots }, nil
	default:
	}
	var enough <-chan time.Time
	if read {
		enough = time.After(slotWait)
	}
	select {
	case d.slots <- struct{}{}:
		return func() { <-d.slots }, nil
	case <-enough:
		return func() {}, nil
	case <-ctx.Done():
		return nil, block.WithPath(d.name, fmt.Errorf("wait for other requests: %w", context.Cause(ctx)))
	}
}

// receive makes one request, verifies what it received, and keeps it.
func (d *Disk) receive(ctx context.Context, group []wanted) error {
	release, err := d.slot(ctx, group[0].to != nil)
	if err != nil {
		return err
	}
	defer release()
	memory := memories.Get().(*received)
	defer memories.Put(memory)
	first, last := group[0].frame, group[len(group)-1].frame
	packed := memory.packed[:last.Off+int64(last.Packed)-first.Off]
	b := group[0].blob
	if err := b.remote.ReadRange(ctx, packed, first.Off); err != nil {
		return err
	}
	d.requests.Add(1)
	d.received.Add(int64(len(packed)))
	run := keeping{b: b, contents: memory.content[:], room: memory.digests[:0]}
	if b.plain {
		run.contents = packed
	}
	at := 0
	for i := 0; i < len(group); {
		f := group[i].frame
		content := packed[f.Off-first.Off:][:f.Packed]
		digest := f.Content
		if b.plain {
			digest = layer.DigestOf(content)
		} else {
			var err error
			if content, err = f.Unpack(memory.content[at:], content); err != nil {
				return block.WithPath(d.name, err)
			}
		}
		unit := group[i].unit
		for ; i < len(group) && group[i].frame == f; i++ {
			copy(group[i].to, content[group[i].at:])
		}
		if !d.direct {
			run.add(unit, at, f.Length, digest)
		}
		at += f.Length
	}
	run.put()
	return nil
}

// keeping gathers consecutive units that are written to the cache together. Without space in the cache the disk can be read
// nevertheless.
type keeping struct {
	b        *blob
	contents []byte         // of all units, one after the other
	room     []layer.Digest // for digests

	unit     int64 // the first one
	from, to int   // its content begins, the last one's ends
	digests  []layer.Digest
}

// add adds a unit of n bytes whose content begins at byte at of contents.
func (k *keeping) add(unit int64, at, n int, digest layer.Digest) {
	if have := len(k.digests); have == 0 || unit != k.unit+int64(have) || k.to != at || at-k.from != have*layer.UnitBytes {
		k.put()
		k.unit, k.from, k.digests = unit, at, k.room
	}
	k.to, k.digests = at+n, append(k.digests, digest)
}

func (k *keeping) put() {
	if len(k.digests) > 0 {
		k.b.cache.PutAll(k.unit, k.contents[k.from:k.to], k.digests)
	}
}

// prefetch fetches a range into the cache.
func (d *Disk) prefetch(from, to int64) error {
	r := d.newRequest()
	defer r.end()
	var missing []wanted
	for to = min(to, d.size); from >= 0 && from < to; {
		p, err := d.find(from, r)
		if err != nil {
			return err
		}
		if p.blob != nil && !p.blob.cache.Has(p.unit) && (len(missing) == 0 || missing[len(missing)-1].frame != p.frame) {
			missing = append(missing, wanted{p, nil})
		}
		from += p.n
		if len(missing) >= 4*mostTogether/layer.UnitBytes || from >= to {
			if err := d.fetchAll(r.context(), missing); err != nil {
				return err
			}
			missing = missing[:0]
			r.end()
			r.ctx, r.cancel = nil, nil
		}
	}
	return nil
}

// BeginRead begins to fetch a range.
func (d *Disk) BeginRead(off, n int64) {
	if block.CheckRange("read", off, n, d.size) == nil {
		d.ahead.begin(off, min(off+n, off+aheadBytes))
	}
}

// Reads in order are fetched ahead, in pieces side by side, as far as they have been in order.
const (
	aheadAfter = 1 << 20 // bytes that were read in order
	aheadPiece = mostUnits * layer.UnitBytes
	aheadBytes = 8 * aheadPiece
)

// readahead recognises reads in order, also where several are in flight and begin in another order.
type readahead struct {
	d       *Disk
	next    atomic.Int64 // where the reads in order have ended
	run     atomic.Int64 // bytes that were read in order
	until   atomic.Int64 // fetched ahead to here
	running atomic.Int32
}

// note is called for each read.
func (a *readahead) note(off, n int64) {
	next, end := a.next.Load(), off+n
	if off < next-4*n || off > next+4*n {
		a.next.Store(end)
		a.run.Store(n)
		a.until.Store(0)
		return
	}
	end = max(next, end)
	a.next.Store(end)
	run := a.run.Add(n)
	if run < aheadAfter {
		return
	}
	from, to := max(a.until.Load(), end), end+min(run, aheadBytes)
	if run > aheadPiece {
		to -= to % aheadPiece
	}
	if to = min(to, a.d.size); to-from >= min(run/2, aheadPiece) || from < to && to == a.d.size {
		a.until.Store(to)
		a.begin(from, to)
	}
}

// begin fetches a range in the background, unless enough is in flight.
func (a *readahead) begin(from, to int64) {
	for from < to {
		end := min(to, (from/aheadPiece+1)*aheadPiece)
		if a.running.Add(1) > 2*aheadBytes/aheadPiece || a.d.ctx.Err() != nil {
			a.running.Add(-1)
			return
		}
		piece := from
		a.d.background.Go(func() {
			defer a.running.Add(-1)
			a.d.prefetch(piece, end) // the read itself reports what is wrong
		})
		from = end
	}
}
