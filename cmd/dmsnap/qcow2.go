package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/qcow2"
	"github.com/dmsnap/dmsnap/store"
)

// imageFormat holds the options of export that say which format OUT has.
type imageFormat struct {
	format      string
	backing     string
	clusterSize sizeFlag
	compress    string
}

func (o *imageFormat) add(f *pflag.FlagSet) {
	f.StringVar(&o.format, "format", "raw", "format of OUT: raw or qcow2")
	f.StringVar(&o.backing, "backing", "", "qcow2: write an overlay on this backing file, a path relative to OUT's folder")
	f.Var(&o.clusterSize, "cluster-size", "qcow2: size of a cluster, 512 to 2MiB (default: with --backing the chunk size, else 64KiB)")
	f.StringVar(&o.compress, "compress", "", "qcow2: compress clusters, by deflate or zstd")
	f.Lookup("compress").NoOptDefVal = qcow2.Deflate.String()
}

// check refuses options that do not fit together.
func (o *imageFormat) check(out string) error {
	switch {
	case o.format != "raw" && o.format != "qcow2":
		return fmt.Errorf("--format %s: must be raw or qcow2", o.format)
	case o.format == "raw" && (o.backing != "" || o.clusterSize.set || o.compress != ""):
		return errors.New("--backing, --cluster-size and --compress require --format qcow2")
	case o.compress != "" && o.compress != qcow2.Deflate.String() && o.compress != qcow2.Zstd.String():
		return fmt.Errorf("--compress=%s: must be deflate or zstd", o.compress)
	case o.format == "qcow2" && out == standardOutput:
		return fmt.Errorf("a qcow2 image is not written in order: %w", newfile.ErrStandardOutput)
	}
	return nil
}

// write writes the qcow2 image of what is exported. The device of an origin that was opened is named by the first of inputs.
func (o *imageFormat) write(ctx context.Context, inputs []string, output string, force bool, x exportSource, bar *progressBar) error {
	from := x.Device
	e := qcow2.ExportOptions{
		ClusterSize: o.clusterSize.bytes, Compress: o.compress != "",
		Progress: func(reached int64) error {
			bar.show(reached, from.Size())
			return context.Cause(ctx)
		},
	}
	if o.compress == qcow2.Zstd.String() {
		e.Compression = qcow2.Zstd
	}
	if o.backing != "" {
		snap, isSnapshot := from.(*store.View)
		if !isSnapshot {
			return errors.New("--backing: a snapshot is required, ORIGIN COW or the address of a snapshot volume: what an overlay holds is what a COW holds")
		}
		base := o.backing
		if !filepath.IsAbs(base) {
			base = filepath.Join(filepath.Dir(output), base)
		}
		format, err := source.BackingFormat(base, inputs[0], x.origin, snap.Size())
		if err != nil {
			return fmt.Errorf("--backing: %w", err)
		}
		inputs = append(slices.Clone(inputs), base)
		e.Backing, e.BackingFormat, e.BackingSize = o.backing, format, snap.Size()
		e.Stored = func(off, n int64) (bool, int64) {
			_, _, follow, stored := snap.Place(off, n)
			return stored, follow
		}
		if !o.clusterSize.set {
			e.ClusterSize = min(snap.Store().Layout().ChunkBytes(), 2<<20)
		}
	}
	return writeOutput(output, force, inputs, func(f *os.File) error { return qcow2.Export(f, from, e) })
}

func newImport() *cobra.Command {
	var o struct {
		origin    string
		chunkSize sizeFlag
		raw       bool
		force     bool
		json      bool
	}
	c := &cobra.Command{
		Use:   "import OVERLAY COW --origin BASE",
		Short: "Make a snapshot store from a qcow2 overlay",
		Long: `Make a snapshot store over the raw disk BASE from OVERLAY, a qcow2 image whose backing file has the content of BASE.
The store has an exception for each chunk of which the overlay has a part, zeros included; OVERLAY is not changed.

BASE stands for the backing file: the one that OVERLAY names is not opened. Both must have the same size. COW gets its
name when it is complete and durable. An existing file is replaced only with --force.`,
		Example: `  dmsnap export disk.img disk.cow old.qcow2 --format qcow2 --backing disk.img
  dmsnap import old.qcow2 again.cow --origin disk.img`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			if o.origin == "" {
				return errors.New("--origin BASE is required")
			}
			sectors, err := o.chunkSize.chunkSectors()
			if err != nil {
				return err
			}
			ctx, stop := untilSignal()
			defer stop()
			bar := newProgress(c.ErrOrStderr(), "import")
			res, err := offline.Import(ctx, args[0], args[1], o.origin, offline.ImportOptions{ChunkSectors: sectors, Raw: o.raw, Force: o.force, Progress: bar.show})
			bar.end()
			if err != nil {
				return advise(withOutputAdvice(err))
			}
			return printReport(c, o.json, res)
		},
	}
	f := c.Flags()
	f.StringVar(&o.origin, "origin", "", "the raw disk that the store is for (required)")
	f.Var(&o.chunkSize, "chunk-size", "size of a chunk, a power of two from 512 to 1GiB (default 4KiB)")
	f.BoolVar(&o.force, "force", false, "replace COW if it exists")
	f.BoolVar(&o.raw, "raw", false, "BASE's own bytes are the disk, although it looks like an image of another format")
	f.BoolVar(&o.json, "json", false, "print JSON")
	return c
}
