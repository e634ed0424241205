package dump

import (
	"bufio"
	"encoding/hex"
	"io"
	"strconv"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

const (
	firstLine = "dmsnap store 1"
	lastLine  = "end"

	// maxRun and maxRepeat bound what one line of text stands for: a mebibyte. So a short text can't make Restore run
	// without end.
	maxRun    = 1 << 16
	maxRepeat = 1 << 15
	lineBytes = 32
)

// text is the text form, described in the package comment.
type text struct {
	w   *bufio.Writer
	err error
	b   []byte
	hex hexLines
}

func newText(w io.Writer) *text {
	t := &text{w: bufio.NewWriterSize(w, 64<<10)}
	t.hex.emit = t.hexLine
	t.line(append(t.b, firstLine...))
	return t
}

// line writes a line made in t.b.
func (t *text) line(b []byte) {
	if _, err := t.w.Write(append(b, '\n')); t.err == nil {
		t.err = err
	}
	t.b = b[:0]
}

func (t *text) failed() error { return t.err }

func (t *text) finish() error {
	t.hex.flush()
	t.line(append(t.b, lastLine...))
	if err := t.w.Flush(); t.err == nil {
		t.err = err
	}
	return t.err
}

func (t *text) size(bytes int64) {
	t.line(strconv.AppendInt(append(t.b, "size "...), bytes, 10))
}

func (t *text) layout(sectors, inHeader uint32) {
	if sectors != 0 && sectors != inHeader {
		t.line(strconv.AppendUint(append(t.b, "chunk-sectors "...), uint64(sectors), 10))
	}
}

func (t *text) header(h ondisk.Header) {
	b := append(t.b, "header magic 0x"...)
	b = strconv.AppendUint(b, uint64(h.Magic), 16)
	b = strconv.AppendUint(append(b, " valid "...), uint64(h.Valid), 10)
	b = strconv.AppendUint(append(b, " version "...), uint64(h.Version), 10)
	t.line(strconv.AppendUint(append(b, " chunk-sectors "...), uint64(h.ChunkSectors), 10))
}

func (t *text) bytes(off int64, b []byte) { t.hex.add(off, b) }

func (t *text) beginArea(area uint64, off int64) {
	t.hex.flush()
	t.line(strconv.AppendUint(append(t.b, "area "...), area, 10))
}

func (t *text) endArea() { t.hex.flush() }

func (t *text) slots(r run) {
	b := t.b
	if r.count == 1 {
		b = strconv.AppendUint(append(b, "slot "...), r.slot, 10)
		b = strconv.AppendUint(append(b, ": "...), r.old, 10)
		t.line(strconv.AppendUint(append(b, " -> "...), r.new, 10))
		return
	}
	b = appendRange(append(b, "slots "...), r.slot, r.count)
	b = appendRange(append(b, ": "...), r.old, r.count)
	t.line(appendRange(append(b, " -> "...), r.new, r.count))
}

// appendRange appends "3-6", the numbers from first on.
func appendRange(b []byte, first, count uint64) []byte {
	b = append(strconv.AppendUint(b, first, 10), '-')
	return strconv.AppendUint(b, first+count-1, 10)
}

func (t *text) endMark(slot uint64, void bool) {
	b := append(strconv.AppendUint(append(t.b, "# slot "...), slot, 10), " is the end mark"...)
	if void {
		b = append(b, "; what follows is void"...)
	}
	t.line(b)
}

func (t *text) beginData() {
	t.hex.flush()
	t.line(append(t.b, "# data"...))
}

func (t *text) gap(off, n int64, err error) {
	t.hex.flush()
	b := strconv.AppendInt(append(t.b, "# unreadable: "...), n, 10)
	b = strconv.AppendInt(append(b, " bytes at 0x"...), off, 16)
	b = append(b, ": "...)
	t.line(strconv.AppendQuote(b, err.Error())) // quoted: a path in it may have any characters
}

func (t *text) hexLine(off int64, b []byte, count int) {
	s := strconv.AppendInt(append(t.b, "byte 0x"...), off, 16)
	if count > 1 {
		s = strconv.AppendInt(append(s, " x"...), int64(count), 10)
	}
	t.line(hex.AppendEncode(append(s, ": "...), b))
}

// hexLines makes lines of at most 32 bytes, aligned to 32, out of bytes that come in pieces. Lines of zeros
// are left out, and equal lines that follow each other are one, with a count.
type hexLines struct {
	emit  func(off int64, b []byte, count int)
	off   int64
	b     [lineBytes]byte
	n     int // bytes in b
	count int // complete lines b stands for, when n is lineBytes
}

func (h *hexLines) add(off int64, p []byte) {
	for len(p) > 0 {
		piece := p[:min(lineBytes-off%lineBytes, int64(len(p)))]
		h.piece(off, piece)
		off, p = off+int64(len(piece)), p[len(piece):]
	}
}

// piece adds bytes that are within one line.
func (h *hexLines) piece(off int64, p []byte) {
	switch {
	case h.n > 0 && h.n < lineBytes && off%lineBytes != 0 && off == h.off+int64(h.n):
		h.n += copy(h.b[h.n:], p) // the rest of a line
		h.count = 1
		return
	case h.n == lineBytes && len(p) == lineBytes && off == h.off+int64(h.count)*lineBytes && h.count < maxRepeat && string(p) == string(h.b[:]):
		h.count++
		return
	}
	h.flush()
	h.off, h.n, h.count = off, copy(h.b[:], p), 1
}

func (h *hexLines) flush() {
	if h.n > 0 && !block.IsZero(h.b[:h.n]) {
		h.emit(h.off, h.b[:h.n], h.count)
	}
	h.n, h.count = 0, 0
}
