package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/layer"
	"github.com/dmsnap/dmsnap/publish"
)

// pulled is what pull prints as JSON.
type pulled struct {
	Reference string         `json:"reference"`
	Digest    layer.Digest   `json:"digest"` // of the description
	Size      int64          `json:"size"`   // of the disk in bytes
	Files     []publish.File `json:"files"`  // the base first, each store over those before it
}

func newPull() *cobra.Command {
	var disk diskFlags
	var asJSON bool
	c := &cobra.Command{
		Use:   "pull REF FOLDER",
		Short: "Write the layers of a disk in a registry or an object store to files",
		Long: `Write the base of a disk that dmsnap push wrote to a raw image in FOLDER, and each of its further layers to a store over
the layers before. Files are named by their content: disks with layers in common share them, and a file that is there
is compared, not written again. The paths are printed in order, the base first.

For a single image of what the disk shows, use dmsnap export REF OUT. To read a disk without copying it, use REF as ORIGIN.`,
		Example: `  dmsnap pull localhost:5000/golden/debian:13 images`,
		Args:    cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) (err error) {
			name := args[0]
			if !strings.Contains(name, "://") {
				name = "oci://" + name
			}
			from, err := disk.open(name, block.Options{ReadOnly: true})
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, from.Close()) }()
			if from.Fetched() == nil {
				return fmt.Errorf("%s: no disk in a registry or an object store", name)
			}
			cache, err := disk.remote.OpenCache()
			if err != nil {
				return err
			}
			defer cache.Close()
			ctx, stop := untilSignal()
			defer stop()
			bar := progress.New(c.ErrOrStderr(), "pull")
			defer bar.End()
			files, err := publish.Pull(ctx, from.Fetched(), args[1], publish.Options{Cache: cache, Progress: bar.Show})
			if err != nil {
				return err
			}
			bar.End()
			if asJSON {
				return printJSON(c, pulled{from.Fetched().Name(), from.Fetched().ID(), from.Size(), files})
			}
			var text strings.Builder
			for _, f := range files {
				fmt.Fprintln(&text, f.Path)
			}
			return printf(c, "%s", text.String())
		},
	}
	disk.remote.add(c.Flags())
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
