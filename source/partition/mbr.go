package partition

import (
	"encoding/binary"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
)

const (
	typeProtective = 0xee
	// maxLogical bounds the chain of logical partitions.
	maxLogical   = 128
	firstLogical = 5
)

// An entry is one of the four of a sector with a boot signature.
type entry struct {
	kind           byte
	start, sectors uint32
}

func (e entry) empty() bool { return e.kind == 0 || e.sectors == 0 }

func (e entry) extended() bool {
	return !e.empty() && (e.kind == 0x05 || e.kind == 0x0f || e.kind == 0x85)
}

// readEntries reads the entries in the sector at off; nil where there is no table.
func readEntries(disk block.Device, off int64) ([]entry, error) {
	var buf [512]byte
	if _, err := disk.ReadAt(buf[:], off); err != nil {
		return nil, fmt.Errorf("read partition table at byte %d: %w", off, err)
	}
	if buf[510] != 0x55 || buf[511] != 0xaa {
		return nil, nil
	}
	var entries []entry
	for i := range 4 {
		b := buf[446+16*i:][:16]
		if b[0]&0x7f != 0 { // neither active nor not: code of a boot sector
			return nil, nil
		}
		entries = append(entries, entry{b[4], binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])})
	}
	return entries, nil
}

// readMBR adds the partitions of an MBR with these entries.
func (t *Table) readMBR(entries []entry) error {
	var extended *entry
	for i, e := range entries {
		if e.empty() {
			continue
		}
		t.add(Partition{Number: i + 1, Type: mbrType(e.kind), Extended: e.extended()}, uint64(e.start), uint64(e.sectors))
		if e.extended() && extended == nil {
			extended = &entries[i]
		}
	}
	if extended == nil {
		return nil
	}
	return t.readLogical(uint64(extended.start), uint64(extended.sectors))
}

// readLogical follows the chain of sectors that begins with the extended partition (docs/spec/lvm2.md §2.1).
func (t *Table) readLogical(base, sectors uint64) error {
	number := firstLogical
	visited := map[uint64]bool{}
	for at := base; ; {
		switch {
		case visited[at]:
			t.warn("the chain of logical partitions leads back to sector %d: it ends there", at)
			return nil
		case len(visited) == maxLogical:
			t.warn("more than %d logical partitions: the rest is left out", maxLogical)
			return nil
		case at >= uint64(t.disk.Size())/uint64(t.SectorSize):
			t.warn("the chain of logical partitions leads to sector %d, behind the end of the disk: it ends there", at)
			return nil
		}
		visited[at] = true
		entries, err := readEntries(t.disk, int64(at)*int64(t.SectorSize))
		if err != nil {
			return err
		}
		if entries == nil {
			t.warn("sector %d, in the chain of logical partitions, has no table: the chain ends there", at)
			return nil
		}
		var logical, link *entry
		for i, e := range entries {
			switch {
			case e.empty():
			case e.extended() && link == nil:
				link = &entries[i]
			case !e.extended() && logical == nil:
				logical = &entries[i]
			}
		}
		if logical != nil {
			start := at + uint64(logical.start)
			if start < base || start+uint64(logical.sectors) > base+sectors {
				t.warn("logical partition %d reaches outside the extended partition", number)
			}
			t.add(Partition{Number: number, Type: mbrType(logical.kind)}, start, uint64(logical.sectors))
			number++
		}
		if link == nil {
			return nil
		}
		at = base + uint64(link.start)
	}
}

func mbrType(kind byte) string { return fmt.Sprintf("0x%02x", kind) }
