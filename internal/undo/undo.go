// Package undo saves the bytes of a store that are about to be overwritten, so that a change in place can be reverted.
//
// Before the change, [Undo.Save] writes the undo file, the caller makes that durable and calls [Undo.Mark]. [Apply]
// restores the old bytes, whether the change was completed, interrupted, or never begun; it may itself be interrupted
// and started again.
//
// An undo file is applied to the store that it was made for, or to a copy of it, and to nothing else
// (docs/decisions/0006-undo-formats.md). Mark puts a random id, which the file has too, into the store's first sector
// (ondisk.ChangeLabel); it is the first change and the last one that is reverted. Each sector must be as it was before
// the change, or as the change makes it, so that later writes are not lost. An undo file is a line of text, a line of
// JSON, records, and a checksum:
//
//	dmsnap undo 2
//	{"size":1060864,"changed_size":1064960,"id":"…"}
//	offset, length (little-endian, 8 bytes each), old bytes, digests of the new sectors   … any number of times
//	the same for the first sector
//	0, 0, SHA-256 of all before it
package undo

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// A Change is bytes of a device that are going to be overwritten, after its first sector.
type Change struct {
	Off, Length int64
	// After fills p with what is going to be at off, which lies in the range.
	After func(p []byte, off int64) error
}

// An Undo is a change of a device that can be reverted.
type Undo struct {
	dev     block.Device
	changes []Change
	first   []byte // the first sector after the change
	head    Saved
	id      [16]byte
}

// Saved describes an undo file.
type Saved struct {
	// Size is how long the device was, in bytes, and ChangedSize how long the change makes it. Apply does not make a
	// device shorter: the caller does so afterwards where possible.
	Size        int64 `json:"size"`
	ChangedSize int64 `json:"changed_size"`
	// ID is in the first sector of the changed device too.
	ID string `json:"id"`
	// Bytes counts what is kept. It is not in the file's head.
	Bytes int64 `json:"-"`
}

// ErrFormat reports a file that is not a complete undo file.
var ErrFormat = errors.New("not a whole undo file")

// ErrOtherDevice reports an undo file that is not of this device, or of an earlier state of it.
var ErrOtherDevice = errors.New("undo file is not of this store")

const (
	firstLine   = "dmsnap undo 2\n"
	oldLine     = "dmsnap undo 1\n"
	pieceBytes  = 1 << 20 // copied at once
	recordHead  = 16
	digestBytes = 16   // of a SHA-256 of a sector
	headBytes   = 4096 // bounds the line of JSON
)

// New returns the Undo of a change of dev that overwrites the ranges, makes first of the first sector, and makes
// the device changedSize bytes long.
func New(dev block.Device, changes []Change, first []byte, changedSize int64) *Undo {
	u := &Undo{dev: dev, changes: changes, first: first}
	rand.Read(u.id[:])
	u.head = Saved{Size: dev.Size(), ChangedSize: changedSize, ID: hex.EncodeToString(u.id[:])}
	return u
}

// Save writes the undo file to w. Ranges past the end of the device, where the change makes it longer, are left out.
// The caller makes w durable before it calls Mark.
func (u *Undo) Save(ctx context.Context, w io.Writer) error {
	sum := sha256.New()
	out := io.MultiWriter(w, sum)
	head, err := json.Marshal(u.head)
	if err != nil {
		panic(err) // numbers and a string
	}
	if _, err := fmt.Fprintf(out, "%s%s\n", firstLine, head); err != nil {
		return err
	}
	before, after := make([]byte, pieceBytes), make([]byte, pieceBytes)
	for _, c := range u.changes {
		for off, end := c.Off, min(c.Off+c.Length, u.head.Size); off < end; {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			b := before[:min(pieceBytes, end-off)]
			if _, err := u.dev.ReadAt(b, off); err != nil {
				return fmt.Errorf("keep for undoing: %w", err)
			}
			if err := c.After(after[:len(b)], off); err != nil {
				return err
			}
			if err := writeRecord(out, off, b, after[:len(b)]); err != nil {
				return err
			}
			off += int64(len(b))
		}
	}
	b := before[:ondisk.SectorSize]
	if _, err := u.dev.ReadAt(b, 0); err != nil {
		return fmt.Errorf("keep for undoing: %w", err)
	}
	if err := writeRecord(out, 0, b, unlabelled(u.first)); err != nil {
		return err
	}
	if err := writeRecord(out, 0, nil, nil); err != nil {
		return err
	}
	_, err = w.Write(sum.Sum(nil))
	return err
}

func writeRecord(w io.Writer, off int64, before, after []byte) error {
	var head [recordHead]byte
	binary.LittleEndian.PutUint64(head[0:], uint64(off))
	binary.LittleEndian.PutUint64(head[8:], uint64(len(before)))
	if _, err := w.Write(head[:]); err != nil {
		return err
	}
	if _, err := w.Write(before); err != nil {
		return err
	}
	_, err := w.Write(digests(after))
	return err
}

// digests returns a digest of each sector of p; the last may be a part of one.
func digests(p []byte) (all []byte) {
	for len(p) > 0 {
		n := min(len(p), ondisk.SectorSize)
		sum := sha256.Sum256(p[:n])
		all = append(all, sum[:digestBytes]...)
		p = p[n:]
	}
	return all
}

// unlabelled is a first sector without its ChangeLabel.
func unlabelled(sector []byte) []byte {
	b := bytes.Clone(sector)
	clear(b[ondisk.ChangeLabelAt:][:ondisk.ChangeLabelBytes])
	return b
}

// Mark writes the label that links the device with the undo file, durably.
func (u *Undo) Mark() error {
	return ChangeFirst(u.dev, func(sector []byte) { ondisk.ChangeLabel{ID: u.id}.Encode(sector) })
}

// ChangeFirst changes the first sector of a device, durably.
func ChangeFirst(dev block.Device, change func(sector []byte)) error {
	b := make([]byte, block.BlockSize(dev))
	if _, err := dev.ReadAt(b, 0); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	change(b[:ondisk.SectorSize])
	if err := block.WriteDurable(dev, b, 0); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	return nil
}

// Apply restores the bytes in r on dev, durably. The whole file is compared with dev before anything is written.
// Errors: ErrFormat, ErrOtherDevice (with nothing changed), those of r and dev, ctx's.
func Apply(ctx context.Context, r io.ReadSeeker, dev block.Device) (Saved, error) {
	start, err := r.Seek(0, io.SeekCurrent)
	if err != nil {
		return Saved{}, err
	}
	c := comparison{dev: dev, now: make([]byte, pieceBytes), same: true}
	s, err := read(ctx, r, c.record)
	if err == nil {
		err = c.checkDevice()
	}
	if err != nil || c.same {
		return s, err
	}
	if _, err := r.Seek(start, io.SeekStart); err != nil {
		return s, err
	}
	return read(ctx, r, func(_ Saved, off int64, b, _ []byte) error {
		if off > 0 {
			_, err := dev.WriteAt(b, off)
			return err
		}
		// The first sector, with the label, is restored when all else is durable.
		if err := dev.Flush(); err != nil {
			return err
		}
		return ChangeFirst(dev, func(sector []byte) { copy(sector, b) })
	})
}

// A comparison is between an undo file and the device that it is to be applied to.
type comparison struct {
	dev    block.Device
	now    []byte
	same   bool  // all is as it was before the change
	marked bool  // the device has the file's id
	first  bool  // the record of the first sector was there
	other  error // the first difference that the change does not explain
}

// differs records why the device is another one. It is reported if the file is complete.
func (c *comparison) differs(format string, args ...any) {
	if c.other == nil {
		c.other = fmt.Errorf("%w: "+format, append([]any{ErrOtherDevice}, args...)...)
	}
}

// record compares a record: each sector is as before the change or as after it.
func (c *comparison) record(s Saved, off int64, before, after []byte) error {
	size := c.dev.Size()
	if size != s.Size && size != s.ChangedSize {
		c.differs("it has %d bytes, the one that was changed %d", size, s.Size)
		return nil
	}
	if c.first || off+int64(len(before)) > size || off == 0 && len(before) != ondisk.SectorSize || off > 0 && off < ondisk.SectorSize {
		return fmt.Errorf("%w: it changes %d bytes at byte %d of a device of %d", ErrFormat, len(before), off, size)
	}
	now := c.now[:len(before)]
	if _, err := c.dev.ReadAt(now, off); err != nil {
		return err
	}
	c.same = c.same && bytes.Equal(now, before)
	if off == 0 {
		c.first = true
		label, ok := ondisk.DecodeChangeLabel(now)
		c.marked = ok && hex.EncodeToString(label.ID[:]) == s.ID
		now, before = unlabelled(now), unlabelled(before)
	}
	for i := 0; i < len(now); i += ondisk.SectorSize {
		end := min(i+ondisk.SectorSize, len(now))
		digest := after[i/ondisk.SectorSize*digestBytes:][:digestBytes]
		if !bytes.Equal(now[i:end], before[i:end]) && !bytes.Equal(digests(now[i:end]), digest) {
			c.differs("at byte %d it is neither as before the change nor as after it: another store, or written to since", off+int64(i))
			return nil
		}
	}
	return nil
}

// checkDevice refuses a device other than the one that was changed.
func (c *comparison) checkDevice() error {
	switch {
	case c.other != nil:
		return c.other
	case !c.first:
		return fmt.Errorf("%w: it has no record of the first sector", ErrFormat)
	case !c.marked && !c.same:
		return fmt.Errorf("%w: the store does not have the file's id in its first sector", ErrOtherDevice)
	}
	return nil
}

// read calls take for each record.
func read(ctx context.Context, r io.Reader, take func(s Saved, off int64, before, after []byte) error) (s Saved, err error) {
	in := &summed{in: bufio.NewReaderSize(r, headBytes), sum: sha256.New()}
	if s, err = readHead(in); err != nil {
		return s, err
	}
	buf := make([]byte, pieceBytes+pieceBytes/ondisk.SectorSize*digestBytes)
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
		if n == 0 {
			return s, in.check()
		}
		b := buf[:n+(n+ondisk.SectorSize-1)/ondisk.SectorSize*digestBytes]
		if err := in.full(b); err != nil {
			return s, err
		}
		if err := take(s, off, b[:n], b[n:]); err != nil {
			return s, err
		}
		s.Bytes += int64(n)
	}
}

func readHead(in *summed) (s Saved, err error) {
	line := make([]byte, len(firstLine))
	if err := in.full(line); err != nil {
		return s, err
	}
	switch string(line) {
	case firstLine:
	case oldLine:
		return s, fmt.Errorf("%w: it is of the first format, which does not say which store it is of: nothing keeps it from damaging another", ErrFormat)
	default:
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

// summed reads and computes the checksum of what it read.
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
