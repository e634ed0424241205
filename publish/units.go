package publish

import (
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/layer"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// produceDevice emits the units of a device that are not zeros. Holes are not read.
func produceDevice(dev block.Device, progress func(done, total int64)) func(emit func(layer.Unit) error) error {
	return func(emit func(layer.Unit) error) error {
		size := dev.Size()
		for off := int64(0); off < size; {
			extents, err := block.Extents(dev, off, size-off)
			if err != nil {
				return err
			}
			end := off
			for _, e := range extents {
				if end += e.Length; e.Flags&block.ReadsZero != 0 && end < size {
					off = max(off, end/layer.UnitBytes*layer.UnitBytes) // units that are zeros as a whole
				} else if e.Flags&block.ReadsZero != 0 {
					off = max(off, size)
				}
				for ; off < end; off += layer.UnitBytes {
					if err := emitWhole(dev, off, min(layer.UnitBytes, size-off), emit); err != nil {
						return err
					}
					if progress != nil {
						progress(off, size)
					}
				}
			}
		}
		return nil
	}
}

// emitWhole emits a unit unless it is zeros.
func emitWhole(dev block.Device, off, n int64, emit func(layer.Unit) error) error {
	b := layer.Buffer()[:n]
	if _, err := dev.ReadAt(b, off); err != nil {
		return err
	}
	if layer.IsZero(b) {
		layer.Recycle(b)
		return nil
	}
	return emit(layer.Unit{Pieces: []layer.Piece{{Place: off, Length: n}}, Data: b})
}

// storeLayer is the layer of a store.
type storeLayer struct{ *store.Store }

func (s storeLayer) chunkSectors() uint32 { return s.Layout().ChunkSectors }

func (s storeLayer) produce(size int64, progress func(done, total int64)) func(emit func(layer.Unit) error) error {
	return func(emit func(layer.Unit) error) error {
		g := &gathering{emit: emit, grain: min(s.Layout().ChunkBytes(), layer.UnitBytes)}
		last, any := s.LastOrigin()
		for chunk := ondisk.OriginChunk(0); any && chunk <= last; {
			at, n, stored := s.LookupRun(chunk, uint64(last-chunk)+1)
			off, end := s.Layout().OriginRange(chunk, n, size)
			from := s.Layout().COWOffset(at)
			if stored {
				if err := g.addRange(s.Device(), from, off, end); err != nil {
					return err
				}
			}
			chunk += ondisk.OriginChunk(n)
			if progress != nil {
				progress(end, size)
			}
		}
		return g.flush()
	}
}

func (d Delta) chunkSectors() uint32 { return d.ChunkSectors }

func (d Delta) produce(size int64, progress func(done, total int64)) func(emit func(layer.Unit) error) error {
	return func(emit func(layer.Unit) error) error {
		g := &gathering{emit: emit, grain: min(int64(d.ChunkSectors)*ondisk.SectorSize, layer.UnitBytes)}
		for off, end := int64(0), d.Device.Size(); off < end; {
			extents, err := d.Changed(off, end-off)
			if err != nil {
				return err
			}
			if len(extents) == 0 {
				return fmt.Errorf("no extents at byte %d", off)
			}
			for _, e := range extents {
				if e.Flags&1 != 0 {
					if err := g.addRange(d.Device, off, off, off+e.Length); err != nil {
						return err
					}
				}
				off += e.Length
			}
			if progress != nil {
				progress(off, size)
			}
		}
		return g.flush()
	}
}

// gathering gathers what is stored of one unit.
type gathering struct {
	emit   func(layer.Unit) error
	grain  int64 // zeros are recognised in pieces of this size
	number int64
	unit   layer.Unit
}

// addRange adds the bytes of the disk from off to end, which are at byte from of a device.
func (g *gathering) addRange(dev block.Device, from, off, end int64) error {
	for off < end {
		n := min(end, (off/layer.UnitBytes+1)*layer.UnitBytes) - off
		if err := g.add(dev, from, off, n); err != nil {
			return err
		}
		off, from = off+n, from+n
	}
	return nil
}

// add adds n bytes from byte from of a device, which belong at byte off of the disk, within one unit.
func (g *gathering) add(dev block.Device, from, off, n int64) error {
	if off/layer.UnitBytes != g.number {
		if err := g.flush(); err != nil {
			return err
		}
		g.number = off / layer.UnitBytes
	}
	if g.unit.Data == nil {
		g.unit.Data = layer.Buffer()[:0]
	}
	have := len(g.unit.Data)
	b := g.unit.Data[have : have+int(n)]
	if _, err := dev.ReadAt(b, from); err != nil {
		return err
	}
	for len(b) > 0 {
		p := b[:min(g.grain, int64(len(b)))]
		zero := layer.IsZero(p)
		g.piece(off, int64(len(p)), zero)
		if !zero {
			g.unit.Data = append(g.unit.Data, p...) // in place, or over zeros
		}
		off, b = off+int64(len(p)), b[len(p):]
	}
	return nil
}

func (g *gathering) piece(off, n int64, zero bool) {
	if k := len(g.unit.Pieces) - 1; k >= 0 {
		if last := &g.unit.Pieces[k]; last.Zero == zero && last.Place+last.Length == off {
			last.Length += n
			return
		}
	}
	g.unit.Pieces = append(g.unit.Pieces, layer.Piece{Place: off, Length: n, Zero: zero})
}

func (g *gathering) flush() error {
	if len(g.unit.Pieces) == 0 {
		return nil
	}
	u := g.unit
	g.unit = layer.Unit{}
	return g.emit(u)
}
