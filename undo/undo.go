// Package undo keeps what is about to be overwritten on a device, so that the change can be taken back.
//
// Whoever changes a device in place first saves the ranges it is going to write ([Save]), makes that file
// durable, and only then begins. [Apply] puts the old bytes back, whether the change was completed,
// cut half-way, or never begun; it may itself be cut and started again. It can't tell whether the device was
// changed by others since, and such changes in the saved ranges are lost.
//
// An undo file is a line of text, a line of JSON, the old bytes, and a checksum:
//
//	dmsnap undo 1
//	{"size":1060864,"changed_size":1064960}
//	offset, length (little-endian, 8 bytes each), bytes   … any number of times
//	0, 0, SHA-256 of all before it
package undo

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/dmsnap/dmsnap/block"
)

// A Range is bytes of a device.
type Range struct{ Off, Length int64 }

// Saved describes an undo file.
type Saved struct {
	// Size is how long the device was, in bytes, and ChangedSize how long the change makes it.
	// Apply does not make a device shorter: a caller that can does so afterwards.
	Size        int64 `json:"size"`
	ChangedSize int64 `json:"changed_size"`
	// Ranges and Bytes count what is kept. They are not in the file's head.
	Ranges int   `json:"-"`
	Bytes  int64 `json:"-"`
}

// ErrFormat reports a file that is no undo file, or not a whole one.
var ErrFormat = errors.New("not a whole undo file")

// ErrOtherDevice reports an undo file that is not of this device: the sizes differ.
var ErrOtherDevice = errors.New("undo file is of another device")

const (
	firstLine  = "dmsnap undo 1\n"
	pieceBytes = 1 << 20 // copied at once
	recordHead = 16
	headBytes  = 4096 // bounds the line of JSON
)

// Save writes the present bytes of the ranges to w. What of them lies past the end of dev, where a change
// makes it longer, is left out. The caller makes w durable before it changes anything.
func Save(ctx context.Context, w io.Writer, dev block.Device, ranges []Range, changedSize int64) error {
	sum := sha256.New()
	out := io.MultiWriter(w, sum)
	head, err := json.Marshal(Saved{Size: dev.Size(), ChangedSize: changedSize})
	if err != nil {
		panic(err) // two numbers
	}
	if _, err := fmt.Fprintf(out, "%s%s\n", firstLine, head); err != nil {
		return err
	}
	buf := make([]byte, pieceBytes)
	for _, r := range ranges {
		for off, end := r.Off, min(r.Off+r.Length, dev.Size()); off < end; {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			b := buf[:min(pieceBytes, end-off)]
			if _, err := dev.ReadAt(b, off); err != nil {
				return fmt.Errorf("keep for undoing: %w", err)
			}
			if err := writeRecord(out, off, b); err != nil {
				return err
			}
			off += int64(len(b))
		}
	}
	if err := writeRecord(out, 0, nil); err != nil {
		return err
	}
	_, err = w.Write(sum.Sum(nil))
	return err
}

func writeRecord(w io.Writer, off int64, b []byte) error {
	var head [recordHead]byte
	binary.LittleEndian.PutUint64(head[0:], uint64(off))
	binary.LittleEndian.PutUint64(head[8:], uint64(len(b)))
	if _, err := w.Write(head[:]); err != nil {
		return err
	}
	_, err := w.Write(b)
	return err
}

// Apply puts back on dev what r keeps, durably. The whole file is looked at before anything is written.
// Errors: ErrFormat, ErrOtherDevice (with nothing changed), those of r and dev, ctx's.
func Apply(ctx context.Context, r io.ReadSeeker, dev block.Device) (Saved, error) {
	start, err := r.Seek(0, io.SeekCurrent)
	if err != nil {
		return Saved{}, err
	}
	size := dev.Size()
	s, err := read(ctx, r, func(s Saved, off int64, b []byte) error {
		if size != s.Size && size != s.ChangedSize {
			return fmt.Errorf("%w: it has %d bytes, the one that was changed %d", ErrOtherDevice, size, s.Size)
		}
		if off+int64(len(b)) > size {
			return fmt.Errorf("%w: it changes byte %d of a device of %d", ErrFormat, off, size)
		}
		return nil
	})
	if err != nil {
		return s, err
	}
	if _, err := r.Seek(start, io.SeekStart); err != nil {
		return s, err
	}
	s, err = read(ctx, r, func(_ Saved, off int64, b []byte) error {
		_, err := dev.WriteAt(b, off)
		return err
	})
	if err != nil {
		return s, err
	}
	return s, dev.Flush()
}

// read hands each record to take; the one that ends the file too, with no bytes.
func read(ctx context.Context, r io.Reader, take func(s Saved, off int64, b []byte) error) (s Saved, err error) {
	in := &summed{in: bufio.NewReaderSize(r, headBytes), sum: sha256.New()}
	if s, err = readHead(in); err != nil {
		return s, err
	}
	buf := make([]byte, pieceBytes)
	for {
		if ctx.Err() != nil {
			return s, context.Cause(ctx)
		}
		var head [recordHead]byte
		if err := in.full(head[:]); err != nil {
			return s, err
		}
		off, n := int64(binary.LittleEndian.Uint64(head[0:])), binary.LittleEndian.Uint64(head[8:])
		if n > pieceBytes || off < 0 || off > 1<<62 {
			return s, fmt.Errorf("%w: %d bytes at byte %d", ErrFormat, n, off)
		}
		b := buf[:n]
		if err := in.full(b); err != nil {
			return s, err
		}
		if err := take(s, off, b); err != nil {
			return s, err
		}
		if n == 0 {
			return s, in.check()
		}
		s.Ranges++
		s.Bytes += int64(n)
	}
}

func readHead(in *summed) (s Saved, err error) {
	line := make([]byte, len(firstLine))
	if err := in.full(line); err != nil {
		return s, err
	}
	if string(line) != firstLine {
		return s, fmt.Errorf("%w: it does not begin with %q", ErrFormat, firstLine[:len(firstLine)-1])
	}
	head, err := in.in.ReadSlice('\n')
	if err != nil {
		return s, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	in.sum.Write(head)
	if err := json.Unmarshal(head, &s); err != nil || s.Size < 0 || s.ChangedSize < 0 {
		return s, fmt.Errorf("%w: its second line is %q", ErrFormat, head)
	}
	return s, nil
}

// summed reads and adds up what it read.
type summed struct {
	in  *bufio.Reader
	sum hash.Hash
}

func (s *summed) full(b []byte) error {
	if _, err := io.ReadFull(s.in, b); err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("%w: it was cut", ErrFormat)
	} else if err != nil {
		return err
	}
	s.sum.Write(b)
	return nil
}

// check compares the checksum, which is the last of the file.
func (s *summed) check() error {
	want := s.sum.Sum(nil)
	got := make([]byte, len(want))
	if err := s.full(got); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%w: its checksum does not fit", ErrFormat)
	}
	return nil
}
