package newfile

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
)

// WriteTo has fill write an output to out, which may be standard output. A file or a block device there is checked as
// any other output: it must be none of the inputs and not in use, and what is written to it is flushed.
func WriteTo(out io.Writer, inputs []string, fill func(io.Writer) error) (err error) {
	f, isFile := out.(*os.File)
	if !isFile {
		return fill(out)
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	special, stored := info.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice, false
	if stored = special || info.Mode().IsRegular(); stored {
		unlock, err := lockOutput(f, special, inputs)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, unlock()) }()
	}
	w := bufio.NewWriterSize(f, 64<<10)
	if err := fill(w); err != nil {
		return err
	}
	if err := w.Flush(); err != nil || !stored {
		return err
	}
	if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// lockOutput locks the file or block device that f is, as a writer.
func lockOutput(f *os.File, special bool, inputs []string) (unlock func() error, err error) {
	path := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	// A block device is opened for writing, so that one in use by the kernel is refused.
	dev, err := block.Open(path, block.Options{ReadOnly: !special, Lock: block.LockNone})
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) { // it may be only written to, or no /proc
		return func() error { return nil }, nil
	}
	if err != nil {
		return nil, fmt.Errorf("standard output: %w", err)
	}
	defer dev.Close()
	for _, in := range inputs {
		i, err := block.Open(in, block.Options{ReadOnly: true, Lock: block.LockNone})
		if err != nil {
			continue // not a disk, so not the same one
		}
		same := block.Same(i, dev)
		i.Close()
		if same {
			return nil, fmt.Errorf("standard output is the same file as %s", in)
		}
	}
	locked, err := block.Open(path, block.Options{ReadOnly: true, Lock: block.LockWrite})
	if err != nil {
		return nil, fmt.Errorf("standard output: %w", err)
	}
	return locked.Close, nil
}

// Stream has fill write an image of size bytes, ascending, to w.
func Stream(ctx context.Context, w io.Writer, size int64, fill func(block.Device) error) error {
	s := &imageStream{ctx: ctx, w: w, size: size}
	if err := fill(s); err != nil {
		return err
	}
	return s.skipTo(size)
}

// An imageStream writes an image, in ascending order, to an output without seeking. Gaps are filled with zeros.
type imageStream struct {
	ctx  context.Context
	w    io.Writer
	off  int64 // of the next byte
	size int64
}

var errStream = errors.New("standard output is write-only")

func (s *imageStream) ReadAt([]byte, int64) (int, error) { return 0, errStream }
func (s *imageStream) Flush() error                      { return nil } // WriteTo does that
func (s *imageStream) Size() int64                       { return s.size }

func (s *imageStream) WriteAt(p []byte, off int64) (int, error) {
	if off < s.off {
		panic("image written backwards")
	}
	if err := s.skipTo(off); err != nil {
		return 0, err
	}
	n, err := s.w.Write(p)
	s.off += int64(n)
	return n, err
}

var someZeros [1 << 20]byte

// skipTo writes zeros up to an offset.
func (s *imageStream) skipTo(off int64) error {
	for s.off < off {
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		n, err := s.w.Write(someZeros[:min(off-s.off, int64(len(someZeros)))])
		s.off += int64(n)
		if err != nil {
			return err
		}
	}
	return nil
}
