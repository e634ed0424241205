package compact

import (
	"cmp"
	"context"
	"iter"
	"slices"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// A stretch is adjacent chunks of a COW device.
type stretch struct {
	first ondisk.COWChunk
	count uint64
}

// Punch frees the space that the store on dev does not use: data chunks that no exception names, areas after the one
// with the end mark, and bytes after the last chunk. The header and all areas in use stay unchanged. It returns how
// many bytes were discarded, whether or not they took space before. Only whole blocks of 4 KiB are discarded.
//
// A chunk that is allocated later is written whole, and an area is zeroed before it is used (package store; the kernel
// does the same), so that the discarded content is never read. Punch may be interrupted at any time and started again.
//
// Errors: store.ErrInvalid, since the exceptions of an invalid store are not read, and their chunks would count as
// unused; ErrDamaged also for a warning of package check, since slots after a wrong end mark may be repairable; ctx's
// cause; those of dev.
func Punch(ctx context.Context, dev block.Device, progress func(done, total int64)) (given int64, err error) {
	st, err := open(ctx, dev, check.Note)
	if err != nil {
		return 0, err
	}
	used, err := inUse(ctx, dev, st)
	if err != nil {
		return 0, err
	}
	// The race considered: a process was killed in the middle of a merge, and the cleared slots are in the cache of the
	// operating system only. A power cut would bring them back, and their chunks would be holes.
	if err := dev.Flush(); err != nil {
		return 0, err
	}
	for off, n := range unused(st.Layout(), used, dev.Size()) {
		if ctx.Err() != nil {
			return given, context.Cause(ctx)
		}
		if err := block.Discard(dev, off, n); err != nil {
			return given, err
		}
		given += n
		if progress != nil {
			progress(off+n, dev.Size())
		}
	}
	return given, dev.Flush()
}

// inUse returns the chunks that must stay, ascending: header, areas up to that with the end mark, data. It reads the
// slots in order, in which data chunks usually ascend, so that the list is short however scattered the origin chunks
// are.
func inUse(ctx context.Context, dev block.Device, st *store.Store) ([]stretch, error) {
	l := st.Layout()
	used := []stretch{{0, 1}}
	for e, err := range store.Scan(dev, l) {
		if err == nil && e.Slot.Index == 0 {
			err = context.Cause(ctx)
		}
		if err != nil {
			return nil, err
		}
		if e.Slot.Index == 0 {
			used = appendChunk(used, l.AreaChunk(e.Slot.Area))
		}
		if !e.IsEnd() {
			used = appendChunk(used, e.New)
		}
	}
	slices.SortFunc(used, func(a, b stretch) int { return cmp.Compare(a.first, b.first) })
	return used, nil
}

// appendChunk adds chunk m, to the last range where it follows it.
func appendChunk(list []stretch, m ondisk.COWChunk) []stretch {
	if last := &list[len(list)-1]; last.first+ondisk.COWChunk(last.count) == m {
		last.count++
		return list
	}
	return append(list, stretch{m, 1})
}

// blockBytes is the usual allocation unit of file systems: less can't be freed.
const blockBytes = 4096

// unused yields offset and length, in bytes, of the space between the stretches and after them, as whole blocks.
func unused(l ondisk.Layout, used []stretch, size int64) iter.Seq2[int64, int64] {
	return func(yield func(off, n int64) bool) {
		at := int64(0)
		for _, s := range append(used, stretch{}) {
			end := l.COWOffset(s.first)
			if s.count == 0 {
				end = size
			}
			from, to := (at+blockBytes-1)&^(blockBytes-1), end&^(blockBytes-1)
			if end == size {
				to = end // a file's last block may be a short one
			}
			if from < to && !yield(from, to-from) {
				return
			}
			at = end + int64(s.count)<<l.Shift()
		}
	}
}
