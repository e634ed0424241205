package main

import (
	"context"
	"errors"
	"fmt"
	"image/color"
	"io"
	"math"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/internal/picture"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/store"
)

type mapOptions struct {
	origin   string
	svg, png string
	colour   string
	force    bool
	raw      bool
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
	addRaw(f, &o.raw)
	f.BoolVar(&o.liveRead, "live-read", false, "read a store that is in use")
	return c
}

// mapResult is what map prints as JSON. Cells are equal parts of the disk, or of COW, in order; the value of a cell is
// the fraction of it that is used, 0 to 1.
type mapResult struct {
	Path string `json:"path"`
	api.Figures
	DiskBytes     int64         `json:"disk_bytes"`
	DiskKnown     bool          `json:"disk_known"` // else disk_bytes is where the last exception ends
	StoredBytes   int64         `json:"stored_bytes"`
	UnusedChunks  uint64        `json:"unused_chunks"` // allocated, but used by no exception
	Fragmentation fragmentation `json:"fragmentation"`
	DiskCells     []float64     `json:"disk_cells"`
	COWCells      []float64     `json:"cow_cells"`
}

// fragmentation says how the order of COW differs from the disk's.
type fragmentation struct {
	Runs         uint64  `json:"runs"`          // consecutive on both sides
	MeanBytes    int64   `json:"mean_bytes"`    // of a run
	LongestBytes int64   `json:"longest_bytes"` // of a run
	Neighbours   uint64  `json:"neighbours"`    // pairs of neighbouring chunks of the disk that are both stored
	Jumps        uint64  `json:"jumps"`         // those that are no neighbours in COW, where an area between them does not count
	Percent      float64 `json:"percent"`       // jumps of neighbours
}

func fragmentationOf(ctx context.Context, st *store.Store) (f fragmentation, err error) {
	l := st.Layout()
	var old ondisk.OriginChunk // after the last run, on both sides
	var new ondisk.COWChunk
	longest := uint64(0)
	for r := range st.Exceptions() {
		if ctx.Err() != nil {
			return f, context.Cause(ctx)
		}
		if f.Runs > 0 && r.Old == old {
			f.Neighbours++
			if r.New != l.NextData(new) {
				f.Jumps++
			}
		}
		f.Runs++
		f.Neighbours += r.Count - 1
		longest = max(longest, r.Count)
		old, new = r.Old+ondisk.OriginChunk(r.Count), r.New+ondisk.COWChunk(r.Count)
	}
	if f.Runs > 0 {
		f.MeanBytes = int64(float64(st.Len()) / float64(f.Runs) * float64(l.ChunkBytes()))
	}
	f.LongestBytes = int64(longest) << l.Shift()
	if f.Neighbours > 0 {
		f.Percent = 100 * float64(f.Jumps) / float64(f.Neighbours)
	}
	return f, nil
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
	cow, st, err := openStoreToRead(path, o.liveRead)
	if err != nil {
		return err
	}
	defer cow.Close()
	m := mapResult{Path: path, Figures: inspect.Figures(st), StoredBytes: int64(st.Len()) << st.Layout().Shift()}
	if err := o.sizeDisk(&m, st); err != nil {
		return about(path, err)
	}
	ctx, stop := untilSignal()
	defer stop()
	if m.Fragmentation, err = fragmentationOf(ctx, st); err != nil {
		return err
	}
	m.UnusedChunks = (m.SectorsAllocated-m.MetadataSectors)/uint64(m.ChunkSectors) - m.Exceptions
	return o.show(c, st, m, inputs)
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

// sizeDisk finds how large the disk is, by the origin or by the last exception.
func (o *mapOptions) sizeDisk(m *mapResult, st *store.Store) error {
	if o.origin == "" {
		if last, ok := st.LastOrigin(); ok {
			_, m.DiskBytes = st.Layout().OriginRange(last, 1, math.MaxInt64)
		}
		return nil
	}
	// Only its size is used.
	origin, err := openOrigin(o.origin, block.Options{ReadOnly: true, Lock: block.LockShared}, o.raw)
	if err != nil {
		return err
	}
	defer origin.Close()
	m.DiskBytes, m.DiskKnown = origin.Size(), true
	m.StoredBytes -= max(0, m.pastEnd(st))
	return st.CheckOrigin(m.DiskBytes)
}

// pastEnd is the part of a stored last chunk that is after the end of the disk.
func (m *mapResult) pastEnd(st *store.Store) int64 {
	last, ok := st.LastOrigin()
	if !ok {
		return 0
	}
	return st.Layout().OriginOffset(last+1) - m.DiskBytes
}

// Cells of a row and rows of a strip. In letters a cell is twice as high as wide, so there are fewer.
const (
	mapColumns   = 64
	diskRows     = 32
	cowRows      = 8
	imageColumns = 128
	jsonCells    = 1024
)

func (o *mapOptions) show(c *cobra.Command, st *store.Store, m mapResult, inputs []string) error {
	if o.svg != "" || o.png != "" {
		panels := mapPanels(st, m, imageColumns, diskRows, cowRows)
		for _, out := range []struct {
			path  string
			write func(io.Writer, ...picture.Panel) error
		}{{o.svg, picture.SVG}, {o.png, picture.PNG}} {
			if out.path == "" {
				continue
			}
			write := func(w io.Writer) error { return out.write(w, panels...) }
			if err := writePicture(c, out.path, o.force, inputs, write); err != nil {
				return err
			}
		}
	}
	if o.asJSON {
		m.DiskCells, m.COWCells = cellsOf(diskStrip(st, m, jsonCells)), cellsOf(cowStrip(st, m, jsonCells))
		return printJSON(c, m)
	}
	return o.print(c.OutOrStdout(), st, m)
}

// cellsOf returns the fraction of each cell that is not background.
func cellsOf(s *picture.Strip) []float64 {
	cells := make([]float64, s.Cells())
	for i := range cells {
		cells[i] = math.Round(1e6*(1-s.Share(i, 0))) / 1e6
	}
	return cells
}

func (o *mapOptions) print(w io.Writer, st *store.Store, m mapResult) error {
	columns, colours := o.terminal(w)
	rows, draw := 2, picture.Panel.Letters
	if colours {
		rows, draw = 1, picture.Panel.Colours
	}
	for _, p := range mapPanels(st, m, columns, diskRows/rows, cowRows/rows) {
		if err := draw(p, w); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	printFigures(t, m.Figures)
	if m.UnusedChunks > 0 {
		fmt.Fprintf(t, "  unused\t%s allocated and used by no exception\n", plural(m.UnusedChunks, "chunk"))
	}
	f := m.Fragmentation
	fmt.Fprintf(t, "  runs\t%d, %s on average, the longest %s\n", f.Runs, bytesText(f.MeanBytes), bytesText(f.LongestBytes))
	fmt.Fprintf(t, "  fragmentation\t%s: %d of %d neighbouring chunks are not neighbours in COW\n", picture.Percent(int64(f.Jumps), int64(f.Neighbours)), f.Jumps, f.Neighbours)
	return t.Flush()
}

// terminal returns how wide maps on w may be, and whether colours are used.
func (o *mapOptions) terminal(w io.Writer) (columns int, colours bool) {
	const labels = 14
	f, ok := terminalOf(w)
	if ok {
		if n, _, err := term.GetSize(int(f.Fd())); err == nil {
			columns = max(16, n-labels)
		}
	}
	if columns == 0 || columns > mapColumns {
		columns = mapColumns
	}
	colours = ok && os.Getenv("NO_COLOR") == ""
	if o.colour != "auto" {
		colours = o.colour == "always"
	}
	return columns, colours
}

var (
	mapGround   = color.RGBA{0xd8, 0xd8, 0xd8, 255}
	mapMetadata = color.RGBA{0x7a, 0x5c, 0xa8, 255}
	mapUnused   = color.RGBA{0xe0, 0x9a, 0x2b, 255}
	mapData     = color.RGBA{0x1f, 0x6f, 0xb4, 255}
)

// mapPanels draws both maps.
func mapPanels(st *store.Store, m mapResult, columns, diskRows, cowRows int) []picture.Panel {
	size := bytesText(m.DiskBytes)
	if !m.DiskKnown {
		size += " or more"
	}
	return []picture.Panel{
		{Title: "disk, " + size, Strip: diskStrip(st, m, columns*diskRows), Columns: columns, Label: bytesText},
		{Title: fmt.Sprintf("%s, %s", m.Path, bytesText(int64(m.TotalSectors)*ondisk.SectorSize)),
			Strip: cowStrip(st, m, columns*cowRows), Columns: columns, Label: bytesText},
	}
}

// diskStrip is the map of the disk.
func diskStrip(st *store.Store, m mapResult, cells int) *picture.Strip {
	l := st.Layout()
	s := picture.NewStrip(m.DiskBytes, cells, picture.Class{Name: "as the origin", Letter: '.', Colour: mapGround},
		picture.Class{Name: "in COW", Letter: 'c', Colour: mapData})
	for r := range st.Exceptions() {
		s.Add(l.OriginOffset(r.Old), int64(r.Count)<<l.Shift(), 1)
	}
	return s
}

// cowStrip is the map of COW.
func cowStrip(st *store.Store, m mapResult, cells int) *picture.Strip {
	const metadata, unused, data = 1, 2, 3
	l := st.Layout()
	s := picture.NewStrip(int64(m.TotalSectors)*ondisk.SectorSize, cells, picture.Class{Name: "free", Letter: '.', Colour: mapGround},
		picture.Class{Name: "header and areas", Letter: 'm', Colour: mapMetadata},
		picture.Class{Name: "unused", Letter: 'u', Colour: mapUnused}, picture.Class{Name: "data", Letter: 'd', Colour: mapData})
	s.Add(0, l.ChunkBytes(), metadata)
	for area := range m.MetadataSectors/uint64(l.ChunkSectors) - 1 {
		s.Add(l.COWOffset(l.AreaChunk(area)), l.ChunkBytes(), metadata)
	}
	for r := range st.Exceptions() {
		s.Add(l.COWOffset(r.New), int64(r.Count)<<l.Shift(), data)
	}
	// The rest of the allocated part is unused. Its place within a cell is not shown.
	end := int64(m.SectorsAllocated) * ondisk.SectorSize
	for i := range s.Cells() {
		off, n := s.Bounds(i)
		s.Add(off, min(n, end-off)-(n-s.Bytes(i, 0)), unused)
	}
	return s
}
