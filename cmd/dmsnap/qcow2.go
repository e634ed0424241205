package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/source/qcow2"
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

// options are those of offline.Export; options that do not fit together are refused.
func (o *imageFormat) options(out string) (e offline.ExportOptions, err error) {
	e = offline.ExportOptions{QCOW2: o.format == "qcow2", ClusterSize: o.clusterSize.bytes, Compress: o.compress != "", Backing: o.backing}
	switch {
	case !e.QCOW2 && o.format != "raw":
		return e, fmt.Errorf("--format %s: must be raw or qcow2", o.format)
	case !e.QCOW2 && (o.backing != "" || o.clusterSize.set || o.compress != ""):
		return e, errors.New("--backing, --cluster-size and --compress require --format qcow2")
	case e.QCOW2 && out == standardOutput:
		return e, fmt.Errorf("a qcow2 image is not written in order: %w", newfile.ErrStandardOutput)
	}
	switch o.compress {
	case "", qcow2.Deflate.String():
	case qcow2.Zstd.String():
		e.Compression = qcow2.Zstd
	default:
		return e, fmt.Errorf("--compress=%s: must be deflate or zstd", o.compress)
	}
	return e, nil
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
			bar := progress.New(c.ErrOrStderr(), "import")
			res, err := offline.Import(ctx, args[0], args[1], o.origin, offline.ImportOptions{ChunkSectors: sectors, Raw: o.raw, Force: o.force, Progress: bar.Show})
			bar.End()
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
