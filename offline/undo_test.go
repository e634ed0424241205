package offline_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/snapshot"
)

var errStopped = errors.New("stopped by the test")

// mergePart does what a merge that is killed when it has merged so many chunks of a COW file leaves. It returns the errors
// of a merge that does not begin.
func (p *pair) mergePart(t *testing.T, cow string, chunks uint64, o offline.MergeOptions) error {
	t.Helper()
	ctx, cancel := context.WithCancelCause(t.Context())
	o.Progress = func(done, total int64) { cancel(errStopped) } // before the first step
	if _, err := offline.Merge(ctx, []string{p.origin, cow}, o); !errors.Is(err, errStopped) {
		return err
	}
	ctx, cancel = context.WithCancelCause(t.Context())
	origin, store := open(t, p.origin), open(t, cow)
	m := merge.Options{Window: 4096, Progress: func(s merge.Progress) {
		if s.MergedChunks >= chunks {
			cancel(errStopped)
		}
	}}
	files := []*block.File{store, origin}
	for _, path := range o.Siblings {
		f := open(t, path)
		files, m.Siblings = append(files, f), append(m.Siblings, merge.Sibling{Name: path, COW: f})
	}
	_, err := merge.Offline(ctx, origin, store, m)
	var closed []error
	for _, f := range files {
		closed = append(closed, f.Close())
	}
	if err := errors.Join(closed...); err != nil {
		t.Fatal(err)
	}
	if errors.Is(err, errStopped) {
		return nil
	}
	return err
}

// write writes to the snapshot on a COW file.
func (p *pair) write(t *testing.T, cow string, off int64, b []byte) {
	t.Helper()
	p.withStore(t, cow, func(s *snapshot.Snapshot) {
		if _, err := s.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	})
}

// wantRefused wants a merge to be refused for an incomplete one, with nothing changed.
func (p *pair) wantRefused(t *testing.T, cow string) {
	t.Helper()
	before, err := os.ReadFile(p.origin)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := offline.Merge(t.Context(), []string{p.origin, cow}, offline.MergeOptions{}); !errors.Is(err, merge.ErrUnfinished) {
		t.Errorf("merging %s: %v", filepath.Base(cow), err)
	}
	wantContent(t, p.origin, before)
}

func (p *pair) merge(t *testing.T, cow string, o offline.MergeOptions) {
	t.Helper()
	if _, err := offline.Merge(t.Context(), []string{p.origin, cow}, o); err != nil {
		t.Fatalf("merging %s: %v", filepath.Base(cow), err)
	}
}

func (p *pair) wantSideFile(t *testing.T, want bool) {
	t.Helper()
	if s, err := merge.ReadSideFile(p.origin); err != nil || (s != nil) != want {
		t.Fatalf("the side file is %v, %v", s, err)
	}
}

// newChunk is where the snapshot of a pair has no exception at first.
const newChunk = 40_960

// TestUndoStoreOfAnEarlierMerge: an undo store of a merge that is complete is not one of the next merge, also when that has not come
// to its end.
func TestUndoStoreOfAnEarlierMerge(t *testing.T) {
	p := newPair(t)
	undo := filepath.Join(p.dir, "undo.cow")
	p.merge(t, p.cow, offline.MergeOptions{Undo: undo})
	p.write(t, p.cow, newChunk, []byte("anew"))
	p.write(t, p.cow, 100*newChunk, []byte("anew"))
	if err := p.mergePart(t, p.cow, 1, offline.MergeOptions{}); err != nil {
		t.Fatal(err)
	}
	p.wantRefused(t, undo)
	p.merge(t, p.cow, offline.MergeOptions{})
	copy(p.shown[newChunk:], "anew")
	copy(p.shown[100*newChunk:], "anew")
	wantContent(t, p.origin, p.shown)
}

// TestUndoStoreThatLacksChunks: a merge is interrupted, its snapshot is written to, and the merge goes on with what the undo store does
// not have: that reverts it no more, but for what it has after a later undo store.
func TestUndoStoreThatLacksChunks(t *testing.T) {
	for _, second := range []bool{false, true} {
		p := newPair(t)
		undo, later := filepath.Join(p.dir, "undo.cow"), filepath.Join(p.dir, "later.cow")
		if err := p.mergePart(t, p.cow, 50, offline.MergeOptions{Undo: undo}); err != nil {
			t.Fatal(err)
		}
		mixture, err := os.ReadFile(p.origin)
		if err != nil {
			t.Fatal(err)
		}
		p.write(t, p.cow, newChunk, []byte("anew"))
		copy(p.shown[newChunk:], "anew")
		var lost []merge.LostUndo
		o := offline.MergeOptions{UndoLost: func(l merge.LostUndo) { lost = append(lost, l) }}
		if second {
			o.Undo = later
		}
		if err := p.mergePart(t, p.cow, 20, o); err != nil {
			t.Fatal(err)
		}
		p.wantRefused(t, undo)
		if second {
			if len(lost) != 0 {
				t.Errorf("lost: %v", lost)
			}
			p.merge(t, later, offline.MergeOptions{})
			wantContent(t, p.origin, mixture)
			p.wantSideFile(t, true)
			r, err := inspect.Disks(t.Context(), []string{p.origin}, inspect.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if m := r.Images[0].Merging; m == nil || !m.InPart || m.COW != later {
				t.Errorf("inspect: %+v", m)
			}
			p.wantRefused(t, p.cow) // what was reverted it does not have any more
			p.merge(t, undo, offline.MergeOptions{})
			wantContent(t, p.origin, p.old)
		} else {
			if len(lost) != 1 || lost[0].Path != undo {
				t.Errorf("lost: %v", lost)
			}
			// What it does not have is merged by now; that it has what is left does not make it the merge's again.
			if _, err := offline.Merge(t.Context(), []string{p.origin, p.cow}, offline.MergeOptions{Undo: undo}); !errors.Is(err, merge.ErrNotUndo) {
				t.Errorf("named again: %v", err)
			}
			p.merge(t, p.cow, offline.MergeOptions{})
			wantContent(t, p.origin, p.shown)
		}
		p.wantSideFile(t, false)
	}
}

// TestUndoStoreWithoutASideFile: where there is no side file, too, an undo store that a merge went on without is not accepted again.
func TestUndoStoreWithoutASideFile(t *testing.T) {
	p := newPair(t)
	long := filepath.Join(p.dir, strings.Repeat("n", 250)) // too long for a suffix
	if err := os.Rename(p.origin, long); err != nil {
		t.Fatal(err)
	}
	p.origin = long
	undo := filepath.Join(p.dir, "undo.cow")
	if err := p.mergePart(t, p.cow, 50, offline.MergeOptions{Undo: undo}); err != nil {
		t.Fatal(err)
	}
	if _, err := offline.Merge(t.Context(), []string{p.origin, p.cow}, offline.MergeOptions{DryRun: true, Undo: undo}); err != nil {
		t.Errorf("the same again: %v", err)
	}
	p.write(t, p.cow, newChunk, []byte("anew"))
	if err := p.mergePart(t, p.cow, 20, offline.MergeOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := offline.Merge(t.Context(), []string{p.origin, p.cow}, offline.MergeOptions{Undo: undo}); !errors.Is(err, merge.ErrNotUndo) {
		t.Errorf("named again: %v", err)
	}
	copy(p.shown[newChunk:], "anew")
	p.merge(t, p.cow, offline.MergeOptions{})
	wantContent(t, p.origin, p.shown)
}

// TestUndoStoreSomewhereElse: where an undo store is not found when the merge goes on, it is lost, and named by --undo it is not.
func TestUndoStoreSomewhereElse(t *testing.T) {
	for what, test := range map[string]struct {
		spoil   func(t *testing.T, undo, moved string)
		o       offline.MergeOptions
		refused error // going on
		lost    bool
	}{
		"as it was": {func(*testing.T, string, string) {}, offline.MergeOptions{}, nil, false},
		"moved":     {func(t *testing.T, undo, moved string) {}, offline.MergeOptions{Undo: "moved.cow"}, nil, false},
		"removed":   {func(t *testing.T, undo, moved string) { os.Remove(undo) }, offline.MergeOptions{}, nil, true},
		"replaced": {func(t *testing.T, undo, moved string) {
			if err := os.WriteFile(undo, make([]byte, 8192), 0o600); err != nil {
				t.Fatal(err)
			}
		}, offline.MergeOptions{}, nil, true},
		"another one made in its place": {func(t *testing.T, undo, moved string) { os.Remove(undo) }, offline.MergeOptions{Undo: "undo.cow"}, nil, false},
		"the merged store in its place": {func(t *testing.T, undo, moved string) {
			cow := filepath.Join(filepath.Dir(undo), "disk.cow")
			if err := os.Rename(cow, undo); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.Rename(undo, cow) })
		}, offline.MergeOptions{}, nil, true},
		"in use":        {hold, offline.MergeOptions{}, block.ErrInUse, false},
		"in use, force": {hold, offline.MergeOptions{Force: true}, nil, true},
	} {
		t.Run(what, func(t *testing.T) {
			p := newPair(t)
			undo, moved := filepath.Join(p.dir, "undo.cow"), filepath.Join(p.dir, "moved.cow")
			if err := p.mergePart(t, p.cow, 50, offline.MergeOptions{Undo: undo}); err != nil {
				t.Fatal(err)
			}
			content, err := os.ReadFile(undo)
			if err == nil {
				err = os.WriteFile(moved, content, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			test.spoil(t, undo, moved)
			lost := false
			o := test.o
			o.UndoLost = func(l merge.LostUndo) { lost = l.Path == undo }
			if o.Undo != "" {
				o.Undo = filepath.Join(p.dir, o.Undo)
			}
			if _, err := os.Stat(p.cow); err != nil {
				p.cow = undo
			}
			if err := p.mergePart(t, p.cow, 20, o); !errors.Is(err, test.refused) || lost != test.lost {
				t.Fatalf("going on: %v, lost %v", err, lost)
			}
			if test.lost {
				p.wantRefused(t, moved)
				p.merge(t, p.cow, offline.MergeOptions{})
				wantContent(t, p.origin, p.shown)
			} else {
				if o.Undo == undo {
					p.wantRefused(t, moved)
					p.merge(t, undo, offline.MergeOptions{})
				}
				p.merge(t, moved, offline.MergeOptions{})
				wantContent(t, p.origin, p.old)
			}
			p.wantSideFile(t, false)
		})
	}
}

// hold keeps an undo store in use until the test ends.
func hold(t *testing.T, undo, _ string) {
	f := open(t, undo)
	t.Cleanup(func() { f.Close() })
}

// TestUndoStoreAfterALiveMerge: a merge that went on in a server, where clients write to the disk, is not reverted by its undo store, which
// is refused for what is left of it, too.
func TestUndoStoreAfterALiveMerge(t *testing.T) {
	p := newPair(t)
	undo := filepath.Join(p.dir, "undo.cow")
	if err := p.mergePart(t, p.cow, 50, offline.MergeOptions{Undo: undo}); err != nil {
		t.Fatal(err)
	}
	w := &walk{pair: p, t: t, r: rand.New(rand.NewPCG(1, 1)), merging: p.cow}
	w.mergeLive()
	p.wantRefused(t, undo)
	if _, err := offline.Merge(t.Context(), []string{p.origin, p.cow}, offline.MergeOptions{Undo: undo}); !errors.Is(err, merge.ErrNotUndo) {
		t.Errorf("continued with it: %v", err)
	}
	p.merge(t, p.cow, offline.MergeOptions{})
	wantContent(t, p.origin, p.shown)
}

// TestUndoStoreAttachedToALiveMerge: an undo store that is a snapshot of the served disk keeps what clients overwrite, and takes the merge back;
// one that was made half-way leaves the origin as it was then, and the side file.
func TestUndoStoreAttachedToALiveMerge(t *testing.T) {
	for _, whole := range []bool{true, false} {
		p := newPair(t)
		undo := filepath.Join(p.dir, "undo0.cow")
		w := &walk{pair: p, t: t, r: rand.New(rand.NewPCG(1, 1)), merging: p.cow, ended: map[string]int{}}
		var o offline.MergeOptions
		want := p.old
		if whole {
			o.Undo = undo
		}
		if err := p.mergePart(t, p.cow, 50, o); err != nil {
			t.Fatal(err)
		}
		if !whole {
			want = w.origins()
			if err := p.mergePart(t, p.cow, 1, offline.MergeOptions{Undo: undo}); err != nil {
				t.Fatal(err)
			}
		}
		w.made = map[string][]byte{undo: want}
		w.mergeLive()
		p.merge(t, undo, offline.MergeOptions{})
		wantContent(t, p.origin, want)
		p.wantSideFile(t, !whole)
		checkStore(t, undo)
	}
}

// TestUndoStoreAfterALostOne: an undo store that is of use when a later one was merged is lost with that.
func TestUndoStoreAfterALostOne(t *testing.T) {
	p := newPair(t)
	first, second := filepath.Join(p.dir, "first.cow"), filepath.Join(p.dir, "second.cow")
	if err := p.mergePart(t, p.cow, 50, offline.MergeOptions{Undo: first}); err != nil {
		t.Fatal(err)
	}
	p.write(t, p.cow, newChunk, []byte("anew"))
	copy(p.shown[newChunk:], "anew")
	if err := p.mergePart(t, p.cow, 50, offline.MergeOptions{Undo: second}); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(second); err != nil {
		t.Fatal(err)
	}
	var lost []string
	if err := p.mergePart(t, p.cow, 20, offline.MergeOptions{UndoLost: func(l merge.LostUndo) { lost = append(lost, l.Path) }}); err != nil {
		t.Fatal(err)
	}
	if len(lost) != 2 || lost[0] != second || lost[1] != first {
		t.Errorf("lost: %v", lost)
	}
	p.wantRefused(t, first)
	p.merge(t, p.cow, offline.MergeOptions{})
	wantContent(t, p.origin, p.shown)
}

// TestMergeIntoARemoteDisk: what is only read is refused before its server is waited for.
func TestMergeIntoARemoteDisk(t *testing.T) {
	p := newPair(t)
	for _, origin := range []string{"nbd://192.0.2.1/disk", "oci://192.0.2.1/disk:1", "https://192.0.2.1/disk.img"} {
		began := time.Now()
		_, err := offline.Merge(t.Context(), []string{origin, p.cow}, offline.MergeOptions{})
		if !errors.Is(err, cowfile.ErrOnlyRead) || time.Since(began) > 5*time.Second {
			t.Errorf("%s: %v, after %v", origin, err, time.Since(began))
		}
	}
}

// TestUndoStoresInTurn: while one is being merged, a later one, which has less, is refused, and an older one is not.
func TestUndoStoresInTurn(t *testing.T) {
	for _, oldFirst := range []bool{true, false} {
		p := newPair(t)
		older, later := filepath.Join(p.dir, "older.cow"), filepath.Join(p.dir, "later.cow")
		for _, undo := range []string{older, later} {
			if err := p.mergePart(t, p.cow, 50, offline.MergeOptions{Undo: undo}); err != nil {
				t.Fatal(err)
			}
		}
		first := later
		if oldFirst {
			first = older
		}
		if err := p.mergePart(t, first, 10, offline.MergeOptions{}); err != nil {
			t.Fatal(err)
		}
		p.wantRefused(t, p.cow)
		if oldFirst {
			p.wantRefused(t, later)
		}
		p.merge(t, older, offline.MergeOptions{})
		wantContent(t, p.origin, p.old)
		p.wantSideFile(t, false)
	}
}

// A walk does random things with an origin, a snapshot and undo stores, as they are possible without force, and knows what the
// origin may hold when no side file says that it is a mixture.
type walk struct {
	*pair
	t    *testing.T
	r    *rand.Rand
	made map[string][]byte // undo stores, and what the origin held when they were made

	sibling string // another snapshot, which some merges preserve
	kept    []byte // what it has to show while merges do

	merging string // the COW file of the merge that is not complete; "": there is none
	before  []byte // what the origin held when it began
	live    bool   // clients have written to the origin since: it is never as before again
	ended   map[string]int
	log     []string
}

func (w *walk) origins() []byte {
	b, err := os.ReadFile(w.origin)
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

// view is what the snapshot on a COW file shows.
func (w *walk) view(cow string) (b []byte) {
	w.withStore(w.t, cow, func(s *snapshot.Snapshot) {
		b = make([]byte, s.Size())
		if _, err := s.ReadAt(b, 0); err != nil {
			w.t.Fatal(err)
		}
	})
	return b
}

// accepted reports whether a COW file belongs to the merge that is not complete.
func (w *walk) accepted(cow string) bool {
	half, err := merge.ReadSideFile(w.origin)
	if err != nil || half == nil {
		w.t.Fatal(half, err)
	}
	f := open(w.t, cow)
	defer f.Close()
	err = half.Check(f)
	if err != nil && !errors.Is(err, merge.ErrUnfinished) {
		w.t.Fatal(err)
	}
	return err == nil
}

// any returns one of the undo stores, or of those that belong to the merge that is not complete; "" where there is none.
func (w *walk) any(accepted bool) (undo string) {
	n := 0
	for i := range undoNames {
		path := filepath.Join(w.dir, fmt.Sprintf("undo%d.cow", i))
		if _, known := w.made[path]; known && (!accepted || w.accepted(path)) {
			if n++; w.r.IntN(n) == 0 {
				undo = path
			}
		}
	}
	return undo
}

// undoNames is how many undo stores there may be.
const undoNames = 4

// step does one thing.
func (w *walk) step() {
	switch w.r.IntN(9) {
	case 0, 1:
		w.merge(w.cow, w.part())
	case 2, 3, 4:
		if undo := w.any(w.merging != "" && w.r.IntN(2) == 0); undo != "" {
			w.merge(undo, w.part())
		}
	case 5, 6:
		w.write()
	case 7:
		if undo := w.any(false); undo != "" && undo != w.merging && w.r.IntN(2) == 0 {
			w.log = append(w.log, "remove "+filepath.Base(undo))
			os.Remove(undo)
			delete(w.made, undo)
		}
	case 8:
		w.mergeLive()
	}
}

// part is how many chunks a merge merges, of up to 64.
func (w *walk) part() uint64 {
	if w.r.IntN(4) == 0 {
		return 1 << 40
	}
	return uint64(1 + w.r.IntN(8))
}

// anyWrite is a write of some bytes, somewhere.
func (w *walk) anyWrite() (off int64, b []byte) {
	off, b = w.r.Int64N(int64(len(w.old))-4096), make([]byte, 1+w.r.IntN(4096))
	w.log = append(w.log, fmt.Sprintf("write %d bytes at %d", len(b), off))
	for i := range b {
		b[i] = byte(w.r.Uint32())
	}
	return off, b
}

// fill writes to the snapshot before there is any merge.
func (w *walk) fill() {
	w.withStore(w.t, w.cow, func(s *snapshot.Snapshot) {
		for range 24 {
			off, b := w.anyWrite()
			if _, err := s.WriteAt(b, off); err != nil {
				w.t.Fatal(err)
			}
		}
	})
}

// write writes to the snapshot, when it may be served.
func (w *walk) write() {
	if w.merging != "" && !w.accepted(w.cow) {
		return
	}
	off, b := w.anyWrite()
	w.pair.write(w.t, w.cow, off, b)
	if w.merging == w.cow {
		copy(w.shown[off:], b)
	}
}

// merge merges a part of a store, or all of it, with an undo store or without.
func (w *walk) merge(cow string, chunks uint64) {
	o, undo := offline.MergeOptions{}, ""
	now := w.origins()
	if w.r.IntN(2) == 0 {
		undo = filepath.Join(w.dir, fmt.Sprintf("undo%d.cow", w.r.IntN(undoNames)))
		o.Undo = undo
	}
	begins, shown := w.merging == "", []byte(nil)
	if begins {
		shown, w.kept = w.view(cow), w.view(w.sibling)
	}
	if w.r.IntN(3) > 0 {
		o.Siblings = []string{w.sibling}
	}
	empty := w.exceptions(cow) == 0
	err := w.mergePart(w.t, cow, chunks, o)
	complete := err == nil && w.exceptions(cow) == 0
	if complete { // the call that removes the side file
		_, err = offline.Merge(w.t.Context(), []string{w.origin, cow}, offline.MergeOptions{Siblings: o.Siblings})
	}
	w.log = append(w.log, fmt.Sprintf("merge %d of %s, undo %q: %v", chunks, filepath.Base(cow), filepath.Base(undo), err))
	if err != nil {
		if !errors.Is(err, merge.ErrUnfinished) && !errors.Is(err, merge.ErrNotUndo) && !errors.Is(err, os.ErrExist) && !isSameFile(err) {
			w.t.Fatal(err)
		}
		if !bytes.Equal(w.origins(), now) {
			w.t.Fatal("a merge was refused, and the origin changed")
		}
		return
	}
	if _, known := w.made[undo]; undo != "" && !known {
		if _, err := os.Stat(undo); err == nil {
			w.made[undo] = now
		}
	}
	if begins && !empty {
		w.merging, w.before, w.shown, w.live = cow, now, shown, false
	}
	w.look(cow)
}

func isSameFile(err error) bool {
	return bytes.Contains([]byte(err.Error()), []byte("is the same file as"))
}

func (w *walk) exceptions(cow string) uint64 {
	origin, f := open(w.t, w.origin), open(w.t, cow)
	defer origin.Close()
	defer f.Close()
	work, err := merge.Plan(origin, f)
	if err != nil {
		w.t.Fatal(err)
	}
	return work.Chunks
}

// mergeLive begins the merge of the snapshot in a server, beside clients that write to the origin. An undo store is attached,
// or none.
func (w *walk) mergeLive() {
	if w.merging != "" && !w.accepted(w.cow) {
		return
	}
	begins, now := w.merging == "", w.origins()
	if begins {
		w.kept = w.view(w.sibling)
	}
	origin, cow := open(w.t, w.origin), open(w.t, w.cow)
	o := snapshot.NewOrigin(origin)
	files := []*block.File{cow, origin}
	s, err := o.Attach(cow, snapshot.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	var others []*snapshot.Snapshot
	undo := ""
	if !begins {
		undo = w.any(true)
	}
	if undo != "" {
		if err := os.Truncate(undo, 2<<20); err != nil { // space for what clients overwrite
			w.t.Fatal(err)
		}
		f := open(w.t, undo)
		files = append([]*block.File{f}, files...)
		other, err := o.Attach(f, snapshot.Options{Store: snapshot.PersistentOverflow})
		if err != nil {
			w.t.Fatal(err)
		}
		others = append(others, other)
		w.log = append(w.log, "with "+filepath.Base(undo))
	}
	shown := make([]byte, s.Size())
	if _, err := s.ReadAt(shown, 0); err != nil {
		w.t.Fatal(err)
	}
	var side *merge.SideFile
	m, err := s.BeginMergeAfter(func() (err error) {
		side, err = merge.BeginLive(w.origin, w.cow, s, others, false)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	s.Close()
	if begins {
		w.merging, w.before, w.shown = w.cow, now, shown
	}
	w.live = true
	for range 2 {
		b := []byte("a client of the origin")
		off := w.r.Int64N(int64(len(w.old) - len(b)))
		if _, err := o.WriteAt(b, off); err != nil {
			w.t.Fatal(err)
		}
		copy(w.shown[off:], b)
	}
	_, err = m.Step(uint64(1 + w.r.IntN(6)))
	left := m.Store().Len()
	err = errors.Join(err, m.Close())
	for _, s := range others {
		err = errors.Join(err, s.Close())
	}
	if err == nil && left == 0 {
		err = side.End(w.origin)
	}
	for _, f := range files {
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.log = append(w.log, fmt.Sprintf("live, %d left", left))
	w.look(w.cow)
}

// look compares what the origin and the stores show with what they must. merged is the store that was merged last.
func (w *walk) look(merged string) {
	half, err := merge.ReadSideFile(w.origin)
	if err != nil {
		w.t.Fatal(err)
	}
	if w.merging == "" {
		if half != nil {
			w.t.Fatalf("nothing is being merged, and there is a side file: %+v", half)
		}
		return
	}
	now := w.origins()
	if half == nil {
		want, what := w.shown, "complete"
		if merged != w.merging {
			want, what = w.before, "taken back"
			if kept, known := w.made[merged]; w.live && known { // another snapshot of a live merge, which kept what that overwrote
				what = "taken back by a snapshot"
				if want = kept; !bytes.Equal(kept, w.before) {
					w.t.Fatalf("%s was made when the origin was a mixture, and that is not marked any more", filepath.Base(merged))
				}
			}
		}
		if !bytes.Equal(now, want) {
			w.t.Fatalf("%s by %s, and the origin is not what it must be", what, filepath.Base(merged))
		}
		w.ended[what]++
		if merged != w.merging { // what it had is lost
			w.fresh(w.merging)
		}
		w.merging = ""
		return
	}
	if w.accepted(w.merging) && !bytes.Equal(w.view(w.merging), w.shown) {
		w.t.Fatalf("%s is accepted, and shows something else", filepath.Base(w.merging))
	}
	if w.sibling != "" && w.accepted(w.sibling) {
		w.ended["sibling accepted"]++
		if !bytes.Equal(w.view(w.sibling), w.kept) {
			w.t.Fatal("the sibling is accepted, and shows something else")
		}
	}
	for undo, content := range w.made {
		if undo != w.merging && w.accepted(undo) && !bytes.Equal(w.view(undo), content) {
			w.t.Fatalf("%s is accepted, and does not show what the origin held", filepath.Base(undo))
		}
	}
}

// fresh replaces a COW file by an empty store, or removes an undo store.
func (w *walk) fresh(path string) {
	if err := os.Remove(path); err != nil {
		w.t.Fatal(err)
	}
	if path != w.cow {
		delete(w.made, path)
	} else if _, err := cowfile.Create(w.origin, path, cowfile.Options{}); err != nil {
		w.t.Fatal(err)
	}
}

// TestRandomMergesAndUndoStores: whatever is done with merges that are interrupted, their undo stores and the snapshot, offline and in
// a server, an origin without a side file holds what it held when the merge began, or what the snapshot showed when it ended; and
// a store that is accepted beside a side file shows what it has to.
func TestRandomMergesAndUndoStores(t *testing.T) {
	seeds := 100
	if testing.Short() {
		seeds = 16
	}
	if os.Getenv("DMSNAP_DEEP") != "" {
		seeds = 4000
	}
	var mu sync.Mutex
	ended := map[string]int{}
	t.Run("seeds", func(t *testing.T) { // which wait for the disk
		for seed := range uint64(seeds) {
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				t.Parallel()
				w := randomMerges(t, seed)
				mu.Lock()
				defer mu.Unlock()
				for how, n := range w.ended {
					ended[how] += n
				}
			})
		}
	})
	t.Logf("%v", ended)
	if ended["complete"] == 0 || ended["taken back"] == 0 || ended["sibling accepted"] == 0 {
		t.Error("all merges ended in the same way")
	}
}

func randomMerges(t *testing.T, seed uint64) *walk {
	dir := t.TempDir()
	w := &walk{pair: &pair{dir: dir, origin: filepath.Join(dir, "disk.img"), cow: filepath.Join(dir, "disk.cow")}, t: t, sibling: filepath.Join(dir, "sibling.cow"),
		r: rand.New(rand.NewPCG(seed, 16)), made: map[string][]byte{}, ended: map[string]int{}}
	w.old = make([]byte, 64*4096)
	for i := range w.old {
		w.old[i] = byte(w.r.Uint32())
	}
	if err := os.WriteFile(w.origin, w.old, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, cow := range []string{w.cow, w.sibling} {
		if _, err := cowfile.Create(w.origin, cow, cowfile.Options{Size: 2 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	defer func() {
		if t.Failed() {
			for _, line := range w.log {
				t.Log(line)
			}
		}
	}()
	w.fill()
	for range 16 {
		w.step()
	}
	checkStore(t, w.cow)
	checkStore(t, w.sibling)
	for undo := range w.made {
		checkStore(t, undo)
	}
	return w
}
