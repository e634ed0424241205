// Package block has the disks that everything else in dmsnap works on: a fixed number of bytes that can be read, written
// and made durable.
//
//	disk, err := block.Open("disk.img", block.Options{}) // or block.NewMemory(size)
//	if err != nil {
//		return err
//	}
//	defer disk.Close()
//	_, err = disk.WriteAt(p, off)
//	err = disk.Flush() // now p survives a crash
//
// Exception stores, snapshots and block servers use disks only through [Device], an interface of four methods. What some
// devices can do beyond that (write durably in one step, zero or discard a range, report holes, grow) is in small optional
// interfaces, and the functions of this package ([WriteDurable], [Zero], [Discard], [Extents], [Grow], …) fall back to a
// correct substitute where a device lacks the ability. Callers use the functions, never a type assertion of their own: a
// device that is stacked on another device embeds [Forward], has all the methods, and answers [ErrUnsupported] or
// [ErrNotFast] for what the underlying device lacks.
//
// The package has three devices: [Memory], regular files and block special files ([Open]). Package blocktest has the suite
// that each device passes, and devices that record, fail and crash.
//
// # Guarantees
//
//   - A device may be used concurrently. An access outside [0, Size) is a [*RangeError] and changes nothing.
//   - After a Flush that succeeded, every write that returned before it is durable. After a failed Flush, every later one
//     fails.
//   - A file is locked against other programs while it is open (see [LockMode]); a conflict is [ErrInUse].
//   - A write to a device opened for reading is [ErrReadOnly]. Errors of the operating system are wrapped, so
//     errors.Is(err, syscall.ENOSPC) works.
package block

import (
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"syscall"

	"github.com/dmsnap/dmsnap/internal/text"
)

// SectorSize is the unit of the snapshot format and of device sizes, in bytes.
const SectorSize = 512

// A Device is a fixed number of bytes that can be read, written and made durable.
//
// ReadAt and WriteAt take byte offsets, may be called concurrently with each other and with Flush,
// and never grow the device: a range that is not wholly inside [0, Size) is a [*RangeError] and
// touches nothing. On success they transfer len(p) bytes; a short transfer always comes with an error,
// and io.EOF is never among them. WriteAt does not keep or change p. Two concurrent writes to
// overlapping ranges leave one, the other, or a mix by sectors.
//
// Flush makes durable every write that returned before Flush was called. After a failed Flush the state of those writes
// is unknown and stays unknown: a device that failed a Flush fails every later one.
//
// Size is in bytes and cheap. It never shrinks, and grows only through [Refresh] or [Grow].
type Device interface {
	io.ReaderAt
	io.WriterAt
	Flush() error
	Size() int64
}

// ErrReadOnly reports a change to a device that was opened for reading.
var ErrReadOnly = errors.New("device is read-only")

// ErrInUse reports a file that is open elsewhere (in dmsnap, in qemu, in this process, or, for a block special file, in
// the kernel) in a way that excludes the requested use.
var ErrInUse = errors.New("already in use")

// ErrUnavailable reports a read of what a server did not deliver. The device may be used on, and a later read may succeed: a snapshot over it stays
// valid.
var ErrUnavailable = errors.New("not delivered by the server")

// ErrNotFast reports that a range can't be zeroed any faster than by writing zeros (see [OnlyFast]).
var ErrNotFast = errors.New("no fast way to write zeros")

// ErrUnsupported reports that a device lacks an optional ability, and that nothing was changed. The
// functions of this package then fall back as for a device without the method.
var ErrUnsupported = errors.New("the device lacks this ability")

// ErrFixedSize reports a device that can't be made longer by its user.
var ErrFixedSize = errors.New("the size of the device is fixed")

// A RangeError reports an access that is not wholly inside a device.
type RangeError struct {
	Op     string // "read", "write", "zero", "discard", "extents", "allocate", "drop cache"
	Off    int64  // first byte asked for
	Length int64  // bytes asked for
	Size   int64  // the device's size in bytes
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("%s of %d bytes at byte %d is outside a device of %d bytes", e.Op, e.Length, e.Off, e.Size)
}

// CheckRange returns a *RangeError unless [off, off+length) lies in [0, size). An empty range is inside
// when 0 ≤ off ≤ size. Implementers of Device call it first.
func CheckRange(op string, off, length, size int64) error {
	if off < 0 || length < 0 || off > size || length > size-off {
		return &RangeError{Op: op, Off: off, Length: length, Size: size}
	}
	return nil
}

// A DurableWriter can write and make that write durable in one step, as FUA does. Other writes need
// not become durable. A returned error leaves the range unknown, except ErrUnsupported, with nothing
// changed, where the device needs a write and a Flush for it.
type DurableWriter interface {
	WriteDurableAt(p []byte, off int64) error
}

// WriteDurable writes p at off and returns when it is durable: in one step where dev can, else by a
// write and a Flush.
func WriteDurable(dev Device, p []byte, off int64) error {
	if d, ok := dev.(DurableWriter); ok {
		if err := d.WriteDurableAt(p, off); !errors.Is(err, ErrUnsupported) {
			return err
		}
	}
	if _, err := dev.WriteAt(p, off); err != nil {
		return err
	}
	return dev.Flush()
}

// An EarlyFlusher can begin to write to the disk what was written to a range, and return at once. That makes nothing
// durable and returns no error: a later Flush, which has less to do then, returns it.
type EarlyFlusher interface {
	BeginFlush(off, n int64)
}

// BeginFlush begins to write a range to the disk where dev can; else it does nothing.
func BeginFlush(dev Device, off, n int64) {
	if d, ok := dev.(EarlyFlusher); ok {
		d.BeginFlush(off, n)
	}
}

// An EarlyReader can begin to read a range from the disk, and return at once. It is a hint and returns no error: a
// later ReadAt of the range waits for less.
type EarlyReader interface {
	BeginRead(off, n int64)
}

// BeginRead begins to read a range from the disk where dev can; else it does nothing.
func BeginRead(dev Device, off, n int64) {
	if d, ok := dev.(EarlyReader); ok {
		d.BeginRead(off, n)
	}
}

// ZeroFlags refine [Zero].
type ZeroFlags uint8

const (
	// KeepAllocated keeps the space reserved: the range must not become a hole.
	KeepAllocated ZeroFlags = 1 << iota
	// OnlyFast asks for ErrNotFast, with nothing changed, when zeroing would take as long as
	// writing zeros.
	OnlyFast
)

// A Zeroer can make a range read as zeros faster than by writing them. It may deallocate the range
// unless KeepAllocated is given. It returns ErrNotFast, with nothing changed, when it can't do this
// range faster; [Zero] then writes. Same concurrency and durability as WriteAt.
type Zeroer interface {
	ZeroAt(off, n int64, flags ZeroFlags) error
}

// zeros is what Zero writes where a device has no Zeroer; never written to.
var zeros [256 << 10]byte

// Zero makes n bytes at off read as zeros, by the device's own means or by writing.
func Zero(dev Device, off, n int64, flags ZeroFlags) error {
	if err := CheckRange("zero", off, n, dev.Size()); err != nil || n == 0 {
		return err
	}
	if z, ok := dev.(Zeroer); ok {
		if err := z.ZeroAt(off, n, flags); !errors.Is(err, ErrNotFast) {
			return err
		}
	}
	if flags&OnlyFast != 0 {
		return ErrNotFast
	}
	return WriteZeros(dev, off, n)
}

// WriteZeros writes n zeros at off, where [Zero] might deallocate the range. Both must lie within dev.
func WriteZeros(dev Device, off, n int64) error {
	for n > 0 {
		m := min(n, int64(len(zeros)))
		if _, err := dev.WriteAt(zeros[:m], off); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	return nil
}

// An Allocator can reserve space for a range, so that writes to it don't run out of space later. The
// content stays as it is. It returns ErrNotFast, with nothing changed, where space can't be reserved
// without writing.
type Allocator interface {
	Allocate(off, n int64) error
}

// Allocate reserves space for n bytes at off. can is false, without an error, where dev has no such
// notion or no means.
func Allocate(dev Device, off, n int64) (can bool, err error) {
	if err := CheckRange("allocate", off, n, dev.Size()); err != nil {
		return false, err
	}
	a, ok := dev.(Allocator)
	if !ok {
		return false, nil
	}
	if err = a.Allocate(off, n); errors.Is(err, ErrNotFast) {
		return false, nil
	}
	return true, err
}

// IsNoSpace reports whether err says that a file system is full, a quota used up or a file as long as it may be: what
// an operator fixes by freeing space.
func IsNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG)
}

// A Discarder can give back the space of a range, whose content is undefined afterwards (each sector may read as
// before, or as zeros). It is a hint: success does not guarantee that space was freed.
type Discarder interface {
	Discard(off, n int64) error
}

// Discard declares that the content of n bytes at off is no longer needed. Without the ability it checks the range and
// does nothing.
func Discard(dev Device, off, n int64) error {
	if err := CheckRange("discard", off, n, dev.Size()); err != nil {
		return err
	}
	if d, ok := dev.(Discarder); ok {
		return d.Discard(off, n)
	}
	return nil
}

// ExtentFlags describe a range. The values are those of NBD's base:allocation context.
type ExtentFlags uint32

const (
	Hole      ExtentFlags = 1 << iota // no space is allocated
	ReadsZero                         // reads as zeros
)

// A Range is Length bytes from byte Off on.
type Range struct {
	Off    int64 `json:"offset"`
	Length int64 `json:"length"`
}

// String is "0-511", the first and the last byte.
func (r Range) String() string { return fmt.Sprintf("%d-%d", r.Off, r.Off+r.Length-1) }

// An Extent is a run of bytes with the same flags.
type Extent struct {
	Length int64 // bytes, > 0
	Flags  ExtentFlags
}

// AppendExtent appends e to extents that it follows; one with the flags of the last becomes a part of it.
func AppendExtent(all []Extent, e Extent) []Extent {
	if k := len(all) - 1; k >= 0 && all[k].Flags == e.Flags {
		all[k].Length += e.Length
		return all
	}
	return append(all, e)
}

// An Extenter knows where its holes are. The extents returned start at off, follow each other without a gap, and cover
// at least one byte and at most n; an implementer may stop early, and adjacent extents may have the same flags.
type Extenter interface {
	Extents(off, n int64) ([]Extent, error)
}

// Extents describes n > 0 bytes at off; see [Extenter]. A device without the ability is all data.
func Extents(dev Device, off, n int64) ([]Extent, error) {
	if err := CheckRange("extents", off, n, dev.Size()); err != nil {
		return nil, err
	}
	if e, ok := dev.(Extenter); ok {
		return e.Extents(off, n)
	}
	return []Extent{{Length: n}}, nil
}

// A Resizer is a device whose size may change while it is open: a file made longer by truncate(1), a
// logical volume that was extended, or by Grow itself.
type Resizer interface {
	// Refresh looks up the size again and returns it. A device that became smaller keeps its old Size: reads past the
	// new end fail as the operating system lets them.
	Refresh() (int64, error)
	// Grow makes the device at least size bytes long, the new part reading as zeros. A device that
	// can't be made longer by its user (a block special file) returns ErrFixedSize.
	Grow(size int64) error
}

// Refresh returns the size of dev after looking it up again, where the device can change.
func Refresh(dev Device) (int64, error) {
	if r, ok := dev.(Resizer); ok {
		return r.Refresh()
	}
	return dev.Size(), nil
}

// Grow makes dev at least size bytes long. A device that can't be made longer is ErrFixedSize; one
// that is long enough needs nothing.
func Grow(dev Device, size int64) error {
	if r, ok := dev.(Resizer); ok {
		return r.Grow(size)
	}
	if now := dev.Size(); size > now {
		return fmt.Errorf("grow from %d to %d bytes: %w", now, size, ErrFixedSize)
	}
	return nil
}

// A GrowReporter is a Resizer that knows in advance whether its Grow always fails with ErrFixedSize.
type GrowReporter interface {
	CanGrow() bool
}

// CanGrow reports whether Grow may make dev longer. True is no guarantee: there may be no space.
func CanGrow(dev Device) bool {
	if g, ok := dev.(GrowReporter); ok {
		return g.CanGrow()
	}
	_, ok := dev.(Resizer)
	return ok
}

// A CacheDropper can drop clean cached pages of a range, so that a later read returns what is on the disk. Dirty pages
// stay. After a failed flush, Linux keeps returning data from its cache that was never written to the disk. Code that
// makes a decision from what it reads after a restart drops the cache first.
type CacheDropper interface {
	DropCache(off, n int64) error
}

// DropCache drops what is cached of n bytes at off; see [CacheDropper]. A device without the ability has no cache.
func DropCache(dev Device, off, n int64) error {
	if err := CheckRange("drop cache", off, n, dev.Size()); err != nil {
		return err
	}
	if d, ok := dev.(CacheDropper); ok {
		return d.DropCache(off, n)
	}
	return nil
}

// A BlockSizer knows its logical block size in bytes, a power of two, at least 512. Chunks must be a multiple of it
// (docs/spec/dm-snapshot.md §2.3).
type BlockSizer interface {
	BlockSize() int
}

// BlockSize returns the logical block size of dev, 512 where it does not say.
func BlockSize(dev Device) int {
	if b, ok := dev.(BlockSizer); ok {
		return b.BlockSize()
	}
	return SectorSize
}

// An Identifier knows the identity of its disk, so that two open devices of one disk are recognised. The empty string
// means unknown; such a device is never the same as another one.
type Identifier interface {
	Identity() string
}

// Same reports whether a and b are the same disk: one value, or two devices with the same identity. A
// device that embeds [Forward] has the identity of the underlying device. Devices of any dynamic type
// may be compared.
func Same(a, b Device) bool {
	if x := reflect.ValueOf(a); x.Comparable() && reflect.ValueOf(b).Comparable() && a == b {
		return true
	}
	x := Identity(a)
	return x != "" && x == Identity(b)
}

// Identity returns the identity of dev: what it returns itself, else its address when it is a pointer, else the empty
// string. It is for comparing devices that are in use at the same time.
func Identity(dev Device) string {
	v := reflect.ValueOf(dev)
	if !v.IsValid() || v.Kind() == reflect.Pointer && v.IsNil() {
		return ""
	}
	if i, ok := dev.(Identifier); ok {
		return i.Identity()
	}
	if v.Kind() == reflect.Pointer {
		return fmt.Sprintf("%T %p", dev, dev)
	}
	return ""
}

// WithPath adds the path, unless it is empty, to an error that does not name it already. What is secret in a URL is left out.
func WithPath(path string, err error) error {
	path = text.WithoutSecrets(path)
	if err == nil || path == "" || strings.Contains(" "+err.Error(), " "+path+":") {
		return err
	}
	return fmt.Errorf("%s: %w", path, err)
}
