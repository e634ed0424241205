package inspect

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/lines"
	"github.com/dmsnap/dmsnap/internal/picture"
	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/store"
)

// Server writes the status of a server.
func (p TextWriter) Server(s api.Status) error {
	w := p.W
	fmt.Fprintf(w, "origin %s: %s\n", s.Origin.Path, bytesize.Text(s.Origin.SizeBytes))
	if s.Origin.Error != "" {
		fmt.Fprintf(w, "  %s, %s in memory only: %s\n", s.Origin.State, bytesize.Text(s.Origin.DirtyBytes), s.Origin.Error)
	}
	if s.Origin.URI != "" {
		fmt.Fprintf(w, "  uri  %s\n", s.Origin.URI)
	}
	for _, snap := range s.Snapshots {
		if err := p.Snapshot(snap); err != nil {
			return err
		}
	}
	if s.Merge != nil {
		return p.Merge(*s.Merge)
	}
	return nil
}

// Status writes the status of a store.
func (p TextWriter) Status(s Status) error {
	w := p.W
	use := ""
	if s.InUse {
		use = ", in use"
	}
	fmt.Fprintf(w, "%s: %s%s\n", s.Path, s.State, use)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	p.figures(t, s.Figures)
	return t.Flush()
}

// figures writes figures as rows of a table.
func (p TextWriter) figures(w io.Writer, f api.Figures) {
	fmt.Fprintf(w, "  dmsetup\t%s\n", f.Dmsetup)
	if f.Full {
		fmt.Fprintf(w, "  full\twrites that require space fail or wait%s\n", p.Full)
	}
	if f.Error != "" {
		fmt.Fprintf(w, "  error\t%s\n", f.Error)
	}
	if f.Unmarked {
		fmt.Fprintf(w, "  unmarked\tthe COW device could not be marked invalid: do not use it as a snapshot again\n")
	}
	fmt.Fprintf(w, "  chunk\t%s (%d sectors)\n", bytesize.Text(int64(f.ChunkSectors)*ondisk.SectorSize), f.ChunkSectors)
	fmt.Fprintf(w, "  exceptions\t%d\n", f.Exceptions)
	fmt.Fprintf(w, "  used\t%s of %s (%.1f %%), %s of it metadata\n", bytesize.Text(int64(f.SectorsAllocated)*ondisk.SectorSize),
		bytesize.Text(int64(f.TotalSectors)*ondisk.SectorSize), f.Percent, bytesize.Text(int64(f.MetadataSectors)*ondisk.SectorSize))
}

// Snapshot writes the status of a served snapshot.
func (p TextWriter) Snapshot(s api.Snapshot) error {
	w := p.W
	merged := ""
	if s.Merged {
		merged = ", merged into the origin"
	}
	fmt.Fprintf(w, "snapshot %s: %s%s\n", text.Name(s.Name), s.State, merged)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "  cow\t%s\n  uri\t%s\n", s.COW, s.URI)
	p.figures(t, s.Figures)
	return t.Flush()
}

// Merge writes the state of a merge in a server.
func (p TextWriter) Merge(m api.Merge) error {
	_, err := fmt.Fprintf(p.W, "merge of %s: %s, %s of %s (%.1f %%)\n", text.Name(m.Name), m.State,
		bytesize.Text(m.MergedBytes), bytesize.Text(m.TotalBytes), m.Percent)
	if m.Error != "" {
		_, err = fmt.Fprintf(p.W, "  %s\n", m.Error)
	}
	return err
}

// Map draws a map, and writes its figures. In letters a cell is twice as high as wide, so there are fewer.
func (p TextWriter) Map(m *Map) error {
	w, rows, draw := p.W, 2, picture.Panel.Letters
	if p.Colours {
		rows, draw = 1, picture.Panel.Colours
	}
	for _, panel := range m.panels(cmp.Or(p.Columns, MapColumns), diskRows/rows, cowRows/rows) {
		if err := draw(panel, w); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	p.figures(t, m.Figures)
	if m.UnusedChunks > 0 {
		fmt.Fprintf(t, "  unused\t%s allocated and used by no exception\n", text.Count(m.UnusedChunks, "chunk"))
	}
	f := m.Fragmentation
	fmt.Fprintf(t, "  runs\t%d, %s on average, the longest %s\n", f.Runs, bytesize.Text(f.MeanBytes), bytesize.Text(f.LongestBytes))
	fmt.Fprintf(t, "  fragmentation\t%s: %d of %d neighbouring chunks are not neighbours in COW\n", picture.Percent(int64(f.Jumps), int64(f.Neighbours)), f.Jumps, f.Neighbours)
	return t.Flush()
}

// ListText writes the exceptions of a store as lines, run by run, ascending on the disk.
func ListText(ctx context.Context, w io.Writer, path string, st *store.Store) error {
	const row = "%14v  %23v  %23v  %s\n"
	fmt.Fprintf(w, row, "origin byte", "origin chunks", "COW chunks", "length")
	l := st.Layout()
	runs, err := lines.Write(ctx, w, st.Exceptions(), func(b []byte, r store.Run) []byte { return appendRun(b, RunOf(l, r)) })
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s: %s in %s, %s; a chunk is %s\n", path, text.Count(st.Len(), "exception"), text.Count(runs, "run"),
		bytesize.Text(int64(st.Len())<<l.Shift()), bytesize.Text(l.ChunkBytes()))
	return err
}

// appendRun adds a line of ListText; its columns are as wide as those of the heading.
func appendRun(b []byte, r Run) []byte {
	b = text.AppendInt(b, 14, r.OriginOffset)
	b = text.AppendRange(append(b, "  "...), 23, r.OriginChunk, r.Chunks)
	b = text.AppendRange(append(b, "  "...), 23, r.COWChunk, r.Chunks)
	b = bytesize.Append(append(b, "  "...), r.Length)
	return append(b, '\n')
}
