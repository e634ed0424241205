package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/newfile"
)

// standardOutput is the name of standard output, for the verbs that can write to it.
const standardOutput = "-"

// withOutputAdvice adds the option that allows what was refused.
func withOutputAdvice(err error) error {
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w; --force replaces it", err)
	}
	return err
}

// checkOutput makes the checks of writeOutput before there is any work.
func checkOutput(path string, force bool, inputs []string) error {
	return withOutputAdvice(newfile.Check(path, newfile.Options{Replace: force, Inputs: filesOf(inputs)}))
}

// writeOutput writes the output file of a verb with --force.
func writeOutput(path string, force bool, inputs []string, fill func(*os.File) error) error {
	return withOutputAdvice(newfile.Write(path, newfile.Options{Replace: force, Inputs: filesOf(inputs)}, fill))
}

// writeOutputDevice is writeOutput for a file that is filled as a device.
func writeOutputDevice(path string, force bool, inputs []string, size int64, fill func(*block.File) error) error {
	return withOutputAdvice(newfile.WriteDevice(path, newfile.Options{Replace: force, Inputs: filesOf(inputs)}, size, fill))
}

// writePicture has fill write a map to a file or to standard output.
func writePicture(c *cobra.Command, path string, force bool, inputs []string, fill func(io.Writer) error) error {
	if path == standardOutput {
		return writeStandardOutput(c, inputs, fill)
	}
	return writeOutput(path, force, inputs, func(f *os.File) error { return fill(f) })
}

// imageAdvice adds how to write an image to a device or a pipe. usage is the command with OUT "-".
func imageAdvice(err error, usage string) error {
	if errors.Is(err, newfile.ErrNotRegular) {
		return fmt.Errorf(`%w; to write to a device or a pipe, write to standard output: "%s >DEVICE"`, err, usage)
	}
	return err
}

// writeStandardOutput has fill write an output to standard output. A file or a block device there is checked as
// any other output: it must be no input and not in use, and what is written to it is flushed. From then on c prints its
// summary to standard error.
func writeStandardOutput(c *cobra.Command, inputs []string, fill func(io.Writer) error) (err error) {
	out := c.OutOrStdout()
	c.SetOut(c.ErrOrStderr())
	f, ok := out.(*os.File)
	if !ok {
		return fill(out)
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	block, stored := info.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice, false
	if stored = block || info.Mode().IsRegular(); stored {
		unlock, err := lockStandardOutput(f, block, inputs)
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

// checkNoTerminal refuses to write binary data to a terminal.
func checkNoTerminal(c *cobra.Command, advice string) error {
	if f, ok := c.OutOrStdout().(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return fmt.Errorf("standard output is a terminal, and the output is binary: %s", advice)
	}
	return nil
}

// lockStandardOutput locks the file or block device that standard output is, as a writer.
func lockStandardOutput(f *os.File, special bool, inputs []string) (unlock func() error, err error) {
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
	for _, in := range filesOf(inputs) {
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

// writeImageToStandardOutput has fill write an image of size bytes, ascending, to standard output.
func writeImageToStandardOutput(ctx context.Context, c *cobra.Command, inputs []string, size int64, fill func(block.Device) error) error {
	return writeStandardOutput(c, inputs, func(w io.Writer) error {
		s := &imageStream{ctx: ctx, w: w, size: size}
		if err := fill(s); err != nil {
			return err
		}
		return s.skipTo(size)
	})
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
func (s *imageStream) Flush() error                      { return nil } // writeStandardOutput does that
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
