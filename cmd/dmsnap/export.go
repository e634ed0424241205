package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

func newExport() *cobra.Command {
	var force, raw bool
	c := &cobra.Command{
		Use:   "export ORIGIN COW OUT",
		Short: "Write a snapshot's content to a raw image",
		Long: `Write what the snapshot shows to OUT, as a sparse raw image; "-" is standard output.

OUT appears under its name when it is whole and on disk, never before. An existing file is replaced with
--force only. An invalid snapshot is refused.`,
		Example: `  dmsnap export disk.img disk.cow old.img
  dmsnap export disk.img disk.cow - | zstd > old.img.zst`,
		Args: cobra.ExactArgs(3),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if args[2] == standardOutput {
				if err := checkNoTerminal(c, "redirect it"); err != nil {
					return err
				}
			}
			snap, closeAll, err := openSnapshot(args[0], args[1], raw)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, closeAll()) }()
			ctx, stop := untilSignal()
			defer stop()
			bar := newProgress(c.ErrOrStderr(), "export")
			defer bar.end()
			if args[2] == standardOutput {
				return writeStandardOutput(c, args[:2], func(w io.Writer) error {
					a := &ascendingWriter{w: w}
					if err := copyOut(ctx, a, snap, bar); err != nil {
						return err
					}
					return a.fill(snap.Size())
				})
			}
			err = writeOutput(args[2], force, args[:2], func(f *os.File) error { return writeImage(ctx, f, snap, bar) })
			return imageAdvice(err, "dmsnap export ORIGIN COW -")
		},
	}
	c.Flags().BoolVar(&force, "force", false, "replace OUT when it exists")
	addRaw(c.Flags(), &raw)
	return c
}

// openSnapshot opens a snapshot for reading alone, and refuses one that can't be read whole.
func openSnapshot(originPath, cowPath string, raw bool) (*snapshot.Snapshot, func() error, error) {
	origin, cow, both, err := openPair(originPath, cowPath, block.Options{ReadOnly: true}, raw)
	if err != nil {
		return nil, nil, err
	}
	snap, err := attachReadable(origin, cow)
	if err != nil {
		return nil, nil, errors.Join(about(cowPath, err), both.Close())
	}
	// Nothing was written through snap, so nothing is left to sync.
	return snap, both.Close, nil
}

func attachReadable(origin, cow block.Device) (*snapshot.Snapshot, error) {
	st, err := store.Open(cow)
	if err != nil {
		return nil, err
	}
	if err := st.Err(); err != nil {
		return nil, fmt.Errorf("%w: it was marked so when its COW device was full or failed, and its content is lost", err)
	}
	if err := st.CheckOrigin(origin.Size()); err != nil {
		return nil, err
	}
	return snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
}

// writeImage fills a new file with the image.
func writeImage(ctx context.Context, f *os.File, snap *snapshot.Snapshot, bar *progressBar) error {
	if err := f.Truncate(snap.Size()); err != nil {
		return err
	}
	return copyOut(ctx, f, snap, bar)
}

const (
	copyBytes = 1 << 20 // read at once
	zeroBytes = 4096    // zeros of this size and alignment are not written
)

// copyOut writes dev's content to w, ascending, and leaves zeros out.
func copyOut(ctx context.Context, w io.WriterAt, dev block.Device, bar *progressBar) error {
	size := dev.Size()
	buf := make([]byte, copyBytes)
	for off := int64(0); off < size; {
		extents, err := block.Extents(dev, off, size-off)
		if err != nil {
			return err
		}
		for _, e := range extents {
			if e.Flags&block.ReadsZero != 0 {
				off += e.Length
				continue
			}
			for end := off + e.Length; off < end; {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				p := buf[:min(copyBytes-off%copyBytes, end-off)]
				if _, err := dev.ReadAt(p, off); err != nil {
					return err
				}
				if err := writeNonZero(w, p, off); err != nil {
					return err
				}
				off += int64(len(p))
				bar.show(off, size)
			}
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	bar.show(size, size)
	return nil
}

var manyZeros [copyBytes]byte

// writeNonZero writes p, which begins at byte off of the image, but for its aligned pieces of zeros.
func writeNonZero(w io.WriterAt, p []byte, off int64) error {
	for len(p) > 0 {
		zero, n := isZero(p, off), int64(0)
		for n < int64(len(p)) && isZero(p[n:], off+n) == zero {
			n += pieceLength(p[n:], off+n)
		}
		if !zero {
			if _, err := w.WriteAt(p[:n], off); err != nil {
				return err
			}
		}
		p, off = p[n:], off+n
	}
	return nil
}

// pieceLength is how much of p, at byte off, lies in the aligned piece it begins in.
func pieceLength(p []byte, off int64) int64 { return min(zeroBytes-off%zeroBytes, int64(len(p))) }

func isZero(p []byte, off int64) bool {
	n := pieceLength(p, off)
	return bytes.Equal(p[:n], manyZeros[:n])
}
