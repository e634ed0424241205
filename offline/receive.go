package offline

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/store"
	"github.com/dmsnap/dmsnap/stream"
)

// ErrNoTarget reports a target that does not exist, of which no undo store can be made.
var ErrNoTarget = errors.New("does not exist")

// ReceiveOptions are the options of [Receive].
type ReceiveOptions struct {
	Check bool // write nothing: verify the stream, and compare it with the target
	// Again returns the stream from its beginning; then all of it is compared before anything is written.
	Again func() (io.Reader, error)
	Undo  string // a new store that keeps the old bytes of the target; empty: there is none
	// Origin and COW: the target stays as it is; a new store COW shows the result over the raw disk Origin. ChunkSectors are
	// those of the store.
	Origin, COW  string
	ChunkSectors uint32
	Raw          bool // the bytes of the target, or of Origin, are the disk, whatever they look like
	// Force writes the new bytes whatever the target has; with Undo or COW it replaces that file, and nothing else.
	Force bool
	// Inputs are names of further files that must not be outputs.
	Inputs []string
	// Progress is called with the byte of the disk that was reached, and the size of the disk.
	Progress func(reached, size int64)
}

// ReceiveResult says what was received.
type ReceiveResult struct {
	Path string      `json:"path,omitempty"`
	Kind stream.Kind `json:"kind"`
	Size int64       `json:"size"` // of the disk, in bytes
	stream.Count
	Written  int64 `json:"written_bytes"`
	Present  int64 `json:"present_bytes"`  // were there already
	Repaired int64 `json:"repaired_bytes"` // of those written: left half written by an interruption
	Differs  int64 `json:"differs_bytes"`

	FirstWrong int64 `json:"-"` // byte of the first difference
	Reached    int64 `json:"-"` // byte of the disk up to which the stream was applied
	Stays      bool  `json:"-"` // what was written stays also after an error

	check bool
}

// WriteText writes the result for people.
func (r ReceiveResult) WriteText(w io.Writer) (err error) {
	data := bytesize.Text(r.Data + r.Zero)
	switch {
	case r.check && r.Path == "":
		_, err = fmt.Fprintf(w, "a whole stream: %s of a disk of %s\n", data, bytesize.Text(r.Size))
	case r.check && r.Differs > 0:
		_, err = fmt.Fprintf(w, "%s: %s match neither the old nor the new bytes, first at byte %d\n", r.Path, bytesize.Text(r.Differs), r.FirstWrong)
	case r.check:
		_, err = fmt.Fprintf(w, "%s: the stream of %s applies, %s are there already\n", r.Path, data, bytesize.Text(r.Present))
	default:
		_, err = fmt.Fprintf(w, "%s: wrote %s, %s were there already\n", r.Path, bytesize.Text(r.Written), bytesize.Text(r.Present))
	}
	return err
}

// Receive writes a stream of package stream to target, a raw image or a block device, or makes a store of it. The stream of a
// whole disk makes a target that does not exist. target is empty with COW, and may be with Check: then the stream alone is
// verified.
//
// A call that was interrupted is repeated: what has the new bytes already is skipped. Errors: *stream.MismatchError, with all
// before it applied; ErrNoTarget; those of package stream, of newfile's outputs and of opening. The result is valid with an error.
func Receive(ctx context.Context, in io.Reader, target string, o ReceiveOptions) (ReceiveResult, error) {
	from, err := stream.NewReader(bufio.NewReaderSize(in, 64<<10)) // what is longer is read in place
	if err != nil {
		return ReceiveResult{}, err
	}
	w := &receiving{ReceiveOptions: o, ctx: ctx, from: from}
	path, err := w.receive(target)
	h, got := w.from.Header(), w.got
	return ReceiveResult{path, h.Kind, h.Size, got.Count, got.Written, got.Present, got.Repaired, got.Differs,
		got.FirstWrong, got.Reached, w.stays, o.Check}, err
}

// A receiving is one call of Receive.
type receiving struct {
	ReceiveOptions
	ctx   context.Context
	from  *stream.Reader
	got   stream.Applied
	stays bool // what was applied before an error
}

// receive does what was asked for, and returns the path of what was written or compared.
func (w *receiving) receive(target string) (string, error) {
	switch {
	case w.COW != "":
		return w.COW, w.toStore()
	case target == "":
		return "", w.verify(nil)
	}
	_, err := os.Stat(target)
	if errors.Is(err, fs.ErrNotExist) && source.IsFile(target) && w.from.Header().Kind == stream.Disk && !w.Check {
		if w.Undo != "" {
			return "", fmt.Errorf("%s %w", target, ErrNoTarget)
		}
		return target, w.make(target, false, w.from.Header().Size, func(dst *block.File) error { return w.apply(dst) })
	}
	dev, err := source.OpenWhole(target, block.Options{ReadOnly: w.Check})
	if err != nil {
		return "", err
	}
	w.Inputs = append(w.Inputs, target)
	err = cowfile.OriginOptions{Raw: w.Raw || w.from.Header().Kind == stream.Disk}.Check(dev)
	if err == nil && !w.Force && !w.Check {
		err = merge.CheckOrigin(target)
	}
	switch {
	case err != nil:
	case w.Check:
		err = w.verify(dev)
	case w.Undo != "":
		err = w.keeping(dev)
	default:
		w.stays = true
		err = w.apply(dev)
	}
	return target, errors.Join(block.WithPath(target, err), dev.Close())
}

// make makes an output file of a size.
func (w *receiving) make(path string, replace bool, size int64, fill func(*block.File) error) error {
	return writeDevice(path, replace, w.Inputs, size, fill)
}

func (w *receiving) options() stream.ApplyOptions {
	o := stream.ApplyOptions{Force: w.Force && w.COW == "" && w.Undo == ""}
	if w.Progress != nil {
		size := w.from.Header().Size
		o.Progress = func(reached int64) { w.Progress(reached, size) }
	}
	return o
}

func (w *receiving) verify(target block.Device) (err error) {
	w.got, err = w.from.Check(w.ctx, target, w.options().Progress)
	return err
}

// first compares the whole stream with dev, if that is asked for.
func (w *receiving) first(dev block.Device) error {
	if w.Again == nil {
		return nil
	}
	if err := w.verify(dev); err != nil {
		return err
	}
	if w.got.Differs > 0 && !w.options().Force {
		return &stream.MismatchError{Off: w.got.FirstWrong}
	}
	in, err := w.Again()
	if err != nil {
		return err
	}
	w.from, err = stream.NewReader(bufio.NewReaderSize(in, 1<<20))
	return err
}

func (w *receiving) apply(dev block.Device) error {
	err := w.first(dev)
	if err == nil {
		w.got, err = w.from.Apply(w.ctx, dev, w.options())
	}
	return err
}

// keeping applies the stream to dev and keeps the old bytes in a new store.
func (w *receiving) keeping(dev *block.File) error {
	l, err := ondisk.NewLayout(ondisk.DefaultChunkSectors)
	if err != nil {
		return err
	}
	size, err := cowfile.FullSize(l, dev.Size())
	if err != nil {
		return block.WithPath(w.Undo, err)
	}
	if err := w.make(w.Undo, w.Force, size, func(dst *block.File) error {
		_, err := store.Create(dst, l, true)
		return err
	}); err != nil {
		return err
	}
	undo, err := source.OpenWhole(w.Undo, block.Options{})
	if err != nil {
		return err
	}
	if err = w.first(dev); err == nil {
		w.stays = true
		w.got, err = w.from.ApplyKeeping(w.ctx, dev, undo, w.options())
	}
	err = errors.Join(err, undo.Close())
	if err != nil && w.got.Written == 0 {
		return errors.Join(err, os.Remove(w.Undo)) // it has nothing
	}
	return err
}

// toStore makes a new store over a base.
func (w *receiving) toStore() error {
	l, err := ondisk.NewLayout(w.ChunkSectors)
	if err != nil {
		return err
	}
	if !source.IsFile(w.Origin) {
		return fmt.Errorf("%s: the base must be a raw disk as a whole", w.Origin)
	}
	base, err := cowfile.OpenRaw(w.Origin, cowfile.OriginOptions{Options: block.Options{ReadOnly: true}, Raw: w.Raw})
	if err != nil {
		return err
	}
	defer base.Close()
	if err := merge.CheckOrigin(w.Origin); err != nil {
		return err
	}
	if err = cowfile.CheckSize(base); err == nil {
		err = store.CheckBlockSize(l, base)
	}
	if err != nil {
		return block.WithPath(w.Origin, err)
	}
	size, err := cowfile.FullSize(l, base.Size())
	if err != nil {
		return block.WithPath(w.COW, err)
	}
	w.Inputs = append(w.Inputs, w.Origin)
	return w.make(w.COW, w.Force, size, func(dst *block.File) error {
		if err := w.first(base); err != nil {
			return block.WithPath(w.Origin, err)
		}
		w.got, err = w.from.ApplyOver(w.ctx, base, dst, w.ChunkSectors, w.options())
		return err
	})
}
