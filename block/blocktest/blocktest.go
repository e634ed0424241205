// Package blocktest is for tests of and with block devices.
//
// [Run] is the conformance suite: every device of the project passes it, be it memory, a file, a
// snapshot or a block server's client. Then there are devices that stand between the code under test
// and a real one:
//
//   - A [Recorder] writes down each operation, in one order for all the devices of a [Log]. What must
//     be durable before what is then a matter of comparing lines.
//   - A [Faulty] fails operations of the test's choice, or holds one until the test lets it go, which
//     makes a race happen on purpose.
//   - A [Crash] keeps what was written and not flushed apart, and shows all the disks that a power cut
//     could leave behind: see [Power].
//
// They can be put on top of each other. Each has all the optional abilities of package block and falls
// back as the functions of that package do where the device beneath lacks one.
package blocktest

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"github.com/dmsnap/dmsnap/block"
)

// Kind is a kind of operation on a device.
type Kind uint8

// The kinds, and how they are printed.
const (
	Read         Kind = iota // R
	Write                    // W
	WriteDurable             // WD
	Zero                     // Z
	Discard                  // D
	Flush                    // F
	Grow                     // G
)

var kindNames = [...]string{Read: "R", Write: "W", WriteDurable: "WD", Zero: "Z", Discard: "D", Flush: "F", Grow: "G"}

func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("Kind(%d)", k)
}

// Changes reports whether the operation can change what a device holds.
func (k Kind) Changes() bool {
	return k == Write || k == WriteDurable || k == Zero || k == Discard
}

// An Op is one operation on a device.
type Op struct {
	Device string // the name given to the device, may be empty
	Kind   Kind
	Off    int64 // first byte; 0 for Flush and Grow
	Len    int64 // bytes; for Grow the size asked for, 0 for Flush
	Flags  block.ZeroFlags

	// N counts the operations of one Faulty, or of one Log, from 1.
	N int
	// Ended is, in a Log, the N that the next operation was to get when this one returned; 0 while it
	// is under way. See Before.
	Ended int
	// Data is, in a Log, a copy of what was written.
	Data []byte
	// Err is, in a Log, what the operation returned.
	Err error
}

// Before reports whether op had returned when other, of the same Log, began.
func (op Op) Before(other Op) bool { return op.Ended != 0 && op.Ended <= other.N }

// Overlaps reports whether op touches one of n bytes at off.
func (op Op) Overlaps(off, n int64) bool { return op.Off < off+n && off < op.Off+op.Len }

// String prints the operation in sectors, "COW W 8+8" for 4096 bytes written at byte 4096 of the device
// named COW. What is not made of whole sectors is printed in bytes, "W 4097+3 bytes". Errors are
// appended.
func (op Op) String() string {
	s := op.Kind.String()
	if op.Device != "" {
		s = op.Device + " " + s
	}
	unit, suffix := int64(block.SectorSize), ""
	if op.Off%unit != 0 || op.Len%unit != 0 {
		unit, suffix = 1, " bytes"
	}
	switch op.Kind {
	case Flush:
	case Grow:
		s += fmt.Sprintf(" %d%s", op.Len/unit, suffix)
	default:
		s += fmt.Sprintf(" %d+%d%s", op.Off/unit, op.Len/unit, suffix)
	}
	if op.Flags&block.KeepAllocated != 0 {
		s += " keep"
	}
	if op.Flags&block.OnlyFast != 0 {
		s += " fast"
	}
	if op.Err != nil {
		s += " error: " + op.Err.Error()
	}
	return s
}

// Pattern returns n bytes of noise, the same for the same seed.
func Pattern(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 0x646d736e61700000))
	p := make([]byte, 0, n+7)
	for len(p) < n {
		p = binary.LittleEndian.AppendUint64(p, r.Uint64())
	}
	return p[:n:n]
}

// beneath is the device under a wrapper, and the abilities that a wrapper passes through as they are.
type beneath struct{ dev block.Device }

// Size returns the size of the device beneath.
func (b beneath) Size() int64 { return b.dev.Size() }

// Extents returns the extents of the device beneath.
func (b beneath) Extents(off, n int64) ([]block.Extent, error) { return block.Extents(b.dev, off, n) }

// BlockSize returns the logical block size of the device beneath.
func (b beneath) BlockSize() int { return block.BlockSize(b.dev) }

// Refresh looks up the size of the device beneath.
func (b beneath) Refresh() (int64, error) { return block.Refresh(b.dev) }

// Allocate reserves space on the device beneath, where that can.
func (b beneath) Allocate(off, n int64) error {
	can, err := block.Allocate(b.dev, off, n)
	if err == nil && !can {
		return block.ErrNotFast
	}
	return err
}

// Identity is that of the device beneath, so that block.Same sees through the wrapper.
func (b beneath) Identity() string {
	if i, ok := b.dev.(block.Identifier); ok {
		return i.Identity()
	}
	return fmt.Sprintf("%T %p", b.dev, b.dev)
}

// grow makes the device beneath longer where it can be.
func (b beneath) grow(size int64) error {
	if r, ok := b.dev.(block.Resizer); ok {
		return r.Grow(size)
	}
	if size <= b.dev.Size() {
		return nil
	}
	return fmt.Errorf("a %T can't be made longer", b.dev)
}
