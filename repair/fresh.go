package repair

import (
	"context"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

const copyBytes = 1 << 20

// Fresh copies what is kept into a new store on dst, which has at least Size bytes, and makes it durable. Slots keep
// their order, chunks become dense. A chunk whose data can't be read is dropped and counts as lost, with the code
// Unreadable. The previous content of dst is lost.
func (p *Plan) Fresh(ctx context.Context, dst block.Device) error {
	format, err := store.OriginFormat(p.dev)
	if err != nil {
		return err
	}
	st, err := store.CreateFor(dst, p.l, true, format)
	if err != nil {
		return err
	}
	c := p.l.ChunkBytes()
	buf := make([]byte, max(c, copyBytes))
	kept := p.kept[:0] // those whose data could be read
	total := p.Bytes()
	for i := 0; i < len(p.kept); {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n := 1
		for i+n < len(p.kept) && int64(n+1)*c <= int64(len(buf)) && p.kept[i+n].New == p.kept[i].New+ondisk.COWChunk(n) {
			n++
		}
		es := p.kept[i : i+n]
		i += n
		b := buf[:int64(n)*c]
		if err := block.ReadSparse(p.dev, b, p.l.COWOffset(es[0].New)); err == nil {
			if err := copyIn(st, es, b); err != nil {
				return err
			}
			kept = append(kept, es...)
		} else {
			for _, e := range es { // an unreadable one affects no other
				if err := block.ReadSparse(p.dev, b[:c], p.l.COWOffset(e.New)); err != nil {
					p.dropped[e.Old] = check.Unreadable
					continue
				}
				if err := copyIn(st, []ondisk.Exception{e}, b[:c]); err != nil {
					return err
				}
				kept = append(kept, e)
			}
		}
		if p.o.Progress != nil {
			p.o.Progress(int64(i)*c, total)
		}
	}
	p.kept = kept
	if err := st.Sync(); err != nil {
		return err
	}
	return dst.Flush()
}

// copyIn adds exceptions, whose data is b, to a store.
func copyIn(st *store.Store, es []ondisk.Exception, b []byte) error {
	c := st.Layout().ChunkBytes()
	for len(es) > 0 {
		n := uint64(1)
		for n < uint64(len(es)) && es[n].Old == es[0].Old+ondisk.OriginChunk(n) {
			n++
		}
		r, err := st.Reserve(es[0].Old, n)
		if err != nil {
			return err
		}
		size := int64(r.Count) * c
		if err := block.WriteSparse(st.Device(), b[:size], st.Layout().COWOffset(r.New), block.AllHoles); err != nil {
			return fmt.Errorf("copy: %w", err)
		}
		if err := r.Commit(); err != nil {
			return err
		}
		es, b = es[r.Count:], b[size:]
	}
	return nil
}
