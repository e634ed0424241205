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
		Short: "Make a store from a dump",
		Long: `Make a store from TEXT, the output of dmsnap dump, as text or packed; "-" is standard input. COW becomes a sparse
file with the same metadata, byte for byte. Nothing is validated: a damaged store is restored damaged.

Unless the dump was made with --data, all chunks read as zeros: such a store can be examined, but its snapshot has
no content.

COW gets its name when it is complete and durable. An existing file is replaced only with --force.`,
		Example: `  dmsnap restore disk.txt again.cow
  dmsnap dump disk.cow | sed s/'valid 1'/'valid 0'/ | dmsnap restore - invalidated.cow`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			res, err := restoreFile(c.InOrStdin(), args[0], args[1], force)
			if err != nil {
				return err
			}
			return printResult(c, asJSON, res, "%s: %s, %s\n", res.Path, bytesText(res.Bytes), plural(res.Slots, "slot"))
		},
	}
	c.Flags().BoolVar(&force, "force", false, "replace COW if it exists")
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
