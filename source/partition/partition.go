// Package partition reads partition tables: MBR with logical partitions, and GPT. Each partition is a [block.Device] within
// the disk.
//
//	table, err := partition.Read(disk, 0)
//	dev, err := table.Open(2) // partition 2
//
// Partitions are numbered as Linux does. The format is in docs/spec/lvm2.md §2.
//
// Guarantees: nothing is written to a table, whatever is in one costs bounded memory and time, and a partition is never read
// or written outside its range.
package partition

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/source/mapped"
)

// ErrNoTable reports a disk without a partition table. A boot signature with four empty entries is none.
var ErrNoTable = errors.New("no partition table")

// A Scheme is the kind of a partition table.
type Scheme string

const (
	MBR Scheme = "mbr"
	GPT Scheme = "gpt"
)

// A Table is the partition table of a disk.
type Table struct {
	Scheme     Scheme
	SectorSize int // bytes, of the units of the table: 512 or 4096
	ID         string
	Partitions []Partition // by number
	// Warnings say what is wrong with the table, and which partitions were left out or cut.
	Warnings []string

	disk block.Device
}

// A Partition is a range of a disk.
type Partition struct {
	Number   int
	Start    int64  // byte of the disk
	Size     int64  // bytes
	Type     string // "0x8e" (MBR) or a GUID in upper case (GPT)
	ID       string // GUID (GPT)
	Name     string // GPT; from the disk: quote it
	Extended bool   // holds logical partitions; can't be opened
}

// Read reads the partition table of disk. sectorSize is that of the disk in bytes (512, 4096), or 0: a GPT says it itself,
// for an MBR 512 is assumed.
//
// Errors: ErrNoTable; those of reading. Damage is no error: Warnings name it, and what is sound is listed. A GPT
// of which neither copy is sound has no partitions.
func Read(disk block.Device, sectorSize int) (*Table, error) {
	t := &Table{SectorSize: sectorSize, disk: disk}
	switch sectorSize {
	case 0:
		t.SectorSize = 512
	case 512, 4096:
	default:
		return nil, fmt.Errorf("sector size of %d bytes: must be 512 or 4096", sectorSize)
	}
	if disk.Size() < 512 {
		return nil, ErrNoTable
	}
	entries, err := readEntries(disk, 0)
	if err != nil {
		return nil, err
	}
	if entries == nil || !slices.ContainsFunc(entries, func(e entry) bool { return !e.empty() }) {
		return nil, ErrNoTable
	}
	if slices.ContainsFunc(entries, func(e entry) bool { return !e.empty() && e.kind == typeProtective }) {
		t.Scheme = GPT
		err = t.readGPT(sectorSize)
	} else {
		t.Scheme = MBR
		err = t.readMBR(entries)
	}
	if err != nil {
		return nil, err
	}
	t.warnOverlaps()
	return t, nil
}

// Open returns partition number as a device. It does not own the disk.
func (t *Table) Open(number int) (*mapped.Device, error) {
	for _, p := range t.Partitions {
		switch {
		case p.Number != number:
		case p.Extended:
			return nil, fmt.Errorf("partition %d is an extended partition, which holds the logical ones", number)
		default:
			return mapped.New("", []mapped.Target{{Length: p.Size, Areas: []mapped.Area{{Dev: t.disk, Off: p.Start}}}})
		}
	}
	return nil, fmt.Errorf("no partition %d: %s", number, t.numbers())
}

// numbers lists the partitions for a message.
func (t *Table) numbers() string {
	if len(t.Partitions) == 0 {
		return "the table has none"
	}
	var list []string
	for _, p := range t.Partitions {
		list = append(list, fmt.Sprint(p.Number))
	}
	return "the table has " + strings.Join(list, ", ")
}

// maxWarnings bounds the warnings of a table.
const maxWarnings = 64

func (t *Table) warn(format string, args ...any) {
	if len(t.Warnings) < maxWarnings {
		t.Warnings = append(t.Warnings, fmt.Sprintf(format, args...))
	}
}

// add adds a partition that starts at a sector and has a number of them, cut to the disk. An empty one, or one that starts
// behind the end, is left out with a warning.
func (t *Table) add(p Partition, start, sectors uint64) {
	s, size := uint64(t.SectorSize), uint64(t.disk.Size())
	if sectors == 0 || start >= size/s {
		t.warn("partition %d begins at sector %d, behind the end of the disk: left out", p.Number, start)
		return
	}
	if rest := size/s - start; sectors > rest {
		t.warn("partition %d ends behind the end of the disk: cut from %d to %d sectors", p.Number, sectors, rest)
		sectors = rest
	}
	p.Start, p.Size = int64(start*s), int64(sectors*s)
	t.Partitions = append(t.Partitions, p)
}

// warnOverlaps warns of partitions that share bytes.
func (t *Table) warnOverlaps() {
	sorted := slices.DeleteFunc(slices.Clone(t.Partitions), func(p Partition) bool { return p.Extended })
	slices.SortFunc(sorted, func(a, b Partition) int {
		if a.Start != b.Start {
			return int(min(1, max(-1, a.Start-b.Start)))
		}
		return a.Number - b.Number
	})
	var last Partition // the one that ends last so far
	for _, p := range sorted {
		if p.Start < last.Start+last.Size {
			t.warn("partitions %d and %d overlap", last.Number, p.Number)
		}
		if p.Start+p.Size > last.Start+last.Size {
			last = p
		}
	}
}
