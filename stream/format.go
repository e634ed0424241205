package stream

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
)

// A stream is a header, frames in ascending order of places, and a last frame with counts. Numbers are little-endian.
//
// Header:
//
//	  0  16  "dmsnap stream 1\n"
//	 16   4  length n of the text, at most 4096
//	 20   n  Header as JSON
//	20+n 16  digest of all before it
//
// Frame:
//
//	  0   1  1: records; 2: the last frame
//	  1   1  packing of the new bytes: 0 none, 1 one zstd frame
//	  2   2  zero
//	  4   4  length p of the records' heads, at most maxHeads
//	  8   4  length of the new bytes, at most maxData
//	 12   4  length d of the new bytes as they are packed, at most that
//	 16  16  digest of bytes 0–15, of the heads, and of the new bytes if they are packed
//	 32   p  heads of records
//	32+p  d  the new bytes of all its records, in order, packed
//
// Head of a record, which is a run of blocks:
//
//	 0   8  place, a byte of the disk, multiple of Block
//	 8   4  length in bytes, a multiple of Block unless the disk ends there
//	12   4  flags: 1 the new bytes are zeros, and not in the stream; 2 the old bytes are zeros
//	16      for each block: unless flag 1 the digest of the new bytes (16); unless flag 2 the digest of the old
//	        bytes (16), and the CRC-32C of each of its sectors of 512 bytes (4 each)
//
// Last frame: its heads are
//
//	 0   8  records     8   8  bytes of data     16   8  bytes of zeros
//	24  32  SHA-256 of the header and of all frames before, without their new bytes, which the digests in the heads cover
//
// Digests are the first 16 bytes of the SHA-256.
const (
	magic = "dmsnap stream 1\n"

	headerFixed = len(magic) + 4
	maxHeader   = 4096
	frameFixed  = 32
	recordFixed = 16
	lastLength  = 24 + sha256.Size

	kindRecords, kindLast byte = 1, 2
	packedNot, packedZstd byte = 0, 1

	newZeros uint32 = 1
	oldZeros uint32 = 2

	digestLength = 16
	sector       = 512
	maxData      = 1 << 20
	// Each block of a record has at most 64 bytes of digests, and new bytes or a part of the frame's greatest length.
	maxBlocks = maxData / Block
	maxHeads  = maxBlocks * (recordFixed + 2*digestLength + 4*Block/sector)
)

type digest [digestLength]byte

func digestOf(parts ...[]byte) (d digest) {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	copy(d[:], h.Sum(nil))
	return d
}

func digestOfOne(p []byte) digest {
	s := sha256.Sum256(p)
	return digest(s[:digestLength])
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func sumOfSector(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// appendHeader and readHeader encode and decode the header.
func appendHeader(b []byte, h Header) []byte {
	text, err := json.Marshal(h)
	if err != nil {
		panic(err) // it has numbers and a word
	}
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(text)))
	b = append(b, text...)
	d := digestOf(b)
	return append(b, d[:]...)
}

func readHeader(r io.Reader) (h Header, whole []byte, err error) {
	bad := func(problem string) (Header, []byte, error) { return h, nil, &FormatError{0, problem} }
	whole = make([]byte, headerFixed)
	if _, err := io.ReadFull(r, whole); err != nil {
		if isCut(err) {
			return bad("it ends within its header")
		}
		return h, nil, err
	}
	if !bytes.HasPrefix(whole, []byte(magic)) {
		if bytes.HasPrefix(whole, []byte(magic[:len(magic)-2])) {
			return bad("a stream of another version, " + fmt.Sprintf("%q", whole[:len(magic)-1]))
		}
		return bad("it is no stream of dmsnap")
	}
	n := binary.LittleEndian.Uint32(whole[len(magic):])
	if n > maxHeader {
		return bad(fmt.Sprintf("a header of %d bytes", n))
	}
	whole = append(whole, make([]byte, int(n)+digestLength)...)
	if _, err := io.ReadFull(r, whole[headerFixed:]); err != nil {
		if isCut(err) {
			return bad("it ends within its header")
		}
		return h, nil, err
	}
	text := whole[headerFixed : headerFixed+int(n)]
	if digestOf(whole[:headerFixed+int(n)]) != digest(whole[headerFixed+int(n):]) {
		return bad("the header was changed: its digest differs")
	}
	if err := json.Unmarshal(text, &h); err != nil {
		return bad("the header is no JSON")
	}
	switch {
	case h.Kind != Delta && h.Kind != Disk:
		return bad(fmt.Sprintf("kind %q", h.Kind))
	case h.Size <= 0 || h.From < 0 || h.From > h.Size || h.From%Block != 0:
		return bad(fmt.Sprintf("a disk of %d bytes from byte %d", h.Size, h.From))
	}
	return h, whole, nil
}

// A frame is one of a stream.
type frame struct {
	at      int64 // byte of the stream
	kind    byte
	packing byte
	length  uint32 // of the new bytes, not packed
	heads   []byte
	packed  []byte
	count   Count // what the heads say; set by a reader
}

// appendHead appends the frame without its new bytes.
func (f *frame) appendHead(b []byte) []byte {
	start := len(b)
	b = append(b, f.kind, f.packing, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(f.heads)))
	b = binary.LittleEndian.AppendUint32(b, f.length)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(f.packed)))
	d := f.digest(b[start:])
	b = append(b, d[:]...)
	return append(b, f.heads...)
}

// digest is that of a frame whose first 16 bytes are fixed. New bytes that are not packed are left to their own digests,
// so that no byte is digested twice.
func (f *frame) digest(fixed []byte) digest {
	if f.packing == packedNot {
		return digestOf(fixed, f.heads)
	}
	return digestOf(fixed, f.heads, f.packed)
}

// readFrame reads a frame that begins at byte at. head is what appendHead makes.
func readFrame(r io.Reader, at int64) (f *frame, head []byte, err error) {
	bad := func(problem string) (*frame, []byte, error) { return nil, nil, &FormatError{at, problem} }
	fill := func(p []byte) error {
		_, err := io.ReadFull(r, p)
		if isCut(err) {
			return &FormatError{at, "the stream ends here, before its last frame"}
		}
		return err
	}
	head = make([]byte, frameFixed)
	if err := fill(head); err != nil {
		return nil, nil, err
	}
	f = &frame{at: at, kind: head[0], packing: head[1], length: binary.LittleEndian.Uint32(head[8:])}
	heads, packed := binary.LittleEndian.Uint32(head[4:]), binary.LittleEndian.Uint32(head[12:])
	if heads > maxHeads || f.length > maxData || packed > f.length {
		return bad("a frame was changed: its lengths are impossible")
	}
	head = append(head, make([]byte, heads)...)
	if err := fill(head[frameFixed:]); err != nil {
		return nil, nil, err
	}
	f.heads, f.packed = head[frameFixed:], buffer(int(packed))
	if err := fill(f.packed); err != nil {
		return nil, nil, err
	}
	if f.digest(head[:16]) != digest(head[16:frameFixed]) {
		return bad("a frame was changed: its digest differs")
	}
	switch {
	case f.kind != kindRecords && f.kind != kindLast, head[2] != 0, head[3] != 0,
		f.packing != packedNot && f.packing != packedZstd, f.packing == packedNot && packed != f.length:
		return bad("a frame of an unknown form")
	case f.kind == kindLast && (len(f.heads) != lastLength || f.length != 0):
		return bad("a last frame of an unknown form")
	}
	return f, head, nil
}

// A record is a run of blocks of a frame.
type record struct {
	off, length int64
	flags       uint32
	digests     []byte // as in its head
	data        []byte // new bytes, unless they are zeros
}

// digestsLength is how many bytes of digests a block of n bytes has.
func digestsLength(flags uint32, n int64) int {
	length := 0
	if flags&newZeros == 0 {
		length += digestLength
	}
	if flags&oldZeros == 0 {
		length += digestLength + 4*int((n+sector-1)/sector)
	}
	return length
}

// appendRecord appends the head of a record.
func appendRecord(b []byte, r record) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(r.off))
	b = binary.LittleEndian.AppendUint32(b, uint32(r.length))
	b = binary.LittleEndian.AppendUint32(b, r.flags)
	return append(b, r.digests...)
}

// records decodes the heads of a frame of a disk of the given number of bytes; data are its new bytes, unpacked.
func (f *frame) records(size int64, data []byte) ([]record, error) {
	bad := func(problem string) ([]record, error) { return nil, &FormatError{f.at, problem} }
	var all []record
	var next, blocks int64
	for b := f.heads; len(b) > 0; {
		if len(b) < recordFixed {
			return bad("a record is cut")
		}
		place, length := binary.LittleEndian.Uint64(b), int64(binary.LittleEndian.Uint32(b[8:]))
		r := record{off: int64(place), length: length, flags: binary.LittleEndian.Uint32(b[12:])}
		b = b[recordFixed:]
		end := r.off + length
		switch {
		case place > uint64(size) || length == 0 || end > size || end < r.off:
			return bad(fmt.Sprintf("a record of %d bytes at byte %d is outside a disk of %d bytes", length, place, size))
		case r.off%Block != 0 || length%Block != 0 && end != size:
			return bad(fmt.Sprintf("a record of %d bytes at byte %d is not of whole blocks", length, r.off))
		case r.off < next:
			return bad(fmt.Sprintf("the record at byte %d of the disk is not behind the one before", r.off))
		case r.flags&^(newZeros|oldZeros) != 0 || r.flags == newZeros|oldZeros:
			return bad(fmt.Sprintf("a record has the flags %#x", r.flags))
		}
		next = end
		if blocks += (length + Block - 1) / Block; blocks > maxBlocks {
			return bad("a frame has too many blocks")
		}
		n := 0
		for at := int64(0); at < length; at += Block {
			n += digestsLength(r.flags, min(Block, length-at))
		}
		if len(b) < n {
			return bad("a record is cut")
		}
		r.digests, b = b[:n], b[n:]
		if r.flags&newZeros == 0 {
			if int64(len(data)) < length {
				return bad("a record is cut")
			}
			r.data, data = data[:length], data[length:]
		}
		all = append(all, r)
	}
	if len(data) > 0 {
		return bad("bytes that are in no record")
	}
	return all, nil
}

// blocks calls f for each block of the record: its place, its new bytes (nil: zeros), their digest (nil: none), and the
// digest and sector sums of its old bytes (nil: zeros).
func (r record) blocks(f func(off, n int64, fresh, digest, old []byte) error) error {
	d := r.digests
	for at := int64(0); at < r.length; at += Block {
		n := min(Block, r.length-at)
		var fresh, sum, old []byte
		if r.flags&newZeros == 0 {
			fresh, sum, d = r.data[at:at+n], d[:digestLength], d[digestLength:]
		}
		if r.flags&oldZeros == 0 {
			k := digestsLength(newZeros, n)
			old, d = d[:k], d[k:]
		}
		if err := f(r.off+at, n, fresh, sum, old); err != nil {
			return err
		}
	}
	return nil
}

// appendLast encodes the heads of the last frame, parseLast decodes them.
func appendLast(b []byte, c Count, sum []byte) []byte {
	for _, v := range []int64{c.Records, c.Data, c.Zero} {
		b = binary.LittleEndian.AppendUint64(b, uint64(v))
	}
	return append(b, sum...)
}

func parseLast(b []byte) (c Count, sum []byte) {
	number := func(at int) int64 { return int64(binary.LittleEndian.Uint64(b[at:])) }
	return Count{number(0), number(8), number(16)}, b[24:]
}

func isCut(err error) bool { return err == io.EOF || err == io.ErrUnexpectedEOF }

var zeros [Block]byte
