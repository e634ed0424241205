package block

import (
	"io"
	"math"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ZeroAt makes a range read as zeros by deallocating it, or with KeepAllocated by marking it as
// unwritten; see [Zeroer].
//
// On a block special file only whole logical blocks can be zeroed that way; what is left at either
// end is written. There KeepAllocated lets the kernel write zeros where the device has nothing
// better, so that together with OnlyFast it is always ErrNotFast.
func (f *File) ZeroAt(off, n int64, flags ZeroFlags) error {
	if err := f.enterChange("zero", off, n); err != nil {
		return err
	}
	defer f.life.RUnlock()
	if !f.special {
		return f.zeroBlocks(off, n, flags)
	}
	start, end := f.wholeBlocks(off, n)
	if start >= end {
		_, err := f.write(zeros[:n], off) // less than two blocks
		return err
	}
	// The middle first: ErrNotFast must leave everything as it was.
	if err := f.zeroBlocks(start, end-start, flags); err != nil {
		return err
	}
	if _, err := f.write(zeros[:start-off], off); err != nil {
		return err
	}
	_, err := f.write(zeros[:off+n-end], end)
	return err
}

// zeroBlocks zeroes a range that the file system or device takes as it is.
func (f *File) zeroBlocks(off, n int64, flags ZeroFlags) error {
	if flags&KeepAllocated == 0 {
		done, err := f.fallocate(punchHole, unix.FALLOC_FL_PUNCH_HOLE, off, n)
		if done || err != nil {
			return err
		}
	}
	// A block special file falls back to writing here, within the kernel.
	if f.special && flags&OnlyFast != 0 {
		return ErrNotFast
	}
	done, err := f.fallocate(zeroRange, unix.FALLOC_FL_ZERO_RANGE, off, n)
	if done || err != nil {
		return err
	}
	return ErrNotFast
}

// fallocate does one thing to a range; done is false, without an error, where that is impossible.
func (f *File) fallocate(a ability, mode uint32, off, n int64) (done bool, err error) {
	if n == 0 {
		return true, nil
	}
	if f.lacks[a].Load() {
		return false, nil
	}
	if a != allocate {
		defer f.punches.Add(1) // when the hole is there
	}
	err = retry(func() error {
		return unix.Fallocate(f.fd, mode|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if unsupported(err) {
		f.lacks[a].Store(true)
		return false, nil
	}
	if err != nil {
		return false, f.errorAt("allocate", off, err)
	}
	return true, nil
}

// Allocate reserves space for a range of a regular file; see [Allocator].
func (f *File) Allocate(off, n int64) error {
	if err := f.enterChange("allocate", off, n); err != nil {
		return err
	}
	defer f.life.RUnlock()
	if f.special {
		return ErrNotFast
	}
	done, err := f.fallocate(allocate, 0, off, n)
	if err == nil && !done {
		return ErrNotFast
	}
	return err
}

// cacheUnit is what DropCache rounds a range to, in bytes: the kernel drops whole pages, which are at most so long.
const cacheUnit = 64 << 10

// DropCache makes the kernel drop clean cached pages of a range (posix_fadvise). Where that is impossible, on tmpfs for
// one, it does nothing.
func (f *File) DropCache(off, n int64) error {
	if err := f.enter("drop cache", off, n); err != nil || n == 0 {
		if err == nil {
			f.life.RUnlock()
		}
		return err
	}
	defer f.life.RUnlock()
	start := off / cacheUnit * cacheUnit
	n = (off - start + n + cacheUnit - 1) / cacheUnit * cacheUnit
	if n < 0 || n > math.MaxInt64-start {
		n = 0 // up to the end of the file
	}
	err := retry(func() error { return unix.Fadvise(f.fd, start, n, unix.FADV_DONTNEED) })
	if err != nil && !unsupported(err) && err != unix.ESPIPE && err != unix.EINVAL {
		return f.errorAt("drop cache", off, err)
	}
	return nil
}

// Discard gives back the space of a range: by a hole in a regular file, which reads as zeros, by
// BLKDISCARD on the whole blocks of a block special file. Where that is impossible it does nothing.
func (f *File) Discard(off, n int64) error {
	if err := f.enterChange("discard", off, n); err != nil {
		return err
	}
	defer f.life.RUnlock()
	if !f.special {
		_, err := f.fallocate(punchHole, unix.FALLOC_FL_PUNCH_HOLE, off, n)
		return err
	}
	start, end := f.wholeBlocks(off, n)
	if start >= end || f.lacks[discardIoctl].Load() {
		return nil
	}
	err := retry(func() error { return blkdiscard(f.fd, start, end-start) })
	if unsupported(err) {
		f.lacks[discardIoctl].Store(true)
		return nil
	}
	if err != nil {
		return f.errorAt("discard", start, err)
	}
	return nil
}

// blkdiscard is ioctl(BLKDISCARD), for which package unix has no function.
func blkdiscard(fd int, off, n int64) error {
	arg := [2]uint64{uint64(off), uint64(n)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&arg)))
	if errno != 0 {
		return errno
	}
	return nil
}

// wholeBlocks returns the part of a range that consists of whole logical blocks.
func (f *File) wholeBlocks(off, n int64) (start, end int64) {
	mask := int64(f.block) - 1
	return (off + mask) &^ mask, (off + n) &^ mask
}

// fileExtents bounds the extents, and so the system calls, of one call of Extents: few, since a caller may need only
// the first one.
const fileExtents = 16

// knownExtents is the size in bytes of the longest file whose extents are asked for: Linux' tmpfs says that a file whose
// last page ends behind 2^63 has no data.
const knownExtents = math.MaxInt64 - 4095

// Extents distinguishes data from holes; see [Extenter]. Space that was reserved and never written counts as a
// hole. A block special file is all data. A call returns at most 16 extents.
func (f *File) Extents(off, n int64) ([]Extent, error) {
	if err := f.enter("extents", off, n); err != nil {
		return nil, err
	}
	defer f.life.RUnlock()
	if n == 0 {
		return nil, nil
	}
	if f.special || f.Size() > knownExtents {
		return []Extent{{Length: n}}, nil
	}
	var list []Extent
	for end := off + n; off < end && len(list) < fileExtents; {
		if to := f.knownData(off); to > off {
			to = min(to, end)
			list = append(list, Extent{Length: to - off})
			off = to
			continue
		}
		data, err := f.next(unix.SEEK_DATA, off, end)
		if err != nil {
			return nil, err
		}
		if data > off {
			list = append(list, Extent{data - off, Hole | ReadsZero})
			off = data
			continue
		}
		punches := f.punches.Load() // before the file system is asked
		hole, err := f.next(unix.SEEK_HOLE, off, math.MaxInt64)
		if err != nil {
			return nil, err
		}
		f.data.Store(&dataRun{off, hole, punches})
		hole = min(hole, end)
		// The race considered: data that was at off a moment ago may be punched out by now. Half a block reported as
		// data does no harm; a scan that makes no progress would.
		hole = max(hole, min(off+SectorSize, end))
		list = append(list, Extent{Length: hole - off})
		off = hole
	}
	return list, nil
}

// dataRun is a stretch of a file without a hole, as it was after so many punches.
type dataRun struct {
	from, to int64
	punches  uint64
}

// knownData returns the end of the data at off that the last call of Extents found, or 0. Asked for a piece, the file
// system looks for the end of the whole stretch, which takes long on some (tmpfs, ext4 before its pages are written). A
// stretch is forgotten when f makes a hole anywhere. Holes are not remembered: data that is taken for a hole is lost.
func (f *File) knownData(off int64) int64 {
	if d := f.data.Load(); d != nil && d.punches == f.punches.Load() && d.from <= off && off < d.to {
		return d.to
	}
	return 0
}

// next returns where, in [off, end), the first data or the first hole begins, or end. Seeking moves the
// descriptor's offset, which nothing uses.
func (f *File) next(whence int, off, end int64) (int64, error) {
	at, err := unix.Seek(f.fd, off, whence)
	switch {
	case err == nil:
		return min(at, end), nil
	case err == unix.EINVAL && whence == unix.SEEK_DATA:
		return off, nil // the file system can't report holes: all data
	case err == unix.EINVAL:
		return end, nil
	case err == unix.ENXIO:
		// No data up to the end of the file, unless the file ends earlier than it did.
		size, err := f.lookUpSize()
		if err == nil && size < end {
			err = f.errorAt("extents", off, io.ErrUnexpectedEOF)
		}
		return end, err
	}
	return 0, f.errorAt("extents", off, err)
}

// HasSpace reports whether a range of a regular file has its space on the file system, written or reserved: a write to it
// needs no more. Where the file system does not distinguish reserved space from holes, it is false for that.
func (f *File) HasSpace(off, n int64) bool {
	if err := f.enter("has space", off, n); err != nil {
		return false
	}
	defer f.life.RUnlock()
	if f.special {
		return true
	}
	end := off + n
	for off < end {
		from, length, err := firstExtent(f.fd, off, end-off)
		if err != nil {
			hole, err := f.next(unix.SEEK_HOLE, off, end)
			return err == nil && hole == end
		}
		if length == 0 || from > off {
			return false
		}
		off = from + length
	}
	return true
}

// fiemap is struct fiemap of linux/fiemap.h with one struct fiemap_extent.
type fiemap struct {
	start, length             uint64
	flags, mapped, count, _   uint32
	logical, physical, extent uint64
	_, _                      uint64
	extentFlags, _, _, _      uint32
}

// firstExtent returns the first extent that the file system has of a range, of length 0 where it has none
// (ioctl FS_IOC_FIEMAP).
func firstExtent(fd int, off, n int64) (from, length int64, err error) {
	const fsIocFiemap = 0xc020660b
	m := fiemap{start: uint64(off), length: uint64(n), count: 1}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsIocFiemap, uintptr(unsafe.Pointer(&m))); errno != 0 {
		return 0, 0, errno
	}
	if m.mapped == 0 {
		return 0, 0, nil
	}
	return int64(m.logical), int64(m.extent), nil
}
