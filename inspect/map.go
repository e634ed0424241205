package inspect

import (
	"context"
	"fmt"
	"image/color"
	"io"
	"math"

	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/picture"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/store"
)

// A Map says what a store and its disk have where. Cells are equal parts of the disk, or of COW, in order; the value of a cell is
// the fraction of it that is used, 0 to 1.
type Map struct {
	Path string `json:"path"`
	api.Figures
	DiskBytes     int64         `json:"disk_bytes"`
	DiskKnown     bool          `json:"disk_known"` // else disk_bytes is where the last exception ends
	StoredBytes   int64         `json:"stored_bytes"`
	UnusedChunks  uint64        `json:"unused_chunks"` // allocated, but used by no exception
	Fragmentation Fragmentation `json:"fragmentation"`
	DiskCells     []float64     `json:"disk_cells"`
	COWCells      []float64     `json:"cow_cells"`

	store *store.Store
}

// Fragmentation says how the order of COW differs from the disk's.
type Fragmentation struct {
	Runs         uint64  `json:"runs"`          // consecutive on both sides
	MeanBytes    int64   `json:"mean_bytes"`    // of a run
	LongestBytes int64   `json:"longest_bytes"` // of a run
	Neighbours   uint64  `json:"neighbours"`    // pairs of neighbouring chunks of the disk that are both stored
	Jumps        uint64  `json:"jumps"`         // those that are no neighbours in COW, where an area between them does not count
	Percent      float64 `json:"percent"`       // jumps of neighbours
}

func fragmentationOf(ctx context.Context, st *store.Store) (f Fragmentation, err error) {
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

// MapOf returns the map of a store on a COW device that was opened at path, without cells. disk is the size of the disk in
// bytes; -1: not known, then it ends where the last exception does. Errors: store.ErrOriginTooSmall; the cause of ctx.
func MapOf(ctx context.Context, path string, st *store.Store, disk int64) (*Map, error) {
	m := &Map{Path: path, Figures: Figures(st), StoredBytes: int64(st.Len()) << st.Layout().Shift(), store: st}
	if disk >= 0 {
		m.DiskBytes, m.DiskKnown = disk, true
		m.StoredBytes -= max(0, m.pastEnd())
		if err := st.CheckOrigin(disk); err != nil {
			return nil, err
		}
	} else if last, ok := st.LastOrigin(); ok {
		_, m.DiskBytes = st.Layout().OriginRange(last, 1, math.MaxInt64)
	}
	var err error
	if m.Fragmentation, err = fragmentationOf(ctx, st); err != nil {
		return nil, err
	}
	m.UnusedChunks = (m.SectorsAllocated-m.MetadataSectors)/uint64(m.ChunkSectors) - m.Exceptions
	return m, nil
}

// FillCells fills DiskCells and COWCells, with at most so many cells each.
func (m *Map) FillCells(cells int) {
	m.DiskCells, m.COWCells = cellsOf(m.diskStrip(cells)), cellsOf(m.cowStrip(cells))
}

// pastEnd is the part of a stored last chunk that is after the end of the disk.
func (m *Map) pastEnd() int64 {
	last, ok := m.store.LastOrigin()
	if !ok {
		return 0
	}
	return m.store.Layout().OriginOffset(last+1) - m.DiskBytes
}

// cellsOf returns the fraction of each cell that is not background.
func cellsOf(s *picture.Strip) []float64 {
	cells := make([]float64, s.Cells())
	for i := range cells {
		cells[i] = math.Round(1e6*(1-s.Share(i, 0))) / 1e6
	}
	return cells
}

var (
	mapGround   = color.RGBA{0xd8, 0xd8, 0xd8, 255}
	mapMetadata = color.RGBA{0x7a, 0x5c, 0xa8, 255}
	mapUnused   = color.RGBA{0xe0, 0x9a, 0x2b, 255}
	mapData     = color.RGBA{0x1f, 0x6f, 0xb4, 255}
)

// MapColumns is how many cells a row of a map in text has, unless the terminal is narrower.
const MapColumns = 64

// Rows of the strips, and columns of an image.
const (
	diskRows     = 32
	cowRows      = 8
	imageColumns = 128
)

// WriteSVG draws both maps as an image.
func (m *Map) WriteSVG(w io.Writer) error {
	return picture.SVG(w, m.panels(imageColumns, diskRows, cowRows)...)
}

// WritePNG draws both maps as an image.
func (m *Map) WritePNG(w io.Writer) error {
	return picture.PNG(w, m.panels(imageColumns, diskRows, cowRows)...)
}

// panels draws both maps.
func (m *Map) panels(columns, diskRows, cowRows int) []picture.Panel {
	size := bytesize.Text(m.DiskBytes)
	if !m.DiskKnown {
		size += " or more"
	}
	return []picture.Panel{
		{Title: "disk, " + size, Strip: m.diskStrip(columns * diskRows), Columns: columns, Label: bytesize.Text},
		{Title: fmt.Sprintf("%s, %s", m.Path, bytesize.Text(int64(m.TotalSectors)*ondisk.SectorSize)),
			Strip: m.cowStrip(columns * cowRows), Columns: columns, Label: bytesize.Text},
	}
}

// diskStrip is the map of the disk.
func (m *Map) diskStrip(cells int) *picture.Strip {
	l := m.store.Layout()
	s := picture.NewStrip(m.DiskBytes, cells, picture.Class{Name: "as the origin", Letter: '.', Colour: mapGround},
		picture.Class{Name: "in COW", Letter: 'c', Colour: mapData})
	for r := range m.store.Exceptions() {
		s.Add(l.OriginOffset(r.Old), int64(r.Count)<<l.Shift(), 1)
	}
	return s
}

// cowStrip is the map of COW.
func (m *Map) cowStrip(cells int) *picture.Strip {
	const metadata, unused, data = 1, 2, 3
	l := m.store.Layout()
	s := picture.NewStrip(int64(m.TotalSectors)*ondisk.SectorSize, cells, picture.Class{Name: "free", Letter: '.', Colour: mapGround},
		picture.Class{Name: "header and areas", Letter: 'm', Colour: mapMetadata},
		picture.Class{Name: "unused", Letter: 'u', Colour: mapUnused}, picture.Class{Name: "data", Letter: 'd', Colour: mapData})
	s.Add(0, l.ChunkBytes(), metadata)
	for area := range m.MetadataSectors/uint64(l.ChunkSectors) - 1 {
		s.Add(l.COWOffset(l.AreaChunk(area)), l.ChunkBytes(), metadata)
	}
	for r := range m.store.Exceptions() {
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
