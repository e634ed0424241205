// Package blocktest has what tests of and with block devices need: a conformance suite, and devices that record
// operations, fail, block and lose power.
//
//	func TestDevice(t *testing.T) {
//		blocktest.Run(t, func(t *testing.T) block.Device { return mydevice.New(64 << 10) })
//	}
//
//	dev := blocktest.NewFaulty(block.NewMemory(1<<20), blocktest.FailNth(3, syscall.EIO)) // the third operation fails
//
// [Run] is the conformance suite: every device of the project passes it, be it memory, a file, a snapshot or the client of
// a block server. [RunForward] checks a device that is stacked on another one: it passes on every optional ability. The
// devices, each of which embeds a block.Forward, so that they can be stacked:
//
//   - A [Recorder] records each operation, in one order for all the devices of a [Log]. Tests of the order of writes
//     compare its lines.
//   - A [Faulty] fails chosen operations, or holds one until the test releases it, which makes a race reproducible.
//   - A [PageCache] does what Linux does when a flush fails: written data can be read, is clean, and is not on the disk.
//   - A [Pool] is a file system that becomes full for all of its files at once.
//   - A [Crash] keeps data that was not flushed apart, and yields all the disks that a power cut could leave; see [Power].
//
// Guarantees: all of them may be used concurrently, and every random choice is made from a seed that the test passes.
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
