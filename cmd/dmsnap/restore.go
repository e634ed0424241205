package main

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/dump"
	"github.com/dmsnap/dmsnap/internal/newfile"
)

// restoreResult is what restore prints as JSON.
type restoreResult struct {
	Path         string `json:"path"`
	Bytes        int64  `json:"bytes"`
	ChunkSectors uint32 `json:"chunk_sectors"` // 0 where the text has no usable one
	Slots        uint64 `json:"slots"`
}

func newRestore() *cobra.Command {
	var force, asJSON bool
	c := &cobra.Command{
		Use:   "restore TEXT COW",
		Short: "Make a store of a dump",
		Long: `Make the store again that dmsnap dump wrote to TEXT, as text or packed; "-" is standard input. COW becomes a
sparse file with the same metadata, byte for byte. Nothing is judged: a damaged store is restored damaged.

Unless the dump was made with --data the chunks read as zeros: such a store is good for looking at, not for
reading a snapshot.

COW appears under its name when it is whole and on disk. An existing file is replaced with --force only.`,
		Example: `  dmsnap restore disk.txt again.cow
  dmsnap dump disk.cow | sed s/'valid 0'/'valid 1'/ | dmsnap restore - again.cow`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			res, err := restoreFile(c.InOrStdin(), args[0], args[1], force)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c, res)
			}
			return printf(c, "%s: %s, %s\n", res.Path, bytesText(res.Bytes), plural(res.Slots, "slot"))
		},
	}
	c.Flags().BoolVar(&force, "force", false, "replace COW when it exists")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func restoreFile(stdin io.Reader, text, cow string, force bool) (restoreResult, error) {
	in := stdin
	if text != "-" {
		f, err := os.Open(text)
		if err != nil {
			return restoreResult{}, err
		}
		defer f.Close()
		in = f
	}
	ctx, stop := untilSignal()
	defer stop()
	var made dump.Restored
	err := writeOutput(cow, force, []string{text}, func(f *os.File) (err error) {
		made, err = restoreTo(ctx, in, f)
		if err != nil && text != "-" {
			err = about(text, err)
		}
		return err
	})
	return restoreResult{cow, made.Size, made.ChunkSectors, made.Slots}, err
}

// restoreTo fills a new file.
func restoreTo(ctx context.Context, in io.Reader, f *os.File) (made dump.Restored, err error) {
	var dev *block.File
	made, err = dump.Restore(ctx, in, func(size int64) (block.Device, error) {
		dev, err = newfile.Device(f, size)
		return dev, err
	})
	if dev != nil {
		err = errors.Join(err, dev.Close())
	}
	return made, err
}
