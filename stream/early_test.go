package stream_test

import (
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/stream"
)

// An earlyLog notes for each block whether its read was begun before it was read, and its flush after it was written.
type earlyLog struct {
	block.Forward  // zeroing is passed on, and not counted
	t              *testing.T
	mu             sync.Mutex
	begun, flushed map[int64]bool
	written        int
}

func newEarlyLog(t *testing.T, dev block.Device) *earlyLog {
	return &earlyLog{Forward: block.NewForward(dev), t: t, begun: map[int64]bool{}, flushed: map[int64]bool{}}
}

func (l *earlyLog) each(off, n int64, f func(block int64)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for at := off / stream.Block; at*stream.Block < off+n; at++ {
		f(at)
	}
}

func (l *earlyLog) BeginRead(off, n int64) { l.each(off, n, func(b int64) { l.begun[b] = true }) }

func (*earlyLog) ReadCached([]block.Read) int { return 0 } // all by ReadAt

func (l *earlyLog) ReadAt(p []byte, off int64) (int, error) {
	l.each(off, int64(len(p)), func(b int64) {
		if !l.begun[b] {
			l.t.Errorf("block %d is read, and nobody began to", b)
		}
	})
	return l.Forward.ReadAt(p, off)
}

func (l *earlyLog) WriteAt(p []byte, off int64) (int, error) {
	l.each(off, int64(len(p)), func(b int64) { l.written++; l.flushed[b] = false })
	return l.Forward.WriteAt(p, off)
}

func (l *earlyLog) BeginFlush(off, n int64) {
	l.each(off, n, func(b int64) {
		if _, written := l.flushed[b]; written {
			l.flushed[b] = true
		}
	})
}

// The disks read what the next frames need, and write what was applied, while frames are digested: a sender and a receiver
// that waited for each would be slower than both together.
func TestDisksAreNotWaitedFor(t *testing.T) {
	const size = 13 << 20
	old, new := blocktest.Pattern(size, 1), blocktest.Pattern(size, 2)
	copy(new[5<<20:], old[5<<20:6<<20])
	before, after := newEarlyLog(t, deviceWith(t, old)), newEarlyLog(t, deviceWith(t, new))
	changed := func(off, n int64) ([]block.Extent, error) { return []block.Extent{{Length: n, Flags: 1}}, nil }
	s := sent(t, stream.Of(before, after, changed), stream.SendOptions{Plain: true, DropUnchanged: true})

	target := newEarlyLog(t, deviceWith(t, old))
	if _, err := apply(target, s, stream.ApplyOptions{CompareFirst: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	late := 0
	for _, begun := range target.flushed {
		if !begun {
			late++
		}
	}
	if target.written != (size-1<<20)/stream.Block || late > 8<<20/stream.Block {
		t.Errorf("of %d blocks that were written, %d wait for the flush at the end", target.written, late)
	}
}
