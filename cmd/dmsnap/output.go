package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/source"
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
	return withOutputAdvice(newfile.Check(path, newfile.Options{Replace: force, Inputs: source.Paths(inputs)}))
}

// writeOutput writes the output file of a verb with --force.
func writeOutput(path string, force bool, inputs []string, fill func(*os.File) error) error {
	return withOutputAdvice(newfile.Write(path, newfile.Options{Replace: force, Inputs: source.Paths(inputs)}, fill))
}

// writeOutputDevice is writeOutput for a file that is filled as a device.
func writeOutputDevice(path string, force bool, inputs []string, size int64, fill func(*block.File) error) error {
	return withOutputAdvice(newfile.WriteDevice(path, newfile.Options{Replace: force, Inputs: source.Paths(inputs)}, size, fill))
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
func writeStandardOutput(c *cobra.Command, inputs []string, fill func(io.Writer) error) error {
	out := c.OutOrStdout()
	c.SetOut(c.ErrOrStderr())
	return newfile.WriteTo(out, source.Paths(inputs), fill)
}

// checkNoTerminal refuses to write binary data to a terminal.
func checkNoTerminal(c *cobra.Command, advice string) error {
	if f, ok := c.OutOrStdout().(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return fmt.Errorf("standard output is a terminal, and the output is binary: %s", advice)
	}
	return nil
}

// writeImageToStandardOutput has fill write an image of size bytes, ascending, to standard output.
func writeImageToStandardOutput(ctx context.Context, c *cobra.Command, inputs []string, size int64, fill func(block.Device) error) error {
	return writeStandardOutput(c, inputs, func(w io.Writer) error {
		return newfile.Stream(ctx, w, size, fill)
	})
}
