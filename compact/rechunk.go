package compact

import (
	"bytes"
	"context"
	"fmt"
	"iter"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// pieceBytes is how much is read, compared or written at once.
const pieceBytes = 1 << 20

// A span is adjacent chunks of the origin, of the new size unless stated otherwise.
type span struct {
	first ondisk.OriginChunk
	count uint64 // ≥ 1
}

// bytesOf returns where on the disk a span of chunks of some layout begins and ends.
func (p *Plan) bytesOf(s span, l ondisk.Layout) (from, to int64) {
	return l.OriginRange(s.first, s.count, p.end)
}

// spans yields the new chunks of which something is stored, ascending and joined.
func (p *Plan) spans() iter.Seq[span] {
	return func(yield func(span) bool) {
		var last span
		for r := range p.old.Exceptions() {
			from, to := p.bytesOf(span{r.Old, r.Count}, p.old.Layout())
			s := span{first: p.to.OriginChunkAt(from)}
			s.count = uint64(p.to.OriginChunkAt(to-1)-s.first) + 1
			if end := last.first + ondisk.OriginChunk(last.count); last.count > 0 && s.first <= end {
				// A larger chunk of which two runs have a part joins them.
				last.count = uint64(s.first-last.first) + s.count
				continue
			}
			if last.count > 0 && !yield(last) {
				return
			}
			last = s
		}
		if last.count > 0 {
			yield(last)
		}
	}
}

// compare returns for each chunk of s whether it differs from the origin's: s is one chunk, or fits in a piece. Only
// the bytes that the origin has are compared. What it returns is valid until the next call.
func (p *Plan) compare(ctx context.Context, s span) ([]bool, error) {
	c := &p.same
	if c.view == nil {
		c.view, c.origin = make([]byte, pieceBytes), make([]byte, pieceBytes)
	}
	c.differs = append(c.differs[:0], make([]bool, s.count)...)
	off, end := p.bytesOf(s, p.to)
	for off < end && !(s.count == 1 && c.differs[0]) {
		a := c.view[:min(pieceBytes, end-off)]
		b := c.origin[:len(a)]
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if _, err := p.read(a, off); err != nil {
			return nil, err
		}
		if _, err := p.o.Origin.ReadAt(b, off); err != nil {
			return nil, fmt.Errorf("read the origin at byte %d: %w", off, err)
		}
		for len(a) > 0 {
			k := min(p.to.ChunkBytes(), int64(len(a)))
			c.differs[p.to.OriginChunkAt(off)-s.first] = !bytes.Equal(a[:k], b[:k])
			a, b, off = a[k:], b[k:], off+k
		}
	}
	return c.differs, nil
}

// read fills b with what the snapshot shows at byte off, and with zeros after the end of the disk. Holes are not read.
// It returns how many of these bytes are the origin's.
func (p *Plan) read(b []byte, off int64) (origins int64, err error) {
	inside := int64(0)
	if off >= 0 { // else the last chunk extends past the largest offset
		inside = max(0, p.end-off)
	}
	if inside < int64(len(b)) {
		clear(b[inside:])
		b = b[:inside]
	}
	for len(b) > 0 {
		_, _, n, stored := p.view.Place(off, int64(len(b)))
		if !stored {
			origins += n
		}
		if err := block.ReadSparse(p.view, b[:n], off); err != nil {
			return origins, err
		}
		b, off = b[n:], off+n
	}
	return origins, nil
}
