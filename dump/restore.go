package dump

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// Restored describes the result of [Restore].
type Restored struct {
	Size         int64  // bytes of the device
	ChunkSectors uint32 // 0 where the text has no usable one
	Slots        uint64 // that the text mentions
}

// A SyntaxError is an error in a text, with its line.
type SyntaxError struct {
	Line int // from 1; 0 for a packed dump that can't be unpacked
	What string
}

func (e *SyntaxError) Error() string {
	if e.Line == 0 {
		return e.What
	}
	return fmt.Sprintf("line %d: %s", e.Line, e.What)
}

// maxLine bounds a line of text, in bytes.
const maxLine = 1024

// Restore reads a dump, as text or packed, and writes its metadata. create is called once, when the size is known, and
// returns a device of at least that size that reads as zeros. Nothing is validated: a damaged store is restored
// damaged. Restore does not flush the device.
//
// Errors: a *SyntaxError; those of r, create and the device; ctx's. Memory is bounded, and a line makes
// at most a mebibyte, whatever the text says.
func Restore(ctx context.Context, r io.Reader, create func(size int64) (block.Device, error)) (Restored, error) {
	in := bufio.NewReaderSize(r, maxLine)
	if first, err := in.Peek(len(packedLine) + 1); err == nil && string(first) == packedLine+"\n" {
		in.Discard(len(first))
		z, err := unpack(in)
		if err != nil {
			return Restored{}, err
		}
		in = bufio.NewReaderSize(z, maxLine)
	}
	p := parser{ctx: ctx, in: in, create: create}
	err := p.all()
	return p.made, err
}

// A parser reads a text line by line and writes what the lines say.
type parser struct {
	ctx    context.Context
	in     *bufio.Reader
	create func(int64) (block.Device, error)
	line   int
	dev    block.Device
	made   Restored
	l      ondisk.Layout // zero until it is known
	fixed  bool          // by a chunk-sectors line, which overrides the header's
	area   uint64
	inArea bool
	ended  bool

	// Slots that follow each other are written together.
	pending    []byte
	pendingOff int64
}

const pendingBytes = 256 << 10

func (p *parser) wrong(format string, args ...any) error {
	return &SyntaxError{p.line, fmt.Sprintf(format, args...)}
}

func (p *parser) all() error {
	for !p.ended {
		if p.ctx.Err() != nil {
			return context.Cause(p.ctx)
		}
		b, err := p.in.ReadSlice('\n')
		p.line++
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			return p.wrong("more than %d bytes long", maxLine)
		case err == io.EOF && len(b) == 0:
			return p.wrong("the text ends without its last line, %q: it was cut", lastLine)
		case err != nil && err != io.EOF:
			return fmt.Errorf("line %d: %w", p.line, err)
		}
		if err := p.one(strings.TrimRight(string(b), "\r\n")); err != nil {
			return err
		}
	}
	for { // nothing but comments may follow; this also reads a packed dump to its checksum
		b, err := p.in.ReadSlice('\n')
		p.line++
		if s := strings.TrimSpace(string(b)); s != "" && s[0] != '#' {
			return p.wrong("something follows the last line, %q", lastLine)
		}
		if err == io.EOF {
			return p.flush()
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", p.line, err)
		}
	}
}

// one executes a line.
func (p *parser) one(s string) error {
	if p.line == 1 {
		if s != firstLine {
			return p.wrong("not a dump of a store: it does not begin with %q", firstLine)
		}
		return nil
	}
	words := strings.Fields(s)
	if len(words) == 0 || words[0][0] == '#' {
		return nil
	}
	if words[0] != "size" && p.dev == nil {
		return p.wrong("%q before the size", words[0])
	}
	switch words[0] {
	case "size":
		return p.size(words[1:])
	case "chunk-sectors":
		return p.chunkSectors(words[1:])
	case "header":
		return p.header(words[1:])
	case "area":
		return p.beginArea(words[1:])
	case "slot", "slots":
		return p.slots(words[1:])
	case "byte":
		return p.bytes(words[1:])
	case lastLine:
		p.ended = len(words) == 1
		if p.ended {
			return nil
		}
	}
	return p.wrong("%q is not understood", s)
}

func (p *parser) size(words []string) (err error) {
	if p.dev != nil {
		return p.wrong("a second size")
	}
	n, err := p.numbers(words, 63, 10)
	if err != nil {
		return err
	}
	p.made.Size = int64(n[0])
	p.dev, err = p.create(p.made.Size)
	return err
}

// numbers reads words as numbers of at most the given number of bits; exactly one, unless there are more names.
func (p *parser) numbers(words []string, bits, base int, names ...string) ([]uint64, error) {
	if names == nil {
		names = []string{""}
	} else if len(words) != 2*len(names) {
		return nil, p.wrong("%d words, want %d: %s", len(words), 2*len(names), strings.Join(names, " … "))
	}
	var list []uint64
	for _, name := range names {
		if name != "" {
			if words[0] != name {
				return nil, p.wrong("%q, want %q", words[0], name)
			}
			words = words[1:]
		} else if len(words) != 1 {
			return nil, p.wrong("one number is wanted")
		}
		n, err := strconv.ParseUint(words[0], base, bits)
		if err != nil {
			return nil, p.wrong("%q is no number of at most %d bits", words[0], bits)
		}
		list, words = append(list, n), words[1:]
	}
	return list, nil
}

func (p *parser) chunkSectors(words []string) error {
	n, err := p.numbers(words, 32, 10)
	if err != nil {
		return err
	}
	if p.l, err = ondisk.NewLayout(uint32(n[0])); err != nil {
		return p.wrong("%v", err)
	}
	p.fixed, p.made.ChunkSectors = true, p.l.ChunkSectors
	return nil
}

func (p *parser) header(words []string) error {
	n, err := p.numbers(words, 32, 0, "magic", "valid", "version", "chunk-sectors")
	if err != nil {
		return err
	}
	h := ondisk.Header{Magic: uint32(n[0]), Valid: uint32(n[1]), Version: uint32(n[2]), ChunkSectors: uint32(n[3])}
	if l, err := ondisk.NewLayout(h.ChunkSectors); err == nil && !p.fixed {
		p.l, p.made.ChunkSectors = l, l.ChunkSectors
	}
	var b [ondisk.HeaderSize]byte
	h.Encode(b[:])
	return p.write(b[:], 0)
}

func (p *parser) beginArea(words []string) error {
	n, err := p.numbers(words, 63, 10)
	if err != nil {
		return err
	}
	if p.l.ChunkSectors == 0 {
		return p.wrong("an area, and no chunk size to find it by")
	}
	// Area k is chunk 1+k·(E+1): compared by division, since k may be any number.
	if chunks := p.l.Chunks(p.made.Size, true); chunks < 2 || n[0] > (chunks-2)/(p.l.SlotsPerArea()+1) {
		return p.wrong("area %d is past the end of the device of %d bytes", n[0], p.made.Size)
	}
	p.area, p.inArea = n[0], true
	return nil
}

// slots reads "3: 7 -> 2" or "3-5: 7-9 -> 2-4".
func (p *parser) slots(words []string) error {
	if len(words) != 4 || words[2] != "->" || !strings.HasSuffix(words[0], ":") {
		return p.wrong("a slot is written like \"slot 3: 7 -> 2\" or \"slots 3-5: 7-9 -> 2-4\"")
	}
	if !p.inArea {
		return p.wrong("a slot before the first area")
	}
	var first, count [3]uint64
	for i, word := range []string{strings.TrimSuffix(words[0], ":"), words[1], words[3]} {
		a, b, isRange := strings.Cut(word, "-")
		if !isRange {
			b = a
		}
		from, err1 := strconv.ParseUint(a, 10, 64)
		to, err2 := strconv.ParseUint(b, 10, 64)
		if err1 != nil || err2 != nil || to < from {
			return p.wrong("%q is no number, and no range of numbers", word)
		}
		first[i], count[i] = from, to-from // one less than there are: that can't overflow
	}
	switch {
	case count[1] != count[0] || count[2] != count[0]:
		return p.wrong("the ranges are of different lengths")
	case count[0] >= maxRun:
		return p.wrong("%d slots in one line, more than %d", count[0]+1, maxRun)
	case first[0] >= p.l.SlotsPerArea() || first[0]+count[0] >= p.l.SlotsPerArea():
		return p.wrong("an area has %d slots", p.l.SlotsPerArea())
	}
	b := make([]byte, 0, (count[0]+1)*ondisk.SlotSize)
	for i := range count[0] + 1 {
		b = b[:len(b)+ondisk.SlotSize]
		ondisk.Exception{Old: ondisk.OriginChunk(first[1] + i), New: ondisk.COWChunk(first[2] + i)}.Encode(b[len(b)-ondisk.SlotSize:])
	}
	p.made.Slots += count[0] + 1
	return p.write(b, p.l.SlotOffset(ondisk.Slot{Area: p.area, Index: first[0]}))
}

// bytes reads "0x10: 0bad" or "0x20 x5: 0bad".
func (p *parser) bytes(words []string) error {
	const how = "bytes are written like \"byte 0x10: 0bad\" or \"byte 0x20 x5: 0bad\""
	count := uint64(1)
	if len(words) == 3 && strings.HasPrefix(words[1], "x") && strings.HasSuffix(words[1], ":") {
		n, err := strconv.ParseUint(words[1][1:len(words[1])-1], 10, 32)
		if err != nil || n < 1 || n > maxRepeat {
			return p.wrong("%q: bytes can be repeated up to %d times", words[1], maxRepeat)
		}
		count, words = n, []string{words[0] + ":", words[2]}
	}
	if len(words) != 2 || !strings.HasPrefix(words[0], "0x") || !strings.HasSuffix(words[0], ":") {
		return p.wrong(how)
	}
	off, err := strconv.ParseUint(words[0][2:len(words[0])-1], 16, 63)
	if err != nil {
		return p.wrong("%q is no offset; %s", words[0], how)
	}
	b, err := hex.DecodeString(words[1])
	if err != nil || len(b) < 1 || len(b) > lineBytes {
		return p.wrong("%q: 1 to %d bytes in hexadecimal are wanted", words[1], lineBytes)
	}
	return p.write([]byte(strings.Repeat(string(b), int(count))), int64(off))
}

// write queues bytes for the device.
func (p *parser) write(b []byte, off int64) error {
	if err := block.CheckRange("write", off, int64(len(b)), p.made.Size); err != nil {
		return p.wrong("%d bytes at 0x%x are past the end of the device of %d bytes", len(b), off, p.made.Size)
	}
	if off != p.pendingOff+int64(len(p.pending)) || len(p.pending) >= pendingBytes {
		if err := p.flush(); err != nil {
			return err
		}
		p.pendingOff = off
	}
	p.pending = append(p.pending, b...)
	return nil
}

func (p *parser) flush() error {
	if len(p.pending) == 0 {
		return nil
	}
	_, err := p.dev.WriteAt(p.pending, p.pendingOff)
	p.pending = p.pending[:0]
	return err
}
