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
	early := earlyFlush{dev: m.origin.dev}
	defer early.wait()
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

// earlyFlush has the disk begin to write what was copied, earlyBytes at a time, while more is copied: submitting many short
// writes takes as long as copying them.
type earlyFlush struct {
	dev              block.Device
	from, end, bytes int64
	begun            chan struct{} // closed when the last one was submitted
}

// copied adds n bytes, written between from and end. from is not before an earlier end.
func (f *earlyFlush) copied(from, end, n int64) {
	if f.bytes == 0 {
		f.from = from
	}
	f.end, f.bytes = end, f.bytes+n
	if f.bytes < earlyBytes {
		return
	}
	f.wait()
	begun, off, length := make(chan struct{}), f.from, f.end-f.from
	go func() {
		block.BeginFlush(f.dev, off, length)
		close(begun)
	}()
	f.begun, f.bytes = begun, 0
}

// wait returns when everything was submitted.
func (f *earlyFlush) wait() {
	if f.begun != nil {
		<-f.begun
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
		early.copied(off, off+k, k)
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
	byCOW := make([]int, len(runs)) // indices of runs
	for i := range byCOW {
		byCOW[i] = i
	}
	slices.SortFunc(byCOW, func(a, b int) int { return cmp.Compare(runs[a].New, runs[b].New) })
	content := make([][]byte, len(runs))
	end := int64(0)
	for len(byCOW) > 0 {
		start, first := end, runs[byCOW[0]].New
		for next := first; len(byCOW) > 0 && runs[byCOW[0]].New == next; byCOW = byCOW[1:] {
			r := runs[byCOW[0]]
			from := end
			end += int64(r.Count) << l.Shift()
			content[byCOW[0]] = buf[from:end]
			next += ondisk.COWChunk(r.Count)
		}
		if _, err := m.cow.ReadAt(buf[start:end], l.COWOffset(first)); err != nil {
			return &block.CopyError{Op: "read", Err: err}
		}
	}
	if err := m.writeGathered(l, runs, content); err != nil {
		return err
	}
	first, _ := m.originRange(l, runs[0])
	last, n := m.originRange(l, runs[len(runs)-1])
	early.copied(first, last+n, bytes)
	return nil
}

// writeGathered writes the runs' content to the origin, adjacent ones in one write.
func (m *Merging) writeGathered(l ondisk.Layout, runs []store.Run, content [][]byte) error {
	return scratch.With(scratch.Most, func(joined []byte) error {
		for len(runs) > 0 {
			p, k, n := content[0], 1, runs[0].Count
			for k < len(runs) && runs[k].Old == runs[0].Old+ondisk.OriginChunk(n) && len(p)+len(content[k]) <= scratch.Most {
				if k == 1 {
					p = append(joined[:0], p...)
				}
				p = append(p, content[k]...)
				n += runs[k].Count
				k++
			}
			off, size := m.originRange(l, store.Run{Old: runs[0].Old, Count: n})
			if err := block.WriteSparse(m.origin.dev, p[:size], off, block.LongHoles); err != nil {
				return &block.CopyError{Op: "write", Err: err}
			}
			runs, content = runs[k:], content[k:]
		}
		return nil
	})
}
