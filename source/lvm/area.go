package lvm

import (
	"encoding/binary"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
)

const (
	areaHeader = 512
	areaMagic  = " LVM2 x[5A%r0N*>"
	areaMax    = 128 << 20 // bytes of a metadata area
)

// badArea says why a metadata area, or its text, is not used.
type badArea struct{ what string }

func (e *badArea) Error() string { return e.what }

func bad(format string, args ...any) error { return &badArea{fmt.Sprintf(format, args...)} }

// readArea returns the committed text of a metadata area without its NUL, nil where there is none or the area is ignored
// (docs/spec/lvm2.md §4). The precommitted text is never used. The error is a *badArea, or one of reading.
func readArea(dev block.Device, s span) ([]byte, error) {
	size := uint64(dev.Size())
	if s.size <= areaHeader || s.off > size || s.size > size-s.off {
		return nil, bad("%d bytes of metadata area at byte %d are not inside the physical volume of %d bytes", s.size, s.off, size)
	}
	var h [areaHeader]byte
	if _, err := dev.ReadAt(h[:], int64(s.off)); err != nil {
		return nil, fmt.Errorf("read metadata area at byte %d: %w", s.off, err)
	}
	le := binary.LittleEndian
	start, length := le.Uint64(h[24:]), le.Uint64(h[32:])
	switch {
	case le.Uint32(h[:]) != checksum(h[4:]):
		return nil, bad("wrong checksum of the header")
	case string(h[4:20]) != areaMagic:
		return nil, bad("no signature")
	case le.Uint32(h[20:]) != 1:
		return nil, bad("version %d", le.Uint32(h[20:]))
	case start != s.off:
		return nil, bad("it says that it is at byte %d", start)
	case length > s.size || length > areaMax || length <= areaHeader:
		return nil, bad("size of %d bytes in the header, %d in the label", length, s.size)
	}
	off, n, sum, flags := le.Uint64(h[40:]), le.Uint64(h[48:]), le.Uint32(h[56:]), le.Uint32(h[60:])
	if flags&1 != 0 || off == 0 {
		return nil, nil
	}
	if off < areaHeader || off >= length || n == 0 || n > length-areaHeader || n > maxText {
		return nil, bad("text of %d bytes at byte %d of an area of %d", n, off, length)
	}
	text := make([]byte, n)
	first := min(n, length-off)
	if _, err := dev.ReadAt(text[:first], int64(s.off+off)); err != nil {
		return nil, fmt.Errorf("read metadata text: %w", err)
	}
	if _, err := dev.ReadAt(text[first:], int64(s.off+areaHeader)); err != nil {
		return nil, fmt.Errorf("read metadata text: %w", err)
	}
	if checksum(text) != sum {
		return nil, bad("wrong checksum of the text")
	}
	if text[n-1] == 0 {
		text = text[:n-1]
	}
	return text, nil
}
