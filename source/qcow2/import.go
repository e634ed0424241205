package qcow2

import (
	"context"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// importBytes is how much of a store is written at once.
const importBytes = 1 << 20

// Import adds what the overlay holds to st, a new and empty store over the overlay's backing file, and makes it durable:
// an exception for each chunk of which the overlay holds a part, zeros included. Chunks that the overlay holds only in
// part are filled up from the image's backing file, so the image must be opened with it. progress, where not nil, is
// called with the byte of the disk that was reached.
//
// A store has no size of its own: the disk must be as large as the origin that the store is for.
//
// Errors: ctx's cause, store.ErrFull, failed reads and writes. The store holds a part then.
func Import(ctx context.Context, st *store.Store, overlay *Image, progress func(reached int64)) (chunks uint64, err error) {
	l, fill := st.Layout(), store.NewFiller(st, importBytes)
	next := ondisk.OriginChunk(0) // chunks before it are done
	for off := int64(0); off < overlay.Size(); {
		held, n, err := overlay.Held(off, overlay.Size()-off)
		if err != nil {
			return chunks, err
		}
		if held {
			first, end := max(next, l.OriginChunkAt(off)), l.OriginChunkAt(off+n-1)+1
			if first < end {
				err := fill.Add(first, uint64(end-first), func(p []byte, at int64) error {
					if ctx.Err() != nil {
						return context.Cause(ctx)
					}
					return readPadded(overlay, p, at, "the overlay")
				})
				if err != nil {
					return chunks, err
				}
				chunks, next = chunks+uint64(end-first), end
			}
		}
		off += n
		if progress != nil {
			progress(off)
		}
		if ctx.Err() != nil {
			return chunks, context.Cause(ctx)
		}
	}
	if err := fill.Flush(); err != nil {
		return chunks, err
	}
	if err := st.Sync(); err != nil {
		return chunks, fmt.Errorf("make the new store durable: %w", err)
	}
	dev := st.Device()
	end := int64(l.ChunksNeeded(chunks)) << l.Shift()
	if end < dev.Size() { // space that was set aside for further chunks
		if err := block.Discard(dev, end, dev.Size()-end); err != nil {
			return chunks, err
		}
	}
	return chunks, dev.Flush()
}
