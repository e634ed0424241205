package offline

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/qcow2"
	"github.com/dmsnap/dmsnap/store"
)

// ErrWholeDisk reports a raw disk as a whole, of which nothing has to be exported: it is a raw image.
var ErrWholeDisk = errors.New("is a raw disk as a whole")

// ErrNoOverlay reports what can't be exported as an overlay: what an overlay holds is what a store holds.
var ErrNoOverlay = errors.New("is no snapshot")

// ExportOptions are the options of [Export]. The zero value writes a raw image.
type ExportOptions struct {
	Source source.Options // how disks are opened; ReadOnly is set by Export
	Force  bool           // replace the output if it exists
	To     io.Writer      // write a raw image there instead, in order; to a file, after the checks of an output

	QCOW2       bool
	ClusterSize int64             // of a qcow2 image, in bytes; 0: with Backing the chunk size, at most 2 MiB, else 64 KiB
	Compress    bool              // by Compression
	Compression qcow2.Compression // by which clusters of a qcow2 image are compressed
	Backing     string            // of a qcow2 image: the name of its backing file, relative to the folder of the image; it has the origin's content

	Progress func(done, total int64)
}

// Export writes what a snapshot shows to the new image out. names are an origin and a COW device, the address of a snapshot volume
// or of another part of a disk, or the name of a disk that is not raw. The image gets its name when it is complete and durable.
//
// Errors: ErrWholeDisk, ErrNoOverlay, store.ErrInvalid; those of opening and of newfile's outputs, newfile.ErrNotRegular among
// them.
func Export(ctx context.Context, names []string, out string, o ExportOptions) (err error) {
	o.Source.ReadOnly = true
	from, err := openExported(names, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	done := int64(0)
	progress := func(reached int64) error {
		if o.Progress != nil {
			o.Progress(reached, from.dev.Size())
		}
		return context.Cause(ctx)
	}
	fill := func(dst block.Device) error {
		return block.Copy(dst, 0, from.dev, 0, from.dev.Size(), block.IntoZeros, func(n int64) error {
			done += n
			return progress(done)
		})
	}
	switch {
	case o.QCOW2:
		return from.writeQCOW2(out, names, o, progress)
	case o.To != nil:
		return newfile.WriteTo(o.To, source.Paths(names), func(w io.Writer) error {
			return newfile.Stream(ctx, w, from.dev.Size(), fill)
		})
	}
	return writeDevice(out, o.Force, names, from.dev.Size(), func(dst *block.File) error { return fill(dst) })
}

// exported is what an export writes.
type exported struct {
	dev    block.Device
	origin *source.Disk // of a snapshot; nil: there is none
	io.Closer
}

// openExported opens what is exported.
func openExported(names []string, o ExportOptions) (*exported, error) {
	switch {
	case len(names) == 2:
		origin, cow, err := source.OpenPair(names[0], names[1], o.Source)
		if err != nil {
			return nil, err
		}
		return snapshotOf(origin, cow, names[1], closers{cow, origin})
	case o.Backing != "":
		sides, err := source.OpenSides(names, o.Source)
		if err != nil {
			return nil, err
		}
		return snapshotOf(sides.Origin, sides.COWs[0], sides.Names[0], sides)
	}
	dev, err := source.Open(names[0], o.Source)
	if err != nil {
		return nil, err
	}
	if err := source.CheckComplete(names[0]); err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	if source.IsFile(names[0]) && dev.Format() == ondisk.RawFormat {
		return nil, errors.Join(fmt.Errorf("%s %w", names[0], ErrWholeDisk), dev.Close())
	}
	return &exported{dev, nil, dev}, nil
}

// snapshotOf is the view of a store over its origin, both of which closer closes. A snapshot that can't be read completely is refused.
func snapshotOf(origin, cow *source.Disk, cowName string, closer io.Closer) (*exported, error) {
	view, err := openView(origin, cow)
	if err != nil {
		return nil, errors.Join(block.WithPath(cowName, err), closer.Close())
	}
	return &exported{view, origin, closer}, nil
}

// openView opens what the store on cow shows over origin.
func openView(origin, cow block.Device) (*store.View, error) {
	st, err := store.OpenToRead(cow)
	if err != nil {
		return nil, err
	}
	if err := st.Err(); err != nil {
		return nil, fmt.Errorf("%w: it was marked so when its COW device was full or failed, and its content is lost", err)
	}
	return store.NewView(origin, st)
}

// writeQCOW2 writes a qcow2 image of x.
func (x *exported) writeQCOW2(out string, inputs []string, o ExportOptions, progress func(reached int64) error) error {
	e := qcow2.ExportOptions{ClusterSize: o.ClusterSize, Compress: o.Compress, Compression: o.Compression, Progress: progress}
	if o.Backing != "" {
		base, err := x.overlay(out, inputs[0], o, &e)
		if err != nil {
			return fmt.Errorf("backing file: %w", err)
		}
		inputs = append(slices.Clone(inputs), base)
	}
	return newfile.Write(out, newfile.Options{Replace: o.Force, Inputs: source.Paths(inputs)}, func(f *os.File) error {
		return qcow2.Export(f, x.dev, e)
	})
}

// overlay makes e that of an overlay, and returns the path of its backing file. The origin that is open has the name originName.
func (x *exported) overlay(out, originName string, o ExportOptions, e *qcow2.ExportOptions) (base string, err error) {
	snap, isSnapshot := x.dev.(*store.View)
	if !isSnapshot {
		return "", fmt.Errorf("%s %w", originName, ErrNoOverlay)
	}
	base = o.Backing
	if !filepath.IsAbs(base) {
		base = filepath.Join(filepath.Dir(out), base)
	}
	if e.BackingFormat, err = source.BackingFormat(base, originName, x.origin, snap.Size()); err != nil {
		return "", err
	}
	e.Backing, e.BackingSize = o.Backing, snap.Size()
	e.Stored = func(off, n int64) (bool, int64) {
		_, _, follow, stored := snap.Place(off, n)
		return stored, follow
	}
	if e.ClusterSize == 0 {
		e.ClusterSize = min(snap.Store().Layout().ChunkBytes(), 2<<20)
	}
	return base, nil
}
