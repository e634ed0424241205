package diff

import (
	"fmt"
	"io"
)

// bitmapPrinter writes a bit for each granule of the disk.
//
//	byte 0                     byte 1
//	bit 0  granule 0           bit 0  granule 8
//	bit 1  granule 1           …
//	…
//	bit 7  granule 7
//
// A granule whose bit is 1 differs somewhere; the last one may end after the disk. Bits after it are 0.
type bitmapPrinter struct {
	w       io.Writer
	granule int64
	bytes   int64 // of the bitmap
	at      int64 // index of the byte in current
	current byte
	buf     []byte
}

// NewBitmapPrinter prints a bitmap of a disk of size bytes: a bit for each granule bytes, a power of two of at least 512,
// lowest bit first, 1 where something differs. Errors: a granule that is no such number.
func NewBitmapPrinter(w io.Writer, size, granule int64) (Printer, error) {
	if granule < 512 || granule&(granule-1) != 0 {
		return nil, fmt.Errorf("granularity of %d bytes: must be a power of two, at least 512", granule)
	}
	granules := size / granule
	if size%granule != 0 {
		granules++
	}
	return &bitmapPrinter{w: w, granule: granule, bytes: (granules + 7) / 8, buf: make([]byte, 0, 32<<10)}, nil
}

func (p *bitmapPrinter) Extent(e Extent) error {
	if e.Class != Changed || e.Length == 0 {
		return nil
	}
	for g, last := e.Off/p.granule, (e.Off+e.Length-1)/p.granule; g <= last; {
		if err := p.seek(g / 8); err != nil {
			return err
		}
		if g%8 == 0 && g+7 <= last { // a whole byte
			p.current = 0xff
			g += 8
			continue
		}
		p.current |= 1 << (g % 8)
		g++
	}
	return nil
}

// seek writes the bytes before byte i.
func (p *bitmapPrinter) seek(i int64) error {
	for p.at < i {
		p.buf = append(p.buf, p.current)
		p.current = 0
		p.at++
		if len(p.buf) == cap(p.buf) {
			if err := p.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *bitmapPrinter) flush() error {
	_, err := p.w.Write(p.buf)
	p.buf = p.buf[:0]
	return err
}

func (p *bitmapPrinter) End() error {
	if err := p.seek(p.bytes); err != nil {
		return err
	}
	return p.flush()
}
