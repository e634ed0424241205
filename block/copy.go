package block

import (
	"bytes"
	"strings"

	"github.com/dmsnap/dmsnap/internal/scratch"
)

// A Sparse says which zeros [Copy] and [WriteSparse] write as data. Other zeros become holes, which take no space,
// where the target supports them.
type Sparse uint8

const (
	// LongHoles is for a target that may hold anything. Zeros are written with [Zero] where a whole call, or a
	// run of at least 16 KiB, has nothing else; shorter runs are not worth a system call and are written as data.
	LongHoles Sparse = iota
	// AllHoles is LongHoles with runs of one block of 4 KiB.
	AllHoles
	// IntoZeros is for a target that reads as zeros where it is written, a new file: zeros in whole blocks of
	// 4 KiB are not written at all.
	IntoZeros
)

const (
	holeBlock = 4096      // zeros are looked for in blocks of this size and alignment, as file systems have them
	longHole  = 16 << 10  // least run of zeros that is a hole with LongHoles
	askForBig = 128 << 10 // least range for which the source is asked where its holes are
)

// A CopyError says which side of a [Copy] failed.
type CopyError struct {
	Op  string // "read" or "write"
	Err error
}

// Error names the operation once: many devices do it, too.
func (e *CopyError) Error() string {
	text := e.Err.Error()
	if strings.HasPrefix(text, e.Op+" ") {
		return text
	}
	return e.Op + ": " + text
}

func (e *CopyError) Unwrap() error { return e.Err }

// Copy copies n bytes of src, from byte from on, to byte to of dst. Ranges that read as zeros stay or become holes as
// far as how says and dst can; what dst held there reads as zeros in any case. Holes of src are not read.
//
// after, where not nil, is called after each piece with its length, which is bounded for data and not for holes. An
// error of it ends the copy and is returned as it is. Other errors are a *CopyError; part of the range may be copied
// then. Nothing is durable before dst is flushed.
//
// The caller must make sure that the range of src does not change meanwhile. Ranges of one device must not overlap.
func Copy(dst Device, to int64, src Device, from, n int64, how Sparse, after func(n int64) error) error {
	for n > 0 {
		extents := []Extent{{Length: n}}
		if n >= askForBig {
			var err error
			if extents, err = Extents(src, from, n); err != nil {
				return &CopyError{"read", err}
			}
		}
		for _, e := range extents {
			var err error
			if e.Flags&ReadsZero != 0 {
				err = copyHole(dst, to, e.Length, how, after)
			} else {
				err = copyData(dst, to, src, from, e.Length, how, after)
			}
			if err != nil {
				return err
			}
			from, to, n = from+e.Length, to+e.Length, n-e.Length
		}
	}
	return nil
}

// copyHole is Copy of zeros.
func copyHole(dst Device, to, n int64, how Sparse, after func(int64) error) error {
	if how != IntoZeros {
		if err := zeroWithin(dst, to, n); err != nil {
			return &CopyError{"write", err}
		}
	}
	if after == nil {
		return nil
	}
	return after(n)
}

// copyData is Copy of a range that is read.
func copyData(dst Device, to int64, src Device, from, n int64, how Sparse, after func(int64) error) error {
	return scratch.With(min(n, scratch.Most), func(b []byte) error {
		for n > 0 {
			b = b[:min(n, int64(len(b)))]
			if _, err := src.ReadAt(b, from); err != nil {
				return &CopyError{"read", err}
			}
			if err := WriteSparse(dst, b, to, how); err != nil {
				return &CopyError{"write", err}
			}
			k := int64(len(b))
			from, to, n = from+k, to+k, n-k
			if after == nil {
				continue
			}
			if err := after(k); err != nil {
				return err
			}
		}
		return nil
	})
}

// ReadSparse fills p from byte off of src. Its holes are not read where p has at least 128 KiB.
func ReadSparse(src Device, p []byte, off int64) error {
	for len(p) > 0 {
		extents := []Extent{{Length: int64(len(p))}}
		if len(p) >= askForBig {
			var err error
			if extents, err = Extents(src, off, int64(len(p))); err != nil {
				return err
			}
		}
		for _, e := range extents {
			if e.Flags&ReadsZero != 0 {
				clear(p[:e.Length])
			} else if _, err := src.ReadAt(p[:e.Length], off); err != nil {
				return err
			}
			p, off = p[e.Length:], off+e.Length
		}
	}
	return nil
}

// WriteSparse writes p at off, its zeros as holes as far as how says and dst can; see [Copy].
func WriteSparse(dst Device, p []byte, off int64, how Sparse) error {
	for whole := true; len(p) > 0; whole = false {
		zero, n := zeroRun(p, off, how, whole)
		var err error
		switch {
		case !zero:
			_, err = dst.WriteAt(p[:n], off)
		case how != IntoZeros:
			err = zeroWithin(dst, off, n)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// zeroRun returns how many bytes of p, which belongs at byte off, to write in the same way: as a hole, or as data up to
// the next hole that is worth a call. whole: p is the whole range to write.
func zeroRun(p []byte, off int64, how Sparse, whole bool) (zero bool, n int64) {
	size := int64(len(p))
	if whole && IsZero(p) {
		return true, size
	}
	least := int64(1) // IntoZeros: a hole costs nothing
	switch how {
	case LongHoles:
		least = longHole
	case AllHoles:
		least = holeBlock
	}
	for n < size {
		k := zeroBlocks(p[n:], off+n, how)
		if k >= least {
			if n > 0 {
				return false, n
			}
			return true, k
		}
		n += max(k, min(holeBlock-(off+n)%holeBlock, size-n))
	}
	return false, size
}

// zeroBlocks returns how many bytes at the beginning of p, which belongs at byte off, are blocks of zeros. The
// parts of blocks at either end of p count with IntoZeros.
func zeroBlocks(p []byte, off int64, how Sparse) (n int64) {
	for n < int64(len(p)) {
		k := min(holeBlock-(off+n)%holeBlock, int64(len(p))-n)
		if k < holeBlock && how != IntoZeros || !IsZero(p[n:n+k]) {
			break
		}
		n += k
	}
	return n
}

// IsZero reports whether all bytes of p are zero.
func IsZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeros))
		if !bytes.Equal(p[:n], zeros[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// zeroWithin is Zero for space that may be reserved. Where a file system is too full to record a hole, zeros are
// written into the reserved space.
func zeroWithin(dst Device, off, n int64) error {
	err := Zero(dst, off, n, 0)
	if IsNoSpace(err) {
		err = WriteZeros(dst, off, n)
	}
	return err
}
