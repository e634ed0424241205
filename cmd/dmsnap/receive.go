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

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
	"github.com/dmsnap/dmsnap/stream"
)

type receiveOptions struct {
	origin, cow, undo  string
	chunkSize          sizeFlag
	check, verifyFirst bool
	force              bool
	disk               diskFlags
	json               bool
}

// receiveResult is what receive prints as JSON.
type receiveResult struct {
	Path string      `json:"path,omitempty"`
	Kind stream.Kind `json:"kind"`
	Size int64       `json:"size"` // of the disk, in bytes
	stream.Count
	Written  int64 `json:"written_bytes"`
	Present  int64 `json:"present_bytes"`  // were there already
	Repaired int64 `json:"repaired_bytes"` // of those written: left half written by an interruption
	Differs  int64 `json:"differs_bytes"`
}

func newReceive() *cobra.Command {
	var o receiveOptions
	c := &cobra.Command{
		Use:   "receive STREAM [TARGET]",
		Short: "Write a stream of dmsnap send to a disk, or make a snapshot store of it",
		Long: `Write STREAM, a file that dmsnap send wrote, to TARGET, a raw image or a block device; "-" is standard input. TARGET
must be what the stream was made for, a copy of the disk as it was. Each block is compared first: it is written where
TARGET has the old bytes, skipped where it has the new ones, and refused, with its place, where it has neither. The
first 32 MiB are compared before anything is written; with --verify-first all of a STREAM that is a file.

A receive that was interrupted is simply repeated. With --undo FILE the old bytes are kept in a new store FILE, a
snapshot of TARGET: dmsnap merge TARGET FILE takes the receive back.

With --origin BASE --cow COW nothing is applied: COW becomes a new store that shows the result over BASE.

The stream of a whole disk wants a TARGET that reads as zeros, or none: then a file is made, which gets its name when
it is complete and durable. --force writes it over anything.

With --check nothing is written: STREAM is verified and, with TARGET, compared. Exit status: 0 it applies, 1 TARGET
has other bytes, 2 trouble.`,
		Example: `  dmsnap send disk.img disk.cow --output disk.delta
  dmsnap receive disk.delta copy.img --undo before.cow
  dmsnap receive disk.delta --origin disk.img --cow new.cow
  dmsnap receive --check disk.delta`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c, args) },
	}
	f := c.Flags()
	f.StringVar(&o.origin, "origin", "", "disk that the new store is for, with --cow")
	f.StringVar(&o.cow, "cow", "", "new store that shows the result over --origin")
	f.Var(&o.chunkSize, "chunk-size", "size of a chunk of the new store, a power of two from 512 to 1GiB (default 4KiB)")
	f.StringVar(&o.undo, "undo", "", "new store that keeps the old bytes of TARGET")
	f.BoolVar(&o.check, "check", false, "verify only, and compare with TARGET")
	f.BoolVar(&o.verifyFirst, "verify-first", false, "compare the whole stream before anything is written")
	o.disk.addRaw(f)
	f.BoolVar(&o.force, "force", false, "write the new bytes whatever TARGET has; with --undo or --cow, only replace that file if it exists")
	f.BoolVar(&o.json, "json", false, "print JSON")
	c.MarkFlagsRequiredTogether("origin", "cow")
	c.MarkFlagsMutuallyExclusive("check", "verify-first")
	c.MarkFlagsMutuallyExclusive("check", "undo")
	c.MarkFlagsMutuallyExclusive("check", "cow")
	c.MarkFlagsMutuallyExclusive("undo", "cow")
	return c
}

func (o *receiveOptions) run(c *cobra.Command, args []string) (err error) {
	var target string
	switch {
	case len(args) == 2 && o.cow != "":
		return errors.New("TARGET or --origin BASE --cow COW, not both")
	case len(args) == 2:
		target = args[1]
	case o.cow == "" && !o.check:
		return errors.New("TARGET is required, or --origin BASE --cow COW, or --check")
	case o.undo != "" && target == "" || o.verifyFirst && target == "" && o.cow == "":
		return errors.New("TARGET is required")
	}
	if o.verifyFirst && args[0] == "-" {
		return errors.New("--verify-first: STREAM must be a file, which is read twice")
	}
	in := c.InOrStdin()
	if args[0] != "-" {
		f, err := os.Open(args[0])
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	from, err := stream.NewReader(bufio.NewReaderSize(in, 1<<20))
	if err != nil {
		return about(args[0], err)
	}
	ctx, stop := untilSignal()
	defer stop()
	w := &receiving{receiveOptions: o, c: c, ctx: ctx, in: in, from: from, inputs: []string{args[0]}}
	w.bar = newProgress(c.ErrOrStderr(), "receive")
	defer w.bar.end()
	path, err := w.toTarget(target)
	w.bar.end()
	if err != nil {
		return w.advise(err)
	}
	if err := w.print(path); err != nil {
		return err
	}
	if w.got.Differs > 0 && o.check {
		return errNo
	}
	return nil
}

// A receiving is one run of dmsnap receive.
type receiving struct {
	*receiveOptions
	c      *cobra.Command
	ctx    context.Context
	in     io.Reader
	from   *stream.Reader
	inputs []string // files that are no outputs
	bar    *progressBar
	got    stream.Applied
	stays  bool // what was applied before an error
}

// toTarget does what was asked for, and returns the path of what was written or compared.
func (w *receiving) toTarget(target string) (string, error) {
	switch {
	case w.cow != "":
		return w.cow, w.toStore()
	case target == "":
		return "", w.verify(nil)
	}
	_, err := os.Stat(target)
	if errors.Is(err, fs.ErrNotExist) && w.from.Header().Kind == stream.Disk && !w.check {
		if w.undo != "" {
			return "", fmt.Errorf("--undo: %s does not exist", target)
		}
		return target, writeOutputDevice(target, false, w.inputs, w.from.Header().Size, func(dst *block.File) error { return w.apply(dst) })
	}
	dev, err := openDevice(target, block.Options{ReadOnly: w.check})
	if err != nil {
		return "", err
	}
	w.inputs = append(w.inputs, target)
	err = checkRawDisk(target, dev, w.disk.raw || w.from.Header().Kind == stream.Disk)
	switch {
	case err != nil:
	case w.check:
		err = w.verify(dev)
	case w.undo != "":
		err = w.keeping(dev)
	default:
		w.stays = true
		err = w.apply(dev)
	}
	return target, errors.Join(about(target, err), dev.Close())
}

func (w *receiving) options() stream.ApplyOptions {
	size := w.from.Header().Size
	return stream.ApplyOptions{Force: w.force && w.cow == "" && w.undo == "", Progress: func(reached int64) { w.bar.show(reached, size) }}
}

func (w *receiving) verify(target block.Device) (err error) {
	w.got, err = w.from.Check(w.ctx, target, w.options().Progress)
	return err
}

// first compares the whole stream with dev, if that is asked for.
func (w *receiving) first(dev block.Device) error {
	if !w.verifyFirst {
		return nil
	}
	if err := w.verify(dev); err != nil {
		return err
	}
	if w.got.Differs > 0 && !w.options().Force {
		return &stream.MismatchError{Off: w.got.FirstWrong}
	}
	if _, err := w.in.(io.Seeker).Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("--verify-first: %w", err)
	}
	var err error
	w.from, err = stream.NewReader(bufio.NewReaderSize(w.in, 1<<20))
	return err
}

func (w *receiving) apply(dev block.Device) error {
	err := w.first(dev)
	if err == nil {
		w.got, err = w.from.Apply(w.ctx, dev, w.options())
	}
	return err
}

// keeping applies the stream to dev and keeps the old bytes in a new store.
func (w *receiving) keeping(dev *block.File) error {
	l, err := ondisk.NewLayout(ondisk.DefaultChunkSectors)
	if err != nil {
		return err
	}
	size, err := cowfile.FullSize(l, dev.Size())
	if err != nil {
		return about(w.undo, err)
	}
	if err := writeOutputDevice(w.undo, w.force, w.inputs, size, func(dst *block.File) error {
		_, err := store.Create(dst, l, true)
		return err
	}); err != nil {
		return err
	}
	undo, err := openDevice(w.undo, block.Options{})
	if err != nil {
		return err
	}
	if err = w.first(dev); err == nil {
		w.stays = true
		w.got, err = w.from.ApplyKeeping(w.ctx, dev, undo, w.options())
	}
	err = errors.Join(err, undo.Close())
	if err != nil && w.got.Written == 0 {
		return errors.Join(err, os.Remove(w.undo)) // it has nothing
	}
	return err
}

// toStore makes a new store over a base.
func (w *receiving) toStore() error {
	sectors, err := w.chunkSize.chunkSectors()
	if err != nil {
		return err
	}
	l, err := ondisk.NewLayout(sectors)
	if err != nil {
		return err
	}
	base, err := w.disk.openRawOrigin(w.origin, block.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	defer base.Close()
	if err := store.CheckBlockSize(l, base); err != nil {
		return about(w.origin, err)
	}
	size, err := cowfile.FullSize(l, base.Size())
	if err != nil {
		return about(w.cow, err)
	}
	return writeOutputDevice(w.cow, w.force, append(w.inputs, w.origin), size, func(dst *block.File) error {
		if err := w.first(base); err != nil {
			return about(w.origin, err)
		}
		w.got, err = w.from.ApplyOver(w.ctx, base, dst, sectors, w.options())
		return err
	})
}

// advise adds what to do next.
func (w *receiving) advise(err error) error {
	if w.stays && w.got.Written > 0 {
		err = fmt.Errorf("%w; what was applied stays: repeat the command, or go on with dmsnap send --resume-from %d", err, w.got.Reached)
	}
	return err
}

func (w *receiving) print(path string) error {
	h := w.from.Header()
	if w.json {
		return printJSON(w.c, receiveResult{path, h.Kind, h.Size, w.got.Count, w.got.Written, w.got.Present, w.got.Repaired, w.got.Differs})
	}
	data := bytesText(w.got.Data + w.got.Zero)
	switch {
	case w.check && path == "":
		return printf(w.c, "a whole stream: %s of a disk of %s\n", data, bytesText(h.Size))
	case w.check && w.got.Differs > 0:
		return printf(w.c, "%s: %s match neither the old nor the new bytes, first at byte %d\n", path, bytesText(w.got.Differs), w.got.FirstWrong)
	case w.check:
		return printf(w.c, "%s: the stream of %s applies, %s are there already\n", path, data, bytesText(w.got.Present))
	}
	return printf(w.c, "%s: wrote %s, %s were there already\n", path, bytesText(w.got.Written), bytesText(w.got.Present))
}
