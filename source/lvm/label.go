package lvm

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/dmsnap/dmsnap/block"
)

const (
	sectorSize   = block.SectorSize
	labelSectors = 4 // that a label may be in
	labelMagic   = "LABELONE"
	labelType    = "LVM2 001"
	idLength     = 32 // bytes of a UUID on disk
)

// checksum is that of LVM's structures (docs/spec/lvm2.md §3.2).
func checksum(b []byte) uint32 { return ^crc32.Update(^uint32(0xF597A6CF), crc32.IEEETable, b) }

// A span is a range of a physical volume in bytes.
type span struct{ off, size uint64 }

// A label is what the label sector and the header behind it say (docs/spec/lvm2.md §3).
type label struct {
	id       string // UUID as the text has it
	size     uint64 // a hint
	areas    []span // of metadata
	inUse    bool   // flag of the extension
	version  uint32 // of the extension
	warnings []string
}

// readLabel returns the label of dev, nil where there is none that counts. The error is one of reading.
func readLabel(dev block.Device) (*label, error) {
	var buf [labelSectors * sectorSize]byte
	n := min(int64(len(buf)), dev.Size()/sectorSize*sectorSize)
	if _, err := dev.ReadAt(buf[:n], 0); err != nil {
		return nil, fmt.Errorf("read label: %w", err)
	}
	var found *label
	var warnings []string
	for i := range n / sectorSize {
		s := buf[i*sectorSize:][:sectorSize]
		if string(s[:8]) != labelMagic {
			continue
		}
		l, err := decodeLabel(s, uint64(i))
		switch {
		case err != nil:
			warnings = append(warnings, fmt.Sprintf("label in sector %d is ignored: %v", i, err))
		case found != nil:
			warnings = append(warnings, fmt.Sprintf("label in sector %d is ignored: another one is in front of it", i))
		default:
			found = l
		}
	}
	if found != nil {
		found.warnings = warnings
	}
	return found, nil
}

// decodeLabel decodes the label sector s, the one of this number.
func decodeLabel(s []byte, number uint64) (*label, error) {
	le := binary.LittleEndian
	switch {
	case le.Uint64(s[8:]) != number:
		return nil, fmt.Errorf("it is of sector %d", le.Uint64(s[8:]))
	case le.Uint32(s[16:]) != checksum(s[20:]):
		return nil, fmt.Errorf("wrong checksum")
	case string(s[24:32]) != labelType:
		return nil, fmt.Errorf("it is of type %q", s[24:32])
	}
	at := uint64(le.Uint32(s[20:]))
	if at < 32 || at > sectorSize-idLength-8 {
		return nil, fmt.Errorf("header at byte %d of the sector", at)
	}
	h := s[at:]
	l := &label{id: hyphenate(string(h[:idLength])), size: le.Uint64(h[idLength:])}
	if !isID(l.id) {
		return nil, fmt.Errorf("malformed UUID %q", h[:idLength])
	}
	h = h[idLength+8:]
	_, h, ok := spans(h) // data areas: the text says where extents are
	if !ok {
		return nil, fmt.Errorf("the list of data areas has no end")
	}
	if l.areas, h, ok = spans(h); !ok {
		return nil, fmt.Errorf("the list of metadata areas has no end")
	}
	if len(h) >= 8 {
		l.version, l.inUse = le.Uint32(h), le.Uint32(h[4:])&1 != 0
		l.inUse = l.inUse && l.version != 0
	}
	return l, nil
}

// spans reads a list up to the entry whose offset is zero, and returns what is behind it.
func spans(b []byte) (list []span, rest []byte, ok bool) {
	le := binary.LittleEndian
	for len(b) >= 16 {
		s := span{le.Uint64(b), le.Uint64(b[8:])}
		b = b[16:]
		if s.off == 0 {
			return list, b, true
		}
		list = append(list, s)
	}
	return nil, nil, false
}

// idGroups are the lengths of the groups of a UUID as text.
var idGroups = []int{6, 4, 4, 4, 4, 4, 6}

// hyphenate puts hyphens into a UUID of 32 characters.
func hyphenate(id string) string {
	s := ""
	for i, n := range idGroups {
		if i > 0 {
			s += "-"
		}
		s, id = s+id[:n], id[n:]
	}
	return s
}

// isID reports whether s is a UUID as text.
func isID(s string) bool {
	for i, n := range idGroups {
		if i > 0 {
			if s == "" || s[0] != '-' {
				return false
			}
			s = s[1:]
		}
		if len(s) < n {
			return false
		}
		for _, c := range []byte(s[:n]) {
			if !isName(c) || c == '_' || c == '.' || c == '+' || c == '-' {
				return false
			}
		}
		s = s[n:]
	}
	return s == ""
}
