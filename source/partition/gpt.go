package partition

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"unicode/utf16"
)

const (
	gptMagic   = "EFI PART"
	minHeader  = 92
	maxEntries = 1024
	maxArray   = 1 << 20
)

// A gptHeader is one of the two copies of a GPT's header.
type gptHeader struct {
	other       uint64 // sector of the other copy
	first, last uint64 // usable sectors
	id          string
	entries     uint64 // first sector of the array
	count, size uint32
	crc         uint32 // of the array
}

// readGPT adds the partitions of a GPT. sectorSize is 0 where it is not known.
func (t *Table) readGPT(sectorSize int) error {
	sizes := []int{sectorSize}
	if sectorSize == 0 {
		sizes = []int{512, 4096}
		at512, err := t.hasMagic(512)
		if err != nil {
			return err
		}
		at4096, err := t.hasMagic(4096)
		if err != nil {
			return err
		}
		if at4096 && !at512 {
			sizes = []int{4096, 512}
		}
	}
	var problems []string
	for _, s := range sizes {
		t.SectorSize = s
		sectors := uint64(t.disk.Size()) / uint64(s)
		if sectors < 3 {
			continue
		}
		places := []uint64{1, sectors - 1}
		for i := 0; i < len(places); i++ {
			h, err := t.readHeader(places[i])
			var array []byte
			if err == nil {
				if i == 0 && h.other != places[1] && h.other > 1 && h.other < sectors {
					places = append(places, h.other) // the disk became longer since
				}
				array, err = t.readArray(h)
			}
			if bad, is := err.(*damage); is {
				if s == sizes[0] {
					problems = append(problems, fmt.Sprintf("GPT header at sector %d: %s", places[i], bad.what))
				}
				continue
			}
			if err != nil {
				return err
			}
			if i > 0 {
				for _, p := range problems {
					t.warn("%s", p)
				}
				t.warn("the backup at sector %d is used", places[i])
			}
			t.addEntries(h, array)
			return nil
		}
	}
	t.SectorSize = sizes[0]
	for _, p := range problems {
		t.warn("%s", p)
	}
	t.warn("no copy of the GPT is sound: it has no partitions")
	return nil
}

func (t *Table) hasMagic(off int64) (bool, error) {
	buf := make([]byte, len(gptMagic))
	if off+int64(len(buf)) > t.disk.Size() {
		return false, nil
	}
	if _, err := t.disk.ReadAt(buf, off); err != nil {
		return false, fmt.Errorf("read GPT header at byte %d: %w", off, err)
	}
	return string(buf) == gptMagic, nil
}

// damage says why a copy of a GPT can't be used.
type damage struct{ what string }

func (d *damage) Error() string { return d.what }

func damaged(format string, args ...any) error { return &damage{fmt.Sprintf(format, args...)} }

// readHeader reads and checks the header at a sector (docs/spec/lvm2.md §2.2, §2.4). The sector is on the disk. The error is
// a *damage, or one of reading.
func (t *Table) readHeader(sector uint64) (*gptHeader, error) {
	buf := make([]byte, t.SectorSize)
	if _, err := t.disk.ReadAt(buf, int64(sector)*int64(t.SectorSize)); err != nil {
		return nil, fmt.Errorf("read GPT header at sector %d: %w", sector, err)
	}
	le := binary.LittleEndian
	if string(buf[:8]) != gptMagic {
		return nil, damaged("no signature")
	}
	size := le.Uint32(buf[12:])
	if size < minHeader || size > uint32(len(buf)) {
		return nil, damaged("header size of %d bytes", size)
	}
	want := le.Uint32(buf[16:])
	clear(buf[16:20])
	if crc32.ChecksumIEEE(buf[:size]) != want {
		return nil, damaged("wrong checksum")
	}
	if at := le.Uint64(buf[24:]); at != sector {
		return nil, damaged("it says that it is at sector %d", at)
	}
	h := &gptHeader{other: le.Uint64(buf[32:]), first: le.Uint64(buf[40:]), last: le.Uint64(buf[48:]), id: guid(buf[56:72]),
		entries: le.Uint64(buf[72:]), count: le.Uint32(buf[80:]), size: le.Uint32(buf[84:]), crc: le.Uint32(buf[88:])}
	if h.count > maxEntries || h.size < 128 || h.size&(h.size-1) != 0 || uint64(h.count)*uint64(h.size) > maxArray {
		return nil, damaged("%d entries of %d bytes", h.count, h.size)
	}
	return h, nil
}

// readArray reads and checks the array of entries. Errors are those of readHeader.
func (t *Table) readArray(h *gptHeader) ([]byte, error) {
	s := uint64(t.SectorSize)
	n := int64(h.count) * int64(h.size)
	if h.entries >= uint64(t.disk.Size())/s || int64(h.entries*s) > t.disk.Size()-n {
		return nil, damaged("the array of entries at sector %d is behind the end of the disk", h.entries)
	}
	array := make([]byte, n)
	if _, err := t.disk.ReadAt(array, int64(h.entries*s)); err != nil {
		return nil, fmt.Errorf("read GPT entries at sector %d: %w", h.entries, err)
	}
	if crc32.ChecksumIEEE(array) != h.crc {
		return nil, damaged("wrong checksum of the array of entries at sector %d", h.entries)
	}
	return array, nil
}

// addEntries adds the partitions in an array.
func (t *Table) addEntries(h *gptHeader, array []byte) {
	t.ID = h.id
	le := binary.LittleEndian
	for i := range int(h.count) {
		e := array[i*int(h.size):][:128]
		if bytes.Equal(e[:16], make([]byte, 16)) {
			continue
		}
		first, last := le.Uint64(e[32:]), le.Uint64(e[40:])
		if last < first || first < h.first || last > h.last {
			t.warn("partition %d, sectors %d to %d, is outside of the usable sectors %d to %d: left out", i+1, first, last, h.first, h.last)
			continue
		}
		// last-first+1 overflows for 2^64 sectors only, which no usable range of a disk here has.
		t.add(Partition{Number: i + 1, Type: guid(e[:16]), ID: guid(e[16:32]), Name: name(e[56:128])}, first, max(last-first+1, last-first))
	}
}

// guid is the usual text of a GUID on disk.
func guid(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08X-%04X-%04X-%X-%X", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

// name decodes UTF-16 up to the first zero.
func name(b []byte) string {
	var units []uint16
	for i := 0; i+1 < len(b); i += 2 {
		u := binary.LittleEndian.Uint16(b[i:])
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}
