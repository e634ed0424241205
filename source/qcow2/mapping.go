package qcow2

import (
	"encoding/binary"
	"fmt"
)

// Masks of table entries (docs/spec/qcow2.md §5.1). Reserved bits are ignored.
const (
	offsetMask     = 1<<56 - 1<<9
	compressedFlag = 1 << 62
	copiedFlag     = 1 << 63
	zeroFlag       = 1

	subclusters = 32
)

// pageBytes is how much of an L1 or L2 table is read and cached at once.
const pageBytes = 16 << 10

// A kind says where the bytes of a piece are.
type kind uint8

const (
	unallocated kind = iota // in the backing file, as far as that reaches; else zeros
	zeros
	data
	compressed
)

// A piece is a run of bytes of the disk that are in one place.
type piece struct {
	kind  kind
	n     int64  // bytes
	host  int64  // data: byte of the file with the content where the piece begins
	entry uint64 // compressed: the descriptor
	in    int64  // compressed: byte of the cluster where the piece begins
	space bool   // zeros: a host cluster is reserved
}

// continues reports whether next, which follows p on the disk, can be read together with p.
func (p piece) continues(next piece) bool {
	return p.kind == next.kind && p.space == next.space && p.kind != compressed && (p.kind != data || p.host+p.n == next.host)
}

// entriesPerCall bounds how many L2 entries one call of place looks at.
const entriesPerCall = 1 << 14

// place returns the piece that begins at byte off of the disk and has at most n ≥ 1 bytes. A longer run may be returned
// in parts.
func (d *Disk) place(off, n int64) (piece, error) {
	var all piece
	for entries := 0; all.n < n && entries < entriesPerCall; {
		p, looked, err := d.placeTable(off+all.n, n-all.n, all)
		if err != nil {
			if all.n > 0 {
				break // what comes before the damage can be read
			}
			return piece{}, err
		}
		if looked == 0 {
			break
		}
		all, entries = p, entries+looked
	}
	return all, nil
}

// placeTable lengthens the piece before by what one page of an L2 table says of the n bytes at off. looked is how many
// entries it took over; 0: what stands at off does not continue the piece.
func (d *Disk) placeTable(off, n int64, before piece) (p piece, looked int, err error) {
	reach := d.image.l2Entries << d.image.bits
	index := off / reach
	entry, err := d.l1Entry(index)
	if err != nil {
		return p, 0, err
	}
	if entry&offsetMask == 0 {
		return before.extend(piece{kind: unallocated, n: min(n, reach-off%reach)})
	}
	offset := int64(entry & offsetMask)
	if offset%d.image.info.ClusterSize != 0 {
		return p, 0, corrupt(fmt.Sprintf("L1 entry %d (byte %d of the disk)", index, off), "the offset 0x%x of the L2 table is not a multiple of the cluster size", offset)
	}
	width := d.image.entryBytes
	at := offset + off%reach>>d.image.bits*width
	start := at - at%d.image.pageBytes
	page, err := d.image.metadata(offset, start, fmt.Sprintf("L2 table of L1 entry %d (byte %d of the disk)", index, off))
	if err != nil {
		return p, 0, err
	}
	for at -= start; at < int64(len(page)) && n > 0; at += width {
		for rest := min(n, d.image.info.ClusterSize-off%d.image.info.ClusterSize); rest > 0; {
			next, err := d.placeEntry(page[at:at+width], off, rest)
			if err != nil {
				if looked > 0 {
					return before, looked, nil
				}
				return p, 0, fmt.Errorf("image byte %d: %w", start+at, err)
			}
			longer, more, _ := before.extend(next)
			if more == 0 {
				return before, looked, nil
			}
			before, looked = longer, looked+more
			off, n, rest = off+next.n, n-next.n, rest-next.n
		}
	}
	return before, looked, nil
}

// extend returns p and next as one piece, or 0 where next does not continue p.
func (p piece) extend(next piece) (piece, int, error) {
	if p.n == 0 {
		return next, 1, nil
	}
	if !p.continues(next) {
		return p, 0, nil
	}
	p.n += next.n
	return p, 1, nil
}

// placeEntry returns what an L2 entry says of at most n bytes at off, which are in its cluster.
func (d *Disk) placeEntry(b []byte, off, n int64) (piece, error) {
	i := d.image
	entry := binary.BigEndian.Uint64(b)
	place := func() string { return fmt.Sprintf("L2 entry 0x%016x of byte %d of the disk", entry, off) }
	in := off % i.info.ClusterSize
	if entry&compressedFlag != 0 {
		if i.info.ExternalData {
			return piece{}, corrupt(place(), "compressed data in an image with an external data file")
		}
		return piece{kind: compressed, n: n, entry: entry, in: in}, nil
	}
	host := int64(entry & offsetMask)
	if host%i.info.ClusterSize != 0 {
		return piece{}, corrupt(place(), "the offset 0x%x is not a multiple of the cluster size", host)
	}
	p := piece{n: n, host: host + in}
	allocated := host != 0 || i.info.ExternalData && entry&copiedFlag != 0
	switch {
	case i.info.ExtendedL2:
		size := i.info.ClusterSize / subclusters
		state := binary.BigEndian.Uint64(b[8:])
		first := in / size
		p.kind = subclusterKind(state, first)
		p.n = min(n, (first+1)*size-in)
		for p.n < n && subclusterKind(state, (in+p.n)/size) == p.kind {
			p.n = min(n, p.n+size)
		}
		for s := first; s*size < in+p.n; s++ {
			if state>>s&1 != 0 && state>>(s+subclusters)&1 != 0 {
				return piece{}, corrupt(place(), "subcluster %d has data and is zeros (0x%016x)", s, state)
			}
		}
		if p.kind == data && !allocated {
			return piece{}, corrupt(place(), "subcluster %d has data, the cluster has no offset", first)
		}
	case entry&zeroFlag != 0 && i.info.Version == 2:
		return piece{}, corrupt(place(), "a zero flag in a version 2 image")
	case entry&zeroFlag != 0:
		p.kind = zeros
	case allocated:
		p.kind = data
	}
	if p.kind != data {
		p.host = 0
		p.space = p.kind == zeros && allocated
		return p, nil
	}
	if i.info.ExternalData && p.host != off {
		return piece{}, corrupt(place(), "the offset in the external data file differs from that on the disk")
	}
	if host >= i.content.Size() {
		return piece{}, corrupt(place(), "the cluster begins at byte %d, the file ends at byte %d: is it truncated?", host, i.content.Size())
	}
	return p, nil
}

// subclusterKind is what the bitmap of an extended entry says of subcluster s. Both bits: data, which is an error.
func subclusterKind(state uint64, s int64) kind {
	switch {
	case state>>s&1 != 0:
		return data
	case state>>(s+subclusters)&1 != 0:
		return zeros
	}
	return unallocated
}

// l1Entry returns entry index of the L1 table.
func (d *Disk) l1Entry(index int64) (uint64, error) {
	if index >= d.l1.entries {
		return 0, nil
	}
	at := d.l1.offset + index*8
	start := at - at%d.image.pageBytes
	page, err := d.image.metadata(d.l1.offset, start, "L1 table")
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(page[at-start:]), nil
}
