package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/offline"
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

func newReceive() *cobra.Command {
	var o receiveOptions
	c := &cobra.Command{
		Use:   "receive STREAM [TARGET]",
		Short: "Write a stream of dmsnap send to a disk, or make a snapshot store of it",
		Long: `Write STREAM, a file that dmsnap send wrote, to TARGET, a raw image or a block device; "-" is standard input. TARGET
must be what the stream was made for, a copy of the disk as it was. Each block is compared first: it is written where
TARGET has the old bytes, skipped where it has the new ones, and refused, with its place, where it has neither. The
first 32 MiB of changed bytes are compared before anything is written; with --verify-first all of a STREAM that is a file.

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
	opts := offline.ReceiveOptions{Check: o.check, Undo: o.undo, Origin: o.origin, COW: o.cow, Raw: o.disk.raw, Force: o.force, Inputs: args[:1]}
	if o.verifyFirst {
		opts.Again = func() (io.Reader, error) {
			if _, err := in.(io.Seeker).Seek(0, io.SeekStart); err != nil {
				return nil, fmt.Errorf("--verify-first: %w", err)
			}
			return in, nil
		}
	}
	if o.cow != "" {
		if opts.ChunkSectors, err = o.chunkSize.chunkSectors(); err != nil {
			return err
		}
	}
	ctx, stop := untilSignal()
	defer stop()
	bar := progress.New(c.ErrOrStderr(), "receive")
	opts.Progress = bar.Show
	got, err := offline.Receive(ctx, in, target, opts)
	bar.End()
	if errors.As(err, new(*stream.MismatchError)) && got.Kind == stream.Disk && o.undo == "" && o.cow == "" {
		err = fmt.Errorf("%w; the stream of a whole disk wants a target that reads as zeros, --force writes it over anything", err)
	}
	switch err = withOutputAdvice(advise(err)); {
	case errors.Is(err, offline.ErrNoTarget):
		return fmt.Errorf("--undo: %w", err)
	case err != nil && got.Stays && got.Written > 0:
		return fmt.Errorf("%w; what was applied stays: repeat the command, or go on with dmsnap send --resume-from %d", err, got.Reached)
	case err != nil && got.Kind == "": // no stream
		return about(args[0], err)
	case err != nil:
		return err
	case o.json:
		err = printJSON(c, got)
	default:
		err = got.WriteText(c.OutOrStdout())
	}
	if err == nil && got.Differs > 0 && o.check {
		return errNo
	}
	return err
}
