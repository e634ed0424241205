package ondemand

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/layer"
	"github.com/dmsnap/dmsnap/source/cache"
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
		r.ctx, r.cancel = context.WithTimeoutCause(r.d.ctx, r.d.timeout, errTimeout)
	}
	return r.ctx
}

func (r *request) end() {
	if r.cancel != nil {
		r.cancel()
	}
}

var errTimeout = fmt.Errorf("the data was not received in time: %w", context.DeadlineExceeded)

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
	d.ahead.note(off, int64(len(p)))
	if d.readVerified(p, off) {
		return len(p), nil
	}
	r := d.newRequest()
	defer r.end()
	var missing []wanted
	for rest, at := p, off; len(rest) > 0; {
		part, err := d.find(at, r)
		if err != nil {
			return 0, err
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
		return 0, err
	}
	return len(p), nil
}

// readVerified reads a range within one unit that was read before.
func (d *Disk) readVerified(p []byte, off int64) bool {
	unit := off / layer.UnitBytes
	if d.units == nil || (off+int64(len(p))-1)/layer.UnitBytes != unit {
		return false
	}
	b := d.units.get(unit)
	return b != nil && b.cache.ReadVerified(p, unit, int(off-unit*layer.UnitBytes))
}

func (d *Disk) recordUnit(unit int64) {
	if _, before := d.seen.LoadOrStore(unit, nil); !before {
		off := unit * layer.UnitBytes
		d.record(block.Range{Off: off, Length: min(layer.UnitBytes, d.size-off)})
	}
}

// mostTogether bounds the bytes of one request.
const mostTogether = 1 << 20

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
	if next.blob != first.blob || next.unit/cache.SegmentUnits != first.unit/cache.SegmentUnits || next.unit < last.unit {
		return false
	}
	end := next.frame.Off + int64(next.frame.Packed)
	return (next.frame == last.frame || next.frame.Off == last.frame.Off+int64(last.frame.Packed)) && end-first.frame.Off <= mostTogether
}

// verifyAttempts is how often data with a wrong digest is fetched.
const verifyAttempts = 3

// fetch fetches parts whose frames are neighbours, those that nobody else has fetched meanwhile.
func (d *Disk) fetch(ctx context.Context, group []wanted) error {
	first, last := group[0], group[len(group)-1]
	release, err := first.blob.cache.Claim(ctx, first.unit, last.unit-first.unit+1)
	if err != nil {
		return fmt.Errorf("%s: %w", d.name, err)
	}
	defer release()
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

// receive makes one request, verifies what it received, and keeps it.
func (d *Disk) receive(ctx context.Context, group []wanted) error {
	select {
	case d.slots <- struct{}{}:
		defer func() { <-d.slots }()
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", d.name, context.Cause(ctx))
	}
	first, last := group[0].frame, group[len(group)-1].frame
	packed := make([]byte, last.Off+int64(last.Packed)-first.Off)
	b := group[0].blob
	if err := b.remote.ReadRange(ctx, packed, first.Off); err != nil {
		return err
	}
	d.requests.Add(1)
	d.received.Add(int64(len(packed)))
	memory := layer.Buffer()
	defer layer.Recycle(memory)
	for i := 0; i < len(group); {
		f := group[i].frame
		content := packed[f.Off-first.Off:][:f.Packed]
		digest := f.Content
		if b.plain {
			digest = layer.DigestOf(content)
		} else {
			var err error
			if content, err = f.Unpack(memory, content); err != nil {
				return fmt.Errorf("%s: %w", d.name, err)
			}
		}
		unit := group[i].unit
		for ; i < len(group) && group[i].frame == f; i++ {
			copy(group[i].to, content[group[i].at:])
		}
		// Without space in the cache the disk can be read nevertheless.
		b.cache.Put(unit, content, digest)
	}
	return nil
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

// Reads in order are fetched ahead.
const (
	aheadAfter = 256 << 10 // bytes that were read in order
	aheadBytes = 8 << 20
)

// readahead recognises reads in order.
type readahead struct {
	d       *Disk
	next    atomic.Int64 // where the last read ended
	run     atomic.Int64 // bytes that were read in order
	until   atomic.Int64 // fetched ahead to here
	running atomic.Int32
}

// note is called for each read.
func (a *readahead) note(off, n int64) {
	if a.next.Swap(off+n) != off {
		a.run.Store(n)
		a.until.Store(0)
		return
	}
	if a.run.Add(n) < aheadAfter {
		return
	}
	end := off + n
	until := max(a.until.Load(), end)
	if until-end > aheadBytes/2 || until >= a.d.size {
		return
	}
	to := min(a.d.size, end+aheadBytes)
	a.until.Store(to)
	a.begin(until, to)
}

// begin fetches a range in the background, unless enough is under way.
func (a *readahead) begin(from, to int64) {
	if a.running.Add(1) > 4 || a.d.ctx.Err() != nil {
		a.running.Add(-1)
		return
	}
	a.d.background.Go(func() {
		defer a.running.Add(-1)
		a.d.prefetch(from, to) // the read itself reports what is wrong
	})
}
