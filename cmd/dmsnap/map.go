package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/internal/progress"
)

type mapOptions struct {
	origin   string
	svg, png string
	colour   string
	force    bool
	disk     diskFlags
	asJSON   bool
	liveRead bool
}

func newMap() *cobra.Command {
	var o mapOptions
	c := &cobra.Command{
		Use:   "map COW",
		Short: "Show a map of the disk and of the COW device, with fill level and fragmentation",
		Long: `Draw two maps of the store in COW. The first is the disk: where the snapshot has chunks of its own, and where it
shows the origin. The second is COW: header and metadata areas, data, allocated chunks that no exception uses, and
free space. The figures follow. Nothing is written except the files of --svg and --png.

The size of the disk is that of the origin, which is not stored in COW: without --origin the first map ends with
the last chunk of the snapshot.

In text, a capital letter is a cell that is at least half of that kind; a small letter is less. Fragmentation is
the share of neighbouring chunks of the disk, both stored in COW, that are not neighbours there. dmsnap compact
reduces it to 0.`,
		Example: `  dmsnap map disk.cow
  dmsnap map disk.cow --origin disk.img --svg disk.svg
  dmsnap map --json disk.cow`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c, args[0]) },
	}
	f := c.Flags()
	f.StringVar(&o.origin, "origin", "", "use the size of this origin for the disk")
	f.StringVar(&o.svg, "svg", "", "also write the maps to this file (\"-\" is standard output), as SVG")
	f.StringVar(&o.png, "png", "", "also write the maps to this file (\"-\" is standard output), as PNG")
	f.BoolVar(&o.force, "force", false, "replace these files if they exist")
	f.StringVar(&o.colour, "color", "auto", "auto (on a terminal, unless NO_COLOR is set), always or never")
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
	o.disk.add(f)
	f.BoolVar(&o.liveRead, "live-read", false, "read a store that is in use")
	return c
}

func (o *mapOptions) run(c *cobra.Command, path string) error {
	if o.colour != "auto" && o.colour != "always" && o.colour != "never" {
		return fmt.Errorf("--color %q: must be auto, always or never", o.colour)
	}
	inputs := []string{path}
	if o.origin != "" {
		inputs = append(inputs, o.origin)
		if err := checkDifferent(o.origin, path); err != nil {
			return err
		}
	}
	if err := o.checkOutputs(inputs); err != nil {
		return err
	}
	cow, st, err := o.disk.openStoreToRead(path, o.liveRead)
	if err != nil {
		return err
	}
	defer cow.Close()
	disk := int64(-1)
	if o.origin != "" {
		// Only its size is used.
		origin, err := o.disk.openOrigin(o.origin, path, block.Options{ReadOnly: true, Lock: block.LockShared})
		if err != nil {
			return err
		}
		defer origin.Close()
		disk = origin.Size()
	}
	ctx, stop := untilSignal()
	defer stop()
	m, err := inspect.MapOf(ctx, path, st, disk)
	if err != nil {
		return about(path, err)
	}
	return o.show(c, m, inputs)
}

// checkOutputs checks every output file before the first one is written.
func (o *mapOptions) checkOutputs(inputs []string) error {
	for _, out := range []string{o.svg, o.png} {
		if out == "" || out == standardOutput {
			continue
		}
		if err := checkOutput(out, o.force, inputs); err != nil {
			return err
		}
	}
	if o.svg != "" && o.svg == o.png {
		return fmt.Errorf("%s: can't be both an SVG and a PNG file", o.svg)
	}
	if o.asJSON && (o.svg == standardOutput || o.png == standardOutput) {
		return errors.New("a map and --json can't both be written to standard output")
	}
	return nil
}

// jsonCells is how many cells a map has as JSON.
const jsonCells = 1024

func (o *mapOptions) show(c *cobra.Command, m *inspect.Map, inputs []string) error {
	for _, out := range []struct {
		path  string
		write func(io.Writer) error
	}{{o.svg, m.WriteSVG}, {o.png, m.WritePNG}} {
		if out.path != "" {
			if err := writePicture(c, out.path, o.force, inputs, out.write); err != nil {
				return err
			}
		}
	}
	if o.asJSON {
		m.FillCells(jsonCells)
		return printJSON(c, m)
	}
	w := textTo(c)
	w.Columns, w.Colours = o.terminal(w.W)
	return w.Map(m)
}

// terminal returns how wide maps on w may be, and whether colours are used.
func (o *mapOptions) terminal(w io.Writer) (columns int, colours bool) {
	const labels = 14
	f, ok := progress.Terminal(w)
	if ok {
		if n, _, err := term.GetSize(int(f.Fd())); err == nil {
			columns = max(16, n-labels)
		}
	}
	if columns == 0 || columns > inspect.MapColumns {
		columns = inspect.MapColumns
	}
	colours = ok && os.Getenv("NO_COLOR") == ""
	if o.colour != "auto" {
		colours = o.colour == "always"
	}
	return columns, colours
}
