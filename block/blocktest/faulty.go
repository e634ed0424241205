package blocktest

import (
	"errors"
	"fmt"
	"sync"

	"github.com/dmsnap/dmsnap/block"
)

// A Faulty passes operations on to a device, except those that its Decide function fails and those
// that are held. Its methods may be called concurrently.
//
// It is as strict as block.File (see [RunFailedFlush]): once a Flush or a durable write failed, every later one fails
// the same way, and writes nothing. Abilities that
// neither move data nor order it (Extents, Allocate, Refresh) are passed on without being counted.
type Faulty struct {
	block.Forward

	mu     sync.Mutex
	decide Decide
	count  int
	holds  []*Hold
	failed error // of the first Flush or durable write that failed
}

// Decide decides the result of an operation: nil passes it on, an error fails it without touching the device, and a
// *[ShortError] fails it halfway. It may be called concurrently, and may block, which delays that operation alone.
type Decide func(op Op) error

// A ShortError fails an operation after part of it was done.
type ShortError struct {
	Done int64 // bytes that reach the device, or the reader, before the failure
	Err  error
}

func (e *ShortError) Error() string { return fmt.Sprintf("after %d bytes: %v", e.Done, e.Err) }

func (e *ShortError) Unwrap() error { return e.Err }

// NewFaulty returns a device that fails as decide says; nil fails nothing.
func NewFaulty(dev block.Device, decide Decide) *Faulty {
	return &Faulty{Forward: block.NewForward(dev), decide: decide}
}

// FailNth fails the n-th operation, counted from 1 over all kinds, and no other.
func FailNth(n int, err error) Decide {
	return func(op Op) error {
		if op.N == n {
			return err
		}
		return nil
	}
}

// FailFrom fails the n-th operation and all that follow: a disk that has failed.
func FailFrom(n int, err error) Decide {
	return func(op Op) error {
		if op.N >= n {
			return err
		}
		return nil
	}
}

// FailEvery fails the n-th operation, the 2n-th and so on, over all kinds; with 2 every second one.
func FailEvery(n int, err error) Decide {
	return func(op Op) error {
		if op.N%n == 0 {
			return err
		}
		return nil
	}
}

// FailKind fails all operations of a kind.
func FailKind(k Kind, err error) Decide {
	return func(op Op) error {
		if op.Kind == k {
			return err
		}
		return nil
	}
}

// Set replaces the function that decides, for operations that begin after it.
func (f *Faulty) Set(decide Decide) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.decide = decide
}

// Count returns how many operations began so far. A test that is to fail each operation once runs
// without faults first and then from 1 to Count.
func (f *Faulty) Count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.count
}

// A Hold stops one operation, or with Hang many, until it is released.
type Hold struct {
	match   func(Op) bool
	all     bool // stays in force until it is released
	reached chan Op
	release chan struct{}
	once    sync.Once
}

// Hold stops the first operation that begins after it and that match accepts, before it touches the underlying device.
// match must not call the Faulty. Use it as
//
//	h := dev.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Read && op.Overlaps(0, 4096) })
//	defer h.Release()
//	go read()
//	<-h.Reached()
//	... // what must happen, or must wait, while the read is under way
//	h.Release()
func (f *Faulty) Hold(match func(Op) bool) *Hold { return f.hold(match, false) }

// Hang stops every operation that begins after it and that match accepts: a disk that does not answer. They go on
// when the Hold is released, and Reached delivers the first one.
func (f *Faulty) Hang(match func(Op) bool) *Hold { return f.hold(match, true) }

func (f *Faulty) hold(match func(Op) bool, all bool) *Hold {
	h := &Hold{match: match, all: all, reached: make(chan Op, 1), release: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.holds = append(f.holds, h)
	return h
}

// Reached delivers the operation, once, when it is there and being held.
func (h *Hold) Reached() <-chan Op { return h.reached }

// Release lets the operation go, or pass if it has not come yet. Further calls do nothing.
func (h *Hold) Release() { h.once.Do(func() { close(h.release) }) }

// admit counts an operation, holds it if it is to be held, and returns what was decided.
func (f *Faulty) admit(op Op) error {
	f.mu.Lock()
	f.count++
	op.N = f.count
	decide := f.decide
	hold := f.takeHold(op)
	f.mu.Unlock()
	if hold != nil {
		select {
		case hold.reached <- op:
		default: // not the first one that hangs
		}
		<-hold.release
	}
	if decide == nil {
		return nil
	}
	return decide(op)
}

// takeHold returns the first hold that matches, under f.mu. The operation uses it up, unless it holds all.
func (f *Faulty) takeHold(op Op) *Hold {
	for i, h := range f.holds {
		if h.match(op) {
			if h.all {
				return h
			}
			f.holds = append(f.holds[:i:i], f.holds[i+1:]...)
			return h
		}
	}
	return nil
}

// short returns how many of n bytes to transfer before returning err.
func short(err error, n int64) int64 {
	if e, ok := err.(*ShortError); ok {
		return max(0, min(e.Done, n))
	}
	return 0
}

// ReadCached does nothing: every read is one call of ReadAt.
func (f *Faulty) ReadCached([]block.Read) int { return 0 }

// ReadAt reads from the underlying device.
func (f *Faulty) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange("read", off, int64(len(p)), f.Size()); err != nil {
		return 0, err
	}
	if err := f.admit(Op{Kind: Read, Off: off, Len: int64(len(p))}); err != nil {
		n, err2 := f.Forward.ReadAt(p[:short(err, int64(len(p)))], off)
		if err2 != nil {
			err = err2
		}
		return n, err
	}
	return f.Forward.ReadAt(p, off)
}

// WriteAt writes to the underlying device.
func (f *Faulty) WriteAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange("write", off, int64(len(p)), f.Size()); err != nil {
		return 0, err
	}
	if err := f.admit(Op{Kind: Write, Off: off, Len: int64(len(p))}); err != nil {
		return f.writePart(p, off, err)
	}
	return f.Forward.WriteAt(p, off)
}

// writePart writes what a failed write leaves behind.
func (f *Faulty) writePart(p []byte, off int64, err error) (int, error) {
	n, err2 := f.Forward.WriteAt(p[:short(err, int64(len(p)))], off)
	if err2 != nil {
		err = err2
	}
	return n, err
}

// WriteDurableAt writes durably to the underlying device. The part that a ShortError leaves behind is not durable. A
// lack of space below, for p itself, fails no Flush; an ENOSPC that is decided here is one of making durable.
func (f *Faulty) WriteDurableAt(p []byte, off int64) error {
	if err := block.CheckRange("write", off, int64(len(p)), f.Size()); err != nil {
		return err
	}
	var noSpace error
	failed := f.synced(Op{Kind: WriteDurable, Off: off, Len: int64(len(p))}, func(err error) error {
		if err != nil {
			_, err = f.writePart(p, off, err)
			return err
		}
		err = block.WriteDurable(f.Forward, p, off)
		if block.IsNoSpace(err) {
			if _, again := f.Forward.WriteAt(p, off); block.IsNoSpace(again) { // as block.File finds out
				noSpace = err
				return nil
			}
		}
		return err
	})
	if failed != nil {
		return failed
	}
	return noSpace
}

// synced admits an operation that makes something durable. It returns the first failure of such an operation, if there
// was one, else what call returns, which is passed what was decided. An operation that is refused because the device is
// read-only fails no other.
func (f *Faulty) synced(op Op, call func(decided error) error) error {
	decided := f.admit(op)
	if errors.Is(decided, block.ErrReadOnly) {
		return decided
	}
	f.mu.Lock()
	failed := f.failed
	f.mu.Unlock()
	if failed != nil {
		return failed
	}
	err := call(decided)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failed == nil {
		f.failed = err
	}
	return f.failed // also of one that failed beside this one
}

// Flush flushes the underlying device.
func (f *Faulty) Flush() error {
	return f.synced(Op{Kind: Flush}, func(err error) error {
		if err != nil {
			return err
		}
		return f.Forward.Flush()
	})
}

// ZeroAt zeroes a range of the underlying device, by writing where it has no other way.
func (f *Faulty) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	if err := block.CheckRange("zero", off, n, f.Size()); err != nil {
		return err
	}
	if err := f.admit(Op{Kind: Zero, Off: off, Len: n, Flags: flags}); err != nil {
		if part := short(err, n); part > 0 {
			if err2 := block.Zero(f.Forward, off, part, flags); err2 != nil {
				err = err2
			}
		}
		return err
	}
	return block.Zero(f.Forward, off, n, flags)
}

// Discard discards a range of the underlying device.
func (f *Faulty) Discard(off, n int64) error {
	if err := block.CheckRange("discard", off, n, f.Size()); err != nil {
		return err
	}
	if err := f.admit(Op{Kind: Discard, Off: off, Len: n}); err != nil {
		return err
	}
	return block.Discard(f.Forward, off, n)
}

// Grow makes the underlying device longer.
func (f *Faulty) Grow(size int64) error {
	if err := f.admit(Op{Kind: Grow, Len: size}); err != nil {
		return err
	}
	return f.Forward.Grow(size)
}

// WriteLastAt is a write and a flush, decided one after the other, that a failed Flush before does not
// fail; see [block.LastWriter].
func (f *Faulty) WriteLastAt(p []byte, off int64) error {
	if err := block.CheckRange("write", off, int64(len(p)), f.Size()); err != nil {
		return err
	}
	if err := f.admit(Op{Kind: Write, Off: off, Len: int64(len(p))}); err != nil {
		_, err := f.writePart(p, off, err)
		return err
	}
	if err := f.admit(Op{Kind: Flush}); err != nil {
		_, err2 := f.Forward.WriteAt(p, off)
		return errors.Join(err, err2)
	}
	return block.WriteLast(f.Forward, p, off)
}
