package offline

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/repair"
	"github.com/dmsnap/dmsnap/rescue"
	"github.com/dmsnap/dmsnap/source"
)

// RepairOptions are the options of [Repair], [RepairInPlace], [Revalidate] and [RevalidateInPlace]. The zero value is usable.
type RepairOptions struct {
	Source       source.Options // how a store that is copied is opened; ReadOnly is set
	ChunkSectors uint32         // of the store; 0: those of its header. Of repairs
	Force        bool           // replace the output, or the undo file, if it exists
	Progress     func(done, total int64)
	Saved        func() // is called when the undo file is durable, before anything is changed

	// Explain is called with what it means to mark a store itself valid, when the undo file is durable and before that is done. With an error
	// it is not done.
	Explain func(about string) error
}

// Repair writes a sound copy of the damaged store of path, a COW device or the address of a snapshot volume, to the new file out,
// which gets its name when it is complete and durable. Errors: those of repair.NewPlan, of opening and of newfile's outputs.
func Repair(ctx context.Context, path, out string, o RepairOptions) (res repair.Result, err error) {
	o.Source.ReadOnly = true
	cow, err := source.OpenStore(path, o.Source)
	if err != nil {
		return res, err
	}
	defer cow.Close()
	p, err := o.plan(ctx, path, cow)
	if err != nil {
		return res, err
	}
	err = writeDevice(out, o.Force, []string{path}, p.Size(), func(dst *block.File) error { return p.Fresh(ctx, dst) })
	if err != nil {
		return res, err
	}
	return p.Result(out, true), nil
}

// RepairInPlace repairs the store of the COW device path itself, after the new file undo has what is overwritten, for [TakeBack].
// Errors are those of Repair; nothing was changed unless Saved was called.
func RepairInPlace(ctx context.Context, path, undo string, o RepairOptions) (res repair.Result, err error) {
	cow, err := source.OpenWhole(path, block.Options{})
	if err != nil {
		return res, err
	}
	p, err := o.plan(ctx, path, cow)
	if err != nil {
		return res, errors.Join(err, cow.Close())
	}
	changed, err := p.InPlace(ctx, o.saving(undo, path))
	if err := errors.Join(err, cow.Close()); err != nil {
		return res, block.WithPath(path, err)
	}
	return p.Result(path, changed), nil
}

func (o *RepairOptions) plan(ctx context.Context, path string, cow block.Device) (*repair.Plan, error) {
	p, err := repair.NewPlan(ctx, cow, repair.Options{ChunkSectors: o.ChunkSectors, Progress: o.Progress})
	return p, block.WithPath(path, err)
}

// saving writes the undo file of the store at path.
func (o *RepairOptions) saving(undo, path string) func(write func(io.Writer) error) error {
	return func(write func(io.Writer) error) error {
		opts := newfile.Options{Replace: o.Force, Inputs: []string{path}}
		err := newfile.Write(undo, opts, func(f *os.File) error { return write(f) })
		if err == nil && o.Saved != nil {
			o.Saved()
		}
		return err
	}
}

// RevalidateResult says what was marked valid.
type RevalidateResult struct {
	Path    string `json:"path"`  // of the valid store
	Bytes   int64  `json:"bytes"` // that it has
	Changed bool   `json:"changed"`
	Kept    int64  `json:"kept_bytes"` // of the snapshot that are certain

	of string // of a copy: the store
}

// WriteText writes the result for people.
func (r RevalidateResult) WriteText(w io.Writer) (err error) {
	if !r.Changed {
		_, err = fmt.Fprintf(w, "%s: is already valid; nothing was changed\n", r.Path)
		return err
	}
	if r.of == "" { // RepairOptions.Explain had the rest
		_, err = fmt.Fprintf(w, "%s: valid again\n", r.Path)
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n%s: a valid copy of %s\n", meaning(r.of, r.Kept), r.Path, r.of)
	return err
}

// meaning says what a store shows that was invalid and is valid again.
func meaning(path string, kept int64) string {
	return fmt.Sprintf("%s: %s are certain; all other ranges show the current content of the origin, and ranges that were "+
		"overwritten since the store became invalid can no longer be distinguished", path, bytesize.Text(kept))
}

// Revalidate writes a copy of the invalid store of path that is marked valid to the new file out: rescue.Revalidation says what that
// means. Errors: those of rescue.NewRevalidation, of opening and of newfile's outputs.
func Revalidate(ctx context.Context, path, out string, o RepairOptions) (res RevalidateResult, err error) {
	o.Source.ReadOnly = true
	cow, err := source.OpenStore(path, o.Source)
	if err != nil {
		return res, err
	}
	defer cow.Close()
	v, err := rescue.NewRevalidation(ctx, cow)
	if err == nil {
		err = writeDevice(out, o.Force, []string{path}, cow.Size(), func(dst *block.File) error { return v.Copy(ctx, dst) })
	}
	if err != nil {
		return res, block.WithPath(path, err)
	}
	return RevalidateResult{out, cow.Size(), true, v.KeptBytes(), path}, nil
}

// RevalidateInPlace marks the store of the COW device path itself valid, after the new file undo has what is overwritten, for
// [TakeBack]. Errors are those of Revalidate.
func RevalidateInPlace(ctx context.Context, path, undo string, o RepairOptions) (res RevalidateResult, err error) {
	cow, err := source.OpenWhole(path, block.Options{})
	if err != nil {
		return res, err
	}
	defer cow.Close()
	v, err := rescue.NewRevalidation(ctx, cow)
	changed := false
	if err == nil {
		save := o.saving(undo, path)
		changed, err = v.InPlace(ctx, func(write func(io.Writer) error) error {
			if err := save(write); err != nil || o.Explain == nil {
				return err
			}
			err := o.Explain(meaning(path, v.KeptBytes()))
			if err != nil {
				err = errors.Join(err, os.Remove(undo))
			}
			return err
		})
	}
	if err != nil {
		return res, block.WithPath(path, err)
	}
	return RevalidateResult{Path: path, Bytes: cow.Size(), Changed: changed, Kept: v.KeptBytes()}, nil
}
