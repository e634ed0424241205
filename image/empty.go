package image

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/store"
)

// The places that CheckEmpty reads, in bytes.
const (
	endBytes    = 4 << 20   // at either end: every place where blkid looks is in these, but for known mirrors
	extentBytes = 64 << 10  // of the beginning of each range in between that has data
	maxExtents  = 512       // number of those ranges
	pieceBytes  = 256 << 10 // at once
)

// mirrors are places in between at which file systems keep copies of their superblock (btrfs).
var mirrors = []int64{64 << 20, 256 << 30}

// A NotEmptyError reports a device that is not empty.
type NotEmptyError struct {
	Content Content
	Off     int64 // of the first byte that is not zero, among the places that were read
}

func (e *NotEmptyError) Error() string {
	switch k := e.Content.Kind; k {
	case Store:
		return store.ErrExists.Error()
	case Text:
		return "holds text"
	case Zeros, Unknown:
		return fmt.Sprintf("holds data that dmsnap does not recognise: byte 0x%x is not zero", e.Off)
	default:
		return fmt.Sprintf("holds %s (%s)", strings.TrimPrefix(k.Name, "lvm2-"), k.About)
	}
}

// Unwrap returns store.ErrExists for an exception store.
func (e *NotEmptyError) Unwrap() error {
	if e.Content.Kind == Store {
		return store.ErrExists
	}
	return nil
}

// CheckEmpty returns nil when dev appears to be empty, so that new content may be written to it: zeros in the first and
// the last 4 MiB, at the superblock copies in between, and where the data of a sparse file begins. It reads at most 40
// MiB. A device of no bytes is empty.
//
// Errors: a *NotEmptyError with what was found, which wraps store.ErrExists for an exception store; those of reads,
// since unreadable bytes may not be empty.
func CheckEmpty(dev block.Device) error {
	off, err := firstData(dev)
	if err != nil || off < 0 {
		return err
	}
	c, err := Probe(dev)
	if err != nil {
		return err
	}
	return &NotEmptyError{c, off}
}

// firstData returns where the first byte is that is not zero, in the places that CheckEmpty reads; -1: none.
func firstData(dev block.Device) (int64, error) {
	size := dev.Size()
	front := min(size, endBytes)
	if off, err := findData(dev, 0, front); err != nil || off >= 0 {
		return off, err
	}
	tail := max(front, size-endBytes)
	for _, m := range mirrors {
		if m < tail {
			if off, err := findData(dev, m, min(m+4096, tail)); err != nil || off >= 0 {
				return off, err
			}
		}
	}
	if off, err := sampleData(dev, front, tail); err != nil || off >= 0 {
		return off, err
	}
	return findData(dev, tail, size)
}

// findData returns the offset of the first byte in [off, end) that is not zero, or -1. It does not read holes.
func findData(dev block.Device, off, end int64) (int64, error) {
	buf := make([]byte, min(pieceBytes, max(0, end-off)))
	for off < end {
		extents, err := block.Extents(dev, off, end-off)
		if err != nil {
			return 0, err
		}
		for _, e := range extents {
			if e.Flags&block.ReadsZero != 0 {
				off += e.Length
				continue
			}
			for to := off + e.Length; off < to; {
				p := buf[:min(to-off, int64(len(buf)))]
				if _, err := dev.ReadAt(p, off); err != nil {
					return 0, err
				}
				if rest := bytes.TrimLeft(p, "\x00"); len(rest) > 0 {
					return off + int64(len(p)-len(rest)), nil
				}
				off += int64(len(p))
			}
		}
	}
	return -1, nil
}

// sampleData is findData for the beginnings of the first ranges in [off, end) that have data.
func sampleData(dev block.Device, off, end int64) (int64, error) {
	for looked := 0; off < end && looked < maxExtents; {
		extents, err := block.Extents(dev, off, end-off)
		if err != nil {
			return 0, err
		}
		for _, e := range extents {
			if e.Flags&block.ReadsZero == 0 {
				if found, err := findData(dev, off, off+min(e.Length, extentBytes)); err != nil || found >= 0 {
					return found, err
				}
				looked++
			}
			off += e.Length
		}
	}
	return -1, nil
}
