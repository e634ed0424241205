package offline

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/qcow2"
	"github.com/dmsnap/dmsnap/store"
)

// ImportOptions are the options of [Import].
type ImportOptions struct {
	ChunkSectors uint32 // of the store; 0: 8
	Raw          bool   // the bytes of the base are the disk, whatever they look like
	Force        bool   // replace the store if it exists
	Progress     func(done, total int64)
}

// ImportResult says what was imported.
type ImportResult struct {
	Path         string `json:"path"`
	ChunkSectors uint32 `json:"chunk_sectors"`
	Exceptions   uint64 `json:"exceptions"`
}

// WriteText writes the result for people.
func (r ImportResult) WriteText(w io.Writer) error {
	_, err := fmt.Fprintf(w, "%s: %d exceptions of %s\n", r.Path, r.Exceptions, bytesize.Text(int64(r.ChunkSectors)*512))
	return err
}

// Import makes a store, the new file cow, over the raw disk base from overlay, a qcow2 image whose backing file has the content
// of base. The file gets its name when it is complete and durable.
func Import(ctx context.Context, overlay, cow, base string, o ImportOptions) (res ImportResult, err error) {
	if o.ChunkSectors == 0 {
		o.ChunkSectors = ondisk.DefaultChunkSectors
	}
	l, err := ondisk.NewLayout(o.ChunkSectors)
	if err != nil {
		return res, err
	}
	origin, err := cowfile.OpenRaw(base, cowfile.OriginOptions{Options: block.Options{ReadOnly: true}, Raw: o.Raw})
	if err != nil {
		return res, err
	}
	defer origin.Close()
	if err := errors.Join(cowfile.OriginOptions{Raw: true}.Check(origin), store.CheckBlockSize(l, origin)); err != nil {
		return res, block.WithPath(base, err)
	}
	file, err := source.OpenWhole(overlay, block.Options{ReadOnly: true})
	if err != nil {
		return res, err
	}
	defer file.Close()
	image, err := openOverlay(file, origin)
	if err != nil {
		return res, block.WithPath(overlay, err)
	}
	size, err := cowfile.FullSize(l, origin.Size())
	if err != nil {
		return res, block.WithPath(cow, err)
	}
	res = ImportResult{Path: cow, ChunkSectors: o.ChunkSectors}
	err = writeDevice(cow, o.Force, []string{overlay, base}, size, func(dst *block.File) error {
		st, err := store.Create(dst, l, true)
		if err != nil {
			return err
		}
		res.Exceptions, err = qcow2.Import(ctx, st, image, func(reached int64) {
			if o.Progress != nil {
				o.Progress(reached, origin.Size())
			}
		})
		return err
	})
	return res, err
}

// openOverlay opens the image in file over origin.
func openOverlay(file, origin block.Device) (*qcow2.Image, error) {
	info, err := qcow2.ReadInfo(file)
	if err != nil {
		return nil, err
	}
	switch {
	case info.Backing == "":
		return nil, errors.New("it has no backing file: it is not an overlay")
	case info.BackingFormat != "" && info.BackingFormat != "raw":
		return nil, fmt.Errorf("its backing file has the format %q: the base is a raw disk", info.BackingFormat)
	case info.Size != origin.Size():
		return nil, fmt.Errorf("its disk has %d bytes, the base has %d", info.Size, origin.Size())
	}
	return qcow2.Open(file, qcow2.Options{Backing: func(string, string) (block.Device, error) { return origin, nil }})
}
