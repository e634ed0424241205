package snapshot

import (
	"cmp"
	"slices"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/scratch"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// gatherBytes is the size of the buffer in which runs are collected to be merged in the order of the origin, in bytes.
const gatherBytes = 32 << 20

// earlyBytes is how much is copied before the disk starts to write it, while the next is copied, so that less is left
// for the flush at the end of the window.
const earlyBytes = 8 << 20

// copyRuns copies the runs, ascending by origin chunk, from the COW device to the origin.
//
// Runs may be adjacent in the COW device and far apart on the origin, or the other way round. So as many short runs as
// fit are collected in memory: they are read in the order of the COW device and written in the order of the origin,
// adjacent ones in one operation. Long runs are copied directly.
func (m *Merging) copyRuns(l ondisk.Layout, runs []store.Run) error {
	var early earlyFlush
	for len(runs) > 0 {
		k, bytes := 1, int64(runs[0].Count)<<l.Shift()
		for bytes < scratch.Most && k < len(runs) {
			next := int64(runs[k].Count) << l.Shift()
			if next >= scratch.Most || bytes+next > gatherBytes {
				break
			}
			bytes += next
			k++
		}
		var err error
		if k == 1 {
			err = m.copyRun(l, runs[0], &early)
		} else {
			err = m.copyGathered(l, runs[:k], bytes, &early)
		}
		if err != nil {
			return err
		}
		runs = runs[k:]
	}
	return nil
}

// earlyFlush has the disk begin to write what was copied, earlyBytes at a time.
type earlyFlush struct{ from, end, bytes int64 }

// copied adds n bytes, written to dev between from and end. from is not before an earlier end.
func (f *earlyFlush) copied(dev block.Device, from, end, n int64) {
	if f.bytes == 0 {
		f.from = from
	}
	f.end, f.bytes = end, f.bytes+n
	if f.bytes >= earlyBytes {
		block.BeginFlush(dev, f.from, f.end-f.from)
		*f = earlyFlush{}
	}
}

// copyRun copies one run.
func (m *Merging) copyRun(l ondisk.Layout, r store.Run, early *earlyFlush) error {
	off, n := m.originRange(l, r)
	from := l.COWOffset(r.New)
	for n > 0 {
		k := min(n, earlyBytes)
		if err := block.Copy(m.origin.dev, off, m.cow, from, k, block.LongHoles, nil); err != nil {
			return err
		}
		early.copied(m.origin.dev, off, off+k, k)
		off, from, n = off+k, from+k, n-k
	}
	return nil
}

// copyGathered copies runs of a total of bytes bytes through one buffer, which holds them in the order of the COW
// device.
func (m *Merging) copyGathered(l ondisk.Layout, runs []store.Run, bytes int64, early *earlyFlush) error {
	if int64(cap(m.gathered)) < bytes {
		m.gathered = make([]byte, bytes)
	}
	buf := m.gathered[:bytes]
	byCOW := slices.Clone(runs)
	slices.SortFunc(byCOW, func(a, b store.Run) int { return cmp.Compare(a.New, b.New) })
	at := make(map[ondisk.COWChunk]int64, len(byCOW)) // where in buf a run begins
	end := int64(0)
	for i := 0; i < len(byCOW); {
		start, first := end, byCOW[i].New
		for next := first; i < len(byCOW) && byCOW[i].New == next; i++ {
			at[next] = end
			end += int64(byCOW[i].Count) << l.Shift()
			next += ondisk.COWChunk(byCOW[i].Count)
		}
		if _, err := m.cow.ReadAt(buf[start:end], l.COWOffset(first)); err != nil {
			return &block.CopyError{Op: "read", Err: err}
		}
	}
	if err := m.writeGathered(l, runs, func(r store.Run) []byte {
		return buf[at[r.New]:][:int64(r.Count)<<l.Shift()]
	}); err != nil {
		return err
	}
	first, _ := m.originRange(l, runs[0])
	last, n := m.originRange(l, runs[len(runs)-1])
	early.copied(m.origin.dev, first, last+n, bytes)
	return nil
}

// writeGathered writes the runs' content to the origin, adjacent ones in one write.
func (m *Merging) writeGathered(l ondisk.Layout, runs []store.Run, content func(store.Run) []byte) error {
	return scratch.With(scratch.Most, func(joined []byte) error {
		for len(runs) > 0 {
			p, k, n := content(runs[0]), 1, runs[0].Count
			for k < len(runs) && runs[k].Old == runs[0].Old+ondisk.OriginChunk(n) {
				q := content(runs[k])
				if len(p)+len(q) > scratch.Most {
					break
				}
				if k == 1 {
					p = append(joined[:0], p...)
				}
				p = append(p, q...)
				n += runs[k].Count
				k++
			}
			off, size := m.originRange(l, store.Run{Old: runs[0].Old, Count: n})
			if err := block.WriteSparse(m.origin.dev, p[:size], off, block.LongHoles); err != nil {
				return &block.CopyError{Op: "write", Err: err}
			}
			runs = runs[k:]
		}
		return nil
	})
}
