package offline

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/source"
)

// MergeOptions are the options of [Merge]. The zero value is usable.
type MergeOptions struct {
	DryRun   bool     // plan, and write nothing
	Force    bool     // continue over an incomplete merge of another store, use files that are mounted, replace Undo
	Undo     string   // the undo store, a file; empty: there is none
	Siblings []string // COW devices of other snapshots of the origin, which are preserved
	Raw      bool     // the bytes of the origin are the disk, whatever they look like
	PVs      []string // further disks with physical volumes of the volume group

	// Others is called, before anything is written, with stores that may be other snapshots of the origin and are not
	// preserved. NoSideFile is called when nothing but the store will show that an interrupted merge is incomplete. UndoLost is called
	// with an undo store of an earlier part of this merge, which does not have what is overwritten from now on.
	Others     func(origin string, paths []string)
	NoSideFile func(origin string, err error)
	UndoLost   func(merge.LostUndo)
	// UndoProgress and Progress are called with bytes done and in total, of the undo store and of the merge.
	UndoProgress, Progress func(done, total int64)
}

// MergeResult says what was merged, or would be.
type MergeResult struct {
	DryRun       bool   `json:"dry_run"`
	ChunkSectors uint32 `json:"chunk_sectors"`
	Chunks       uint64 `json:"chunks"`         // exceptions to merge
	Runs         uint64 `json:"runs"`           // consecutive on both sides
	Bytes        int64  `json:"bytes"`          // to copy to the origin
	Ranges       uint64 `json:"ranges"`         // ranges of the origin that are overwritten
	UndoBytes    int64  `json:"undo_bytes"`     // size of an undo store
	Undo         string `json:"undo,omitempty"` // its path

	Siblings []Sibling `json:"siblings,omitempty"`        // other snapshots that preserve what is overwritten
	Others   []string  `json:"other_snapshots,omitempty"` // stores in the same folder that do not

	Origin string `json:"-"` // its name
	COW    string `json:"-"`
}

// A Sibling is another snapshot of the origin of a merge.
type Sibling struct {
	COW     string `json:"cow"`
	Invalid bool   `json:"invalid,omitempty"` // there is nothing to preserve
	Chunks  uint64 `json:"chunks"`            // to preserve
	Free    uint64 `json:"free_chunks"`       // that there is space for
}

// WriteText writes the result for people.
func (r MergeResult) WriteText(w io.Writer) error {
	what := fmt.Sprintf("%d chunks in %d runs, %s", r.Chunks, r.Runs, bytesize.Text(r.Bytes))
	preserved := "preserved %d chunks, with space for %d before"
	var err error
	if r.DryRun {
		preserved = "is to preserve %d chunks, with space for %d"
		_, err = fmt.Fprintf(w, "%s: to merge: %s; %d ranges of %s are overwritten; an undo store takes %s\n", r.COW, what,
			r.Ranges, r.Origin, bytesize.Text(r.UndoBytes))
	} else {
		_, err = fmt.Fprintf(w, "%s: merged %s\n", r.COW, what)
	}
	for _, s := range r.Siblings {
		text := "is invalid: there is nothing to preserve"
		if !s.Invalid {
			text = fmt.Sprintf(preserved, s.Chunks, s.Free)
		}
		if err == nil {
			_, err = fmt.Fprintf(w, "%s: %s\n", s.COW, text)
		}
	}
	return err
}

// Merge merges a snapshot into its origin: names are ORIGIN and COW, or the address of a snapshot volume, whose origin and
// other snapshots are found.
//
// With an undo store, the merge begins when that is complete and durable. While the merge is incomplete a side file beside the
// origin says so (merge.Begin). A merge that ended early is continued by the same call. After an error before the merge began
// nothing was changed.
//
// Errors: merge.ErrUnfinished; merge.ErrNotUndo; lvm.ErrActive; those of opening, and of merge.Prepare, merge.Prepared.PlanSiblings and
// merge.Offline.
func Merge(ctx context.Context, names []string, o MergeOptions) (MergeResult, error) {
	in, err := openMerge(names, o)
	if err != nil {
		return MergeResult{}, err
	}
	res := MergeResult{DryRun: o.DryRun, Undo: o.Undo, Origin: in.originName, COW: in.cowName}
	work, err := o.merge(ctx, in, &res)
	if err := errors.Join(err, block.WithPath(in.cowName, in.Close())); err != nil {
		return res, err
	}
	res.ChunkSectors, res.Chunks, res.Runs, res.Ranges = work.ChunkSectors, work.Chunks, work.Runs, work.Ranges
	res.Bytes, res.UndoBytes = work.Bytes, work.UndoBytes
	return res, nil
}

func (o *MergeOptions) merge(ctx context.Context, in *mergeInputs, res *MergeResult) (merge.Work, error) {
	cow := in.cow
	if o.DryRun {
		cow = block.KeepCache(cow)
	}
	prepared, err := merge.Prepare(in.origin, cow)
	if err != nil {
		return merge.Work{}, block.WithPath(in.cowName, err)
	}
	defer prepared.Close() // the errors of what it wrote are Run's
	work := prepared.Work()
	if err := in.planSiblings(o.Undo, res, prepared); err != nil {
		return work, err
	}
	half, err := o.sideFile(in.files[0], in.cow)
	if err != nil {
		return work, block.WithPath(in.cowName, err)
	}
	if o.DryRun {
		if err := o.checkUndo(in); err != nil {
			return work, err
		}
		o.sayOthers(res)
		return work, nil
	}
	var begun *merge.SideFile
	if half != nil {
		// An undo store that is merged is known by a label that making an undo store of its own replaces: it is noted before.
		if err := o.checkUndo(in); err != nil {
			return work, err
		}
		if begun, err = o.begin(in, nil); err != nil {
			return work, err
		}
	}
	var undo *merge.UndoStore
	if o.Undo != "" {
		kept, err := o.keep(ctx, in, work.UndoBytes)
		if err != nil {
			if begun != nil {
				err = errors.Join(err, begun.Cancel(in.files[0]))
			}
			return work, err
		}
		defer kept.Close() // nothing is written to it
		undo = &merge.UndoStore{Path: o.Undo, Device: kept}
	}
	if half == nil && work.Chunks > 0 {
		if begun, err = o.begin(in, undo); err != nil {
			return work, err
		}
	}
	var completed func() error
	if begun != nil {
		if err := o.continueUndo(in, begun, prepared, undo); err != nil {
			return work, errors.Join(err, begun.Cancel(in.files[0]))
		}
		completed = func() error { return block.WithPath(in.files[0], begun.End(in.files[0])) }
	}
	o.sayOthers(res)
	err = prepared.Run(ctx, merge.Options{Siblings: in.siblings, Completed: completed, Progress: report(o.Progress)})
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w; nothing is lost: run the merge again to continue", err)
	}
	return work, block.WithPath(in.cowName, err)
}

// report returns the progress function of a merge.
func report(progress func(done, total int64)) func(merge.Progress) {
	if progress == nil {
		return nil
	}
	return func(p merge.Progress) { progress(p.MergedBytes(), p.TotalBytes()) }
}

// sideFile returns the side file that an earlier part of this merge has left beside the origin, or nil. One of another
// merge refuses this one, unless forced.
func (o *MergeOptions) sideFile(originPath string, cow block.Device) (*merge.SideFile, error) {
	half, err := merge.ReadSideFile(originPath)
	if err == nil && half != nil {
		err = half.Check(cow)
	}
	if o.Force && errors.Is(err, merge.ErrUnfinished) {
		return nil, nil
	}
	return half, err
}

// continueUndo records in the side file of a merge that had begun which undo stores revert it from now on.
func (o *MergeOptions) continueUndo(in *mergeInputs, begun *merge.SideFile, prepared *merge.Prepared, undo *merge.UndoStore) error {
	if err := begun.Continue(in.files[0], prepared, undo, o.Force); err != nil {
		return err
	}
	for _, l := range begun.Lost() {
		if o.UndoLost != nil {
			o.UndoLost(l)
		}
	}
	return nil
}

// begin writes the side file, or returns nil if none can be made. undo is nil, or the undo store of a merge that begins.
func (o *MergeOptions) begin(in *mergeInputs, undo *merge.UndoStore) (*merge.SideFile, error) {
	begun, err := merge.Begin(in.files[0], in.cowName, in.cow, in.siblings, undo, o.Force)
	if errors.Is(err, merge.ErrNoSideFile) {
		if o.NoSideFile != nil {
			o.NoSideFile(in.originName, err)
		}
		return nil, nil
	}
	return begun, block.WithPath(in.cowName, err)
}

// sayOthers reports other snapshots of the origin that may be there.
func (o *MergeOptions) sayOthers(res *MergeResult) {
	if len(res.Others) > 0 && o.Others != nil {
		o.Others(res.Origin, res.Others)
	}
}

// planSiblings notes what the siblings have to preserve, and which other snapshots of the origin may be there. The undo store
// has what is overwritten.
func (in *mergeInputs) planSiblings(undo string, res *MergeResult, prepared *merge.Prepared) error {
	plan, err := prepared.PlanSiblings(in.siblings)
	if err != nil {
		return block.WithPath(in.cowName, err)
	}
	for _, s := range plan {
		res.Siblings = append(res.Siblings, Sibling{COW: s.Name, Invalid: s.Invalid, Chunks: s.Chunks, Free: s.Free})
	}
	if prepared.Work().Chunks == 0 {
		return nil
	}
	folders := make([]string, len(in.files))
	for i, file := range in.files {
		folders[i] = filepath.Dir(file)
	}
	kept, err := os.Stat(undo)
	for _, path := range merge.VisibleSiblings(in.origin, in.cow, folders, in.siblings...) {
		if other, statErr := os.Stat(path); err != nil || statErr != nil || !os.SameFile(kept, other) {
			res.Others = append(res.Others, path)
		}
	}
	return nil
}

// options are those of opening an origin and its store.
func (o *MergeOptions) options() source.Options {
	return source.Options{ReadOnly: o.DryRun, Used: o.Force, Raw: o.Raw, PVs: o.PVs, Incomplete: true}
}
