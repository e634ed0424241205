package vhost

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	maxRegions = 8       // of SET_MEM_TABLE
	maxSlots   = 32      // of ADD_MEM_REG
	maxMapped  = 1 << 40 // bytes of memory of one front-end
)

// errFault reports that the front-end took memory away which it had shared.
var errFault = errors.New("the front-end truncated its shared memory")

// A mapping is shared memory of the front-end, unmapped with the last reference.
type mapping struct {
	whole []byte // as mapped, from a page boundary on
	bytes []byte // the part asked for
	refs  atomic.Int64
}

// newMapping maps size bytes at offset of a regular file, with one reference. It takes over fd and closes it.
func newMapping(fd int, offset, size uint64) (*mapping, error) {
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, errors.New("shared memory is not a regular file")
	case size == 0 || size > maxMapped || offset > uint64(st.Size) || size > uint64(st.Size)-offset:
		return nil, fmt.Errorf("shared memory of %d bytes at offset %d of a file of %d bytes", size, offset, st.Size)
	}
	// On hugetlbfs the offset and the length must be multiples of the huge page.
	unit := uint64(os.Getpagesize())
	if b := uint64(st.Blksize); b > unit && b&(b-1) == 0 && uint64(st.Size)%b == 0 && isHuge(fd) {
		unit = b
	}
	begin := offset &^ (unit - 1)
	length := (offset - begin + size + unit - 1) &^ (unit - 1)
	whole, err := unix.Mmap(fd, int64(begin), int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map shared memory: %w", err)
	}
	unix.Madvise(whole, unix.MADV_DONTDUMP)
	m := &mapping{whole: whole, bytes: whole[offset-begin:][:size:size]}
	m.refs.Store(1)
	return m, nil
}

func isHuge(fd int) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(fd, &st) == nil && int64(st.Type) == unix.HUGETLBFS_MAGIC
}

// release gives up a reference, and unmaps with the last one.
func (m *mapping) release() {
	if m.refs.Add(-1) == 0 {
		unix.Munmap(m.whole)
	}
}

// has reports whether an address is in the mapping.
func (m *mapping) has(addr uintptr) bool {
	first := uintptr(unsafe.Pointer(unsafe.SliceData(m.whole)))
	return addr >= first && addr-first < uintptr(len(m.whole))
}

// A region is a piece of guest memory: gpa are guest physical addresses, ua addresses of the front-end (§5).
type region struct {
	gpa, size, ua uint64
	mem           *mapping
}

// A table is the guest's memory at one time. It does not change; each user holds a reference.
type table struct {
	regions []region
	refs    atomic.Int64
}

// newTable makes a table of regions, whose references it takes over, with one reference of its own.
func newTable(regions []region) *table {
	t := &table{regions: regions}
	t.refs.Store(1)
	return t
}

func (t *table) acquire() *table {
	t.refs.Add(1)
	return t
}

func (t *table) release() {
	if t.refs.Add(-1) == 0 {
		for _, r := range t.regions {
			r.mem.release()
		}
	}
}

// has reports whether an address of this process is guest memory.
func (t *table) has(addr uintptr) bool {
	for _, r := range t.regions {
		if r.mem.has(addr) {
			return true
		}
	}
	return false
}

// checkRegion refuses a region that wraps around, is empty, or overlaps one of the list.
func checkRegion(list []region, r region) error {
	if r.size == 0 || r.gpa+r.size < r.gpa || r.ua+r.size < r.ua {
		return fmt.Errorf("memory region at %#x: size %#x is not possible", r.gpa, r.size)
	}
	total := r.size
	for _, o := range list {
		if r.gpa < o.gpa+o.size && o.gpa < r.gpa+r.size || r.ua < o.ua+o.size && o.ua < r.ua+r.size {
			return fmt.Errorf("memory regions at %#x and %#x overlap", o.gpa, r.gpa)
		}
		total += o.size
	}
	if r.size > maxMapped || total > maxMapped {
		return errors.New("the guest has too much memory")
	}
	return nil
}

// ring returns n bytes at a front-end address, which lie in one region.
func (t *table) ring(ua, n uint64) ([]byte, error) {
	for _, r := range t.regions {
		if off := ua - r.ua; ua >= r.ua && off < r.size && n <= r.size-off {
			return r.mem.bytes[off:][:n:n], nil
		}
	}
	return nil, fmt.Errorf("ring part of %d bytes at %#x is outside the memory regions", n, ua)
}

// guest returns the memory at a guest address: at least one byte and at most n, as far as the region goes; nil outside.
func (t *table) guest(gpa, n uint64) []byte {
	for _, r := range t.regions {
		if off := gpa - r.gpa; gpa >= r.gpa && off < r.size {
			return r.mem.bytes[off:][:min(n, r.size-off)]
		}
	}
	return nil
}

// A segment is a guest buffer.
type segment struct{ gpa, size uint64 }

// segments are buffers that follow each other, as one run of bytes.
type segments []segment

func (l segments) total() (n uint64) {
	for _, s := range l {
		n += s.size // at most 1024 times 2³²
	}
	return n
}

// each calls do with the pieces of memory that hold n bytes from byte off on. It reports false when there are fewer, or
// some are outside of guest memory.
func (l segments) each(t *table, off, n uint64, do func(mem []byte)) bool {
	for _, s := range l {
		if off >= s.size {
			off -= s.size
			continue
		}
		at, left := s.gpa+off, min(n, s.size-off)
		if at < s.gpa {
			return false
		}
		off, n = 0, n-left
		for left > 0 {
			mem := t.guest(at, left)
			if len(mem) == 0 {
				return false
			}
			do(mem)
			at, left = at+uint64(len(mem)), left-uint64(len(mem))
		}
		if n == 0 {
			break
		}
	}
	return n == 0
}

// read copies len(p) bytes from byte off on out of guest memory.
func (l segments) read(t *table, off uint64, p []byte) bool {
	return l.each(t, off, uint64(len(p)), func(mem []byte) { p = p[copy(p, mem):] })
}

// write copies p into guest memory from byte off on.
func (l segments) write(t *table, off uint64, p []byte) bool {
	return l.each(t, off, uint64(len(p)), func(mem []byte) { p = p[copy(mem, p):] })
}

// guard calls do, which accesses shared memory. A fault there is errFault; any other panic goes on. do holds no lock
// without a deferred unlock, and calls nothing that could. Each goroutine needs a guard of its own (§9.2).
func guard(shared func(addr uintptr) bool, do func()) (err error) {
	before := debug.SetPanicOnFault(true)
	defer debug.SetPanicOnFault(before)
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		fault, ok := r.(interface {
			runtime.Error
			Addr() uintptr
		})
		if !ok || !shared(fault.Addr()) {
			panic(r)
		}
		err = errFault
	}()
	do()
	return nil
}

// load16 loads the little-endian 16-bit number at b[off:], at an even address. Go has no 16-bit atomics: the aligned
// word around it is in the same page.
func load16(b []byte, off int) uint16 {
	p := unsafe.Pointer(&b[off])
	odd := uintptr(p) & 2
	word := atomic.LoadUint32((*uint32)(unsafe.Add(p, -int(odd))))
	return uint16(word >> (8 * odd))
}

// store16 stores a 16-bit number at an even address.
func store16(b []byte, off int, v uint16) { *(*uint16)(unsafe.Pointer(&b[off : off+2][0])) = v }

// store32 stores a 32-bit number at an address that is a multiple of four.
func store32(b []byte, off int, v uint32) {
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&b[off : off+4][0])), v)
}

// aligned reports whether the address of b is a multiple of n.
func aligned(b []byte, n uintptr) bool { return uintptr(unsafe.Pointer(unsafe.SliceData(b)))%n == 0 }
