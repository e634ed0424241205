package fleet

import (
	"fmt"
	"strings"

	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
)

// Table returns the device-mapper tables with which a kernel shows what a node, a checkpoint or a disk shows, bottom-up. A
// file, which needs a loop device, has the placeholder @ID there, the disk @NAME:
//
//	fleet-4-base  0 8192 linear @golden 0        where a layer is longer than what is below it
//	              8192 32768 zero
//	fleet-4       0 40960 snapshot /dev/mapper/fleet-4-base @4 P 8
//	fleet-7       0 40960 snapshot /dev/mapper/fleet-4 @7 P 8
//
// What the kernel shows is what was flushed.
func (f *Fleet) Table(name string) (api.Table, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var layers []*layerRecord
	var d *diskRecord
	switch {
	case f.state.Nodes[name] != nil:
		top := f.state.Layers[f.state.Nodes[name].Top]
		layers = append([]*layerRecord{top}, f.state.ancestors(top)...)
	case f.state.checkpoint(name) != nil:
		top := f.state.checkpoint(name)
		layers = append([]*layerRecord{top}, f.state.ancestors(top)...)
	case f.state.Disks[name] != nil:
		d = f.state.Disks[name]
	default:
		return api.Table{}, noSuchElement(name)
	}
	if d == nil {
		d = f.state.Disks[layers[0].Disk]
	}
	t := tableMaker{below: "@" + d.Name, sectors: uint64(d.Size) / ondisk.SectorSize}
	t.table.Files = append(t.table.Files, api.TableFile{Placeholder: t.below, File: d.Source, ReadOnly: true})
	if len(layers) == 0 {
		t.add("fleet-"+d.Name, fmt.Sprintf("0 %d linear %s 0", t.sectors, t.below), true)
	}
	for i := len(layers) - 1; i >= 0; i-- {
		t.addLayer(layers[i], f.path(layers[i]), f.chunkSectors(layers[i]))
	}
	return t.table, nil
}

// chunkSectors is the chunk size of a layer. mu is held.
func (f *Fleet) chunkSectors(r *layerRecord) uint32 {
	l := f.layers[r.ID]
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.stack != nil:
		return l.stack.Layout().ChunkSectors
	case l.store != nil:
		return l.store.Layout().ChunkSectors
	}
	return ondisk.DefaultChunkSectors // it can't be read
}

// A tableMaker makes tables bottom-up.
type tableMaker struct {
	table   api.Table
	below   string // the device below the next layer
	sectors uint64 // of it
}

func (t *tableMaker) add(name, table string, readOnly bool) {
	t.table.Devices = append(t.table.Devices, api.TableDevice{Name: name, Table: table, ReadOnly: readOnly})
	t.below = "/dev/mapper/" + name
}

func (t *tableMaker) addLayer(r *layerRecord, file string, chunkSectors uint32) {
	name, sectors := fmt.Sprintf("fleet-%d", r.ID), uint64(r.Size)/ondisk.SectorSize
	if sectors > t.sectors {
		t.add(name+"-base", strings.Join([]string{
			fmt.Sprintf("0 %d linear %s 0", t.sectors, t.below),
			fmt.Sprintf("%d %d zero", t.sectors, sectors-t.sectors)}, "\n"), true)
	}
	t.sectors = sectors
	placeholder := fmt.Sprintf("@%d", r.ID)
	t.table.Files = append(t.table.Files, api.TableFile{Placeholder: placeholder, File: file, ReadOnly: r.Sealed})
	t.add(name, snapshot.Table{Length: sectors, Target: snapshot.TargetSnapshot, Origin: t.below, COW: placeholder,
		Store: snapshot.Persistent, ChunkSectors: chunkSectors}.String(), r.Sealed)
}
