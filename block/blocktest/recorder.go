package blocktest

import (
	"bytes"
	"strings"
	"sync"

	"github.com/dmsnap/dmsnap/block"
)

// A Log is the operations of one or more Recorders in the order in which they began. The zero value is
// ready for use and records; its methods may be called concurrently.
type Log struct {
	mu     sync.Mutex
	paused bool
	next   int   // the N of the next operation is next+1
	ops    []*Op // in order of N
}

// Record puts a Recorder, whose operations carry the name, over a device.
func (l *Log) Record(name string, dev block.Device) *Recorder {
	return &Recorder{block.NewForward(dev), name, l}
}

// Ops returns a copy of the operations so far. Their Data is shared.
func (l *Log) Ops() []Op {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.copy()
}

// Take returns the operations so far and forgets them, in one step. The numbering continues.
func (l *Log) Take() []Op {
	l.mu.Lock()
	defer l.mu.Unlock()
	ops := l.copy()
	l.ops = nil
	return ops
}

func (l *Log) copy() []Op {
	ops := make([]Op, len(l.ops))
	for i, op := range l.ops {
		ops[i] = *op
	}
	return ops
}

// Clear forgets the operations so far.
func (l *Log) Clear() { l.Take() }

// Pause leaves out operations that begin from now on, until Resume.
func (l *Log) Pause() { l.pause(true) }

// Resume records operations again.
func (l *Log) Resume() { l.pause(false) }

func (l *Log) pause(paused bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.paused = paused
}

// String is the operations so far, one a line.
func (l *Log) String() string { return Lines(l.Ops()) }

// Lines prints operations one a line, for comparison with a golden file.
func Lines(ops []Op) string {
	var s strings.Builder
	for _, op := range ops {
		s.WriteString(op.String())
		s.WriteByte('\n')
	}
	return s.String()
}

// begin adds an operation, unless the log is paused; end must follow.
func (l *Log) begin(op Op) *Op {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.paused {
		return nil
	}
	l.next++
	op.N = l.next
	l.ops = append(l.ops, &op)
	return &op
}

// end notes what an operation returned. Under the lock, since Ops may be copying it.
func (l *Log) end(op *Op, err error) {
	if op == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	op.Err = err
	op.Ended = l.next + 1
}

// A Recorder passes everything on to a device and writes it down in a Log. Abilities that
// neither move data nor order it (Extents, Allocate, Refresh) are not written down.
type Recorder struct {
	block.Forward
	name string
	log  *Log
}

// record runs one operation and logs it. data is what it writes.
func (r *Recorder) record(op Op, data []byte, call func() error) error {
	op.Device, op.Data = r.name, bytes.Clone(data)
	logged := r.log.begin(op)
	err := call()
	r.log.end(logged, err)
	return err
}

// ReadCached does nothing: every read is one call of ReadAt.
func (r *Recorder) ReadCached([]block.Read) int { return 0 }

// ReadAt reads from the underlying device.
func (r *Recorder) ReadAt(p []byte, off int64) (n int, err error) {
	err = r.record(Op{Kind: Read, Off: off, Len: int64(len(p))}, nil, func() error {
		n, err = r.Forward.ReadAt(p, off)
		return err
	})
	return n, err
}

// WriteAt writes to the underlying device.
func (r *Recorder) WriteAt(p []byte, off int64) (n int, err error) {
	err = r.record(Op{Kind: Write, Off: off, Len: int64(len(p))}, p, func() error {
		n, err = r.Forward.WriteAt(p, off)
		return err
	})
	return n, err
}

// WriteDurableAt writes durably to the underlying device; it is one operation, also where that device needs a write and
// a flush.
func (r *Recorder) WriteDurableAt(p []byte, off int64) error {
	return r.record(Op{Kind: WriteDurable, Off: off, Len: int64(len(p))}, p, func() error {
		return block.WriteDurable(r.Forward, p, off)
	})
}

// Flush flushes the underlying device.
func (r *Recorder) Flush() error {
	return r.record(Op{Kind: Flush}, nil, r.Forward.Flush)
}

// ZeroAt zeroes a range of the underlying device, by writing where it has no other way.
func (r *Recorder) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	return r.record(Op{Kind: Zero, Off: off, Len: n, Flags: flags}, nil, func() error {
		return block.Zero(r.Forward, off, n, flags)
	})
}

// Discard discards a range of the underlying device.
func (r *Recorder) Discard(off, n int64) error {
	return r.record(Op{Kind: Discard, Off: off, Len: n}, nil, func() error {
		return block.Discard(r.Forward, off, n)
	})
}

// Grow makes the underlying device longer.
func (r *Recorder) Grow(size int64) error {
	return r.record(Op{Kind: Grow, Len: size}, nil, func() error { return r.Forward.Grow(size) })
}

// WriteLastAt is logged as a write and a flush.
func (r *Recorder) WriteLastAt(p []byte, off int64) error {
	write := r.log.begin(Op{Device: r.name, Kind: Write, Off: off, Len: int64(len(p)), Data: bytes.Clone(p)})
	r.log.end(write, nil)
	return r.record(Op{Kind: Flush}, nil, func() error { return block.WriteLast(r.Forward, p, off) })
}
