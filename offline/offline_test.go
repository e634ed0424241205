package offline_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
	"github.com/dmsnap/dmsnap/stream"
)

func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }

// A pair is a disk image with a COW file beside it. The store is checked when the test ends.
type pair struct {
	dir, origin, cow string
	old, shown       []byte // content of the origin, and of the snapshot
}

func newPair(t *testing.T) *pair {
	t.Helper()
	dir := t.TempDir()
	p := &pair{dir: dir, origin: filepath.Join(dir, "disk.img"), cow: filepath.Join(dir, "disk.cow"), old: blocktest.Pattern(8<<20, 1)}
	if err := os.WriteFile(p.origin, p.old, 0o600); err != nil {
		t.Fatal(err)
	}
	p.addStore(t, p.cow)
	p.shown = bytes.Clone(p.old)
	p.withStore(t, p.cow, func(s *snapshot.Snapshot) {
		for i := range 100 {
			b := blocktest.Pattern(9000, uint64(i+2))
			if _, err := s.WriteAt(b, int64(i)*80_000); err != nil {
				t.Fatal(err)
			}
			copy(p.shown[i*80_000:], b)
		}
	})
	return p
}

// addStore makes an empty store over the origin.
func (p *pair) addStore(t *testing.T, path string) {
	t.Helper()
	if _, err := cowfile.Create(p.origin, path, cowfile.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { checkStore(t, path) })
}

// withStore uses the snapshot on a COW file.
func (p *pair) withStore(t *testing.T, path string, use func(*snapshot.Snapshot)) {
	t.Helper()
	origin, cow := open(t, p.origin), open(t, path)
	s, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	use(s)
	if err := errors.Join(s.Close(), cow.Close(), origin.Close()); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, path string) *block.File {
	t.Helper()
	f, err := block.Open(path, block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// checkStore checks the store on a COW file.
func checkStore(t *testing.T, path string) {
	t.Helper()
	cow := open(t, path)
	defer cow.Close()
	if r, err := check.Run(context.Background(), cow, check.Options{}); err != nil || len(r.Findings) > 0 {
		t.Errorf("%s: %v, %+v", path, err, r)
	}
}

func wantContent(t *testing.T, path string, want []byte) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s has other content (%v)", path, err)
	}
}

// TestMergeAndBack: a merge with an undo store, and the merge of that, which restores the origin.
func TestMergeAndBack(t *testing.T) {
	p := newPair(t)
	undo := filepath.Join(p.dir, "undo.cow")
	plan, err := offline.Merge(t.Context(), []string{p.origin, p.cow}, offline.MergeOptions{DryRun: true, Undo: undo})
	if err != nil || plan.Chunks == 0 || !plan.DryRun {
		t.Fatalf("%+v, %v", plan, err)
	}
	wantContent(t, p.origin, p.old)
	res, err := offline.Merge(t.Context(), []string{p.origin, p.cow}, offline.MergeOptions{Undo: undo})
	if err != nil || res.Chunks != plan.Chunks || res.Bytes != plan.Bytes {
		t.Fatalf("%+v, %v; planned %+v", res, err, plan)
	}
	wantContent(t, p.origin, p.shown)
	checkStore(t, undo)
	if _, err := offline.Merge(t.Context(), []string{p.origin, undo}, offline.MergeOptions{}); err != nil {
		t.Fatal(err)
	}
	wantContent(t, p.origin, p.old)
	checkStore(t, undo)
}

// TestMergeInterrupted: a merge whose context ends says how it goes on, keeps other stores from the origin meanwhile, and is
// complete after the same call.
func TestMergeInterrupted(t *testing.T) {
	p := newPair(t)
	other := filepath.Join(p.dir, "other.cow")
	p.addStore(t, other)
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stopped by the test")
	_, err := offline.Merge(ctx, []string{p.origin, p.cow}, offline.MergeOptions{Progress: func(done, total int64) { cancel(stop) }})
	if !errors.Is(err, stop) || !strings.Contains(err.Error(), "run the merge again") {
		t.Fatalf("interrupted: %v", err)
	}
	if _, err := offline.Merge(t.Context(), []string{p.origin, other}, offline.MergeOptions{}); !errors.Is(err, merge.ErrUnfinished) {
		t.Errorf("another store: %v", err)
	}
	var others []string
	if _, err := offline.Merge(t.Context(), []string{p.origin, p.cow}, offline.MergeOptions{Others: func(_ string, paths []string) { others = paths }}); err != nil {
		t.Fatal(err)
	}
	wantContent(t, p.origin, p.shown)
	if len(others) != 1 || others[0] != other {
		t.Errorf("other snapshots: %v", others)
	}
	if _, err := offline.Merge(t.Context(), []string{p.origin, other}, offline.MergeOptions{}); err != nil {
		t.Errorf("another store, after the merge: %v", err)
	}
}

// TestSecondUndoStoreNotNoted: a merge is continued with another undo store, and killed when that is complete and not in the side file yet.
// It is no store of the merge then; the same call goes on.
func TestSecondUndoStoreNotNoted(t *testing.T) {
	p := newPair(t)
	first, second := filepath.Join(p.dir, "first.cow"), filepath.Join(p.dir, "second.cow")
	names, stop := []string{p.origin, p.cow}, errors.New("stopped by the test")
	origin, cow := open(t, p.origin), open(t, p.cow)
	writeUndo := func(path string) {
		work, err := merge.Plan(origin, cow)
		if err != nil {
			t.Fatal(err)
		}
		undo, err := block.Create(path, work.UndoBytes)
		if err == nil {
			err = errors.Join(merge.WriteUndo(t.Context(), origin, cow, undo, merge.Options{}), undo.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	writeUndo(first)
	if _, err := merge.Begin(p.origin, p.cow, cow, nil, nil, false); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	_, err := merge.Offline(ctx, origin, cow, merge.Options{Window: 4096, Progress: func(s merge.Progress) {
		if s.MergedChunks > s.TotalChunks/2 {
			cancel(stop)
		}
	}})
	if !errors.Is(err, stop) {
		t.Fatalf("interrupted: %v", err)
	}
	writeUndo(second)
	if err := errors.Join(cow.Close(), origin.Close()); err != nil {
		t.Fatal(err)
	}
	mixture, err := os.ReadFile(p.origin)
	if err != nil || bytes.Equal(mixture, p.old) || bytes.Equal(mixture, p.shown) {
		t.Fatalf("the merge was not interrupted midway, or %v", err)
	}
	if _, err := offline.Merge(t.Context(), []string{p.origin, second}, offline.MergeOptions{}); !errors.Is(err, merge.ErrUnfinished) {
		t.Errorf("the undo store that is not noted: %v", err)
	}
	wantContent(t, p.origin, mixture)

	if _, err := offline.Merge(t.Context(), names, offline.MergeOptions{Undo: second}); err != nil {
		t.Fatal(err)
	}
	wantContent(t, p.origin, p.shown)
	if _, err := offline.Merge(t.Context(), []string{p.origin, second}, offline.MergeOptions{}); err != nil {
		t.Fatal(err)
	}
	wantContent(t, p.origin, mixture)
	checkStore(t, first)
	checkStore(t, second)
}

// TestMergeKeepsASibling: another snapshot of the origin shows after the merge what it showed before.
func TestMergeKeepsASibling(t *testing.T) {
	p := newPair(t)
	sibling := filepath.Join(p.dir, "sibling.cow")
	p.addStore(t, sibling)
	res, err := offline.Merge(t.Context(), []string{p.origin, p.cow}, offline.MergeOptions{Siblings: []string{sibling}})
	if err != nil || len(res.Siblings) != 1 || res.Siblings[0].Chunks == 0 || len(res.Others) != 0 {
		t.Fatalf("%+v, %v", res, err)
	}
	p.withStore(t, sibling, func(s *snapshot.Snapshot) {
		got := make([]byte, s.Size())
		if _, err := s.ReadAt(got, 0); err != nil || !bytes.Equal(got, p.old) {
			t.Errorf("the sibling shows something else (%v)", err)
		}
	})
}

// sent is the stream of what the snapshot changed.
func (p *pair) sent(t *testing.T) []byte {
	t.Helper()
	origin, cow := open(t, p.origin), open(t, p.cow)
	defer origin.Close()
	defer cow.Close()
	st, err := store.OpenToRead(cow)
	if err != nil {
		t.Fatal(err)
	}
	from, err := stream.Between(origin, nil, st)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := stream.Send(t.Context(), &b, from, stream.SendOptions{}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestReceive: into a copy, with an undo store that takes it back; as a store over the copy; and into a disk that is another one.
func TestReceive(t *testing.T) {
	p := newPair(t)
	text := p.sent(t)
	replica, undo, cow := filepath.Join(p.dir, "copy.img"), filepath.Join(p.dir, "undo.cow"), filepath.Join(p.dir, "new.cow")
	if err := os.WriteFile(replica, p.old, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := offline.Receive(t.Context(), bytes.NewReader(text), replica, offline.ReceiveOptions{Check: true})
	if err != nil || got.Differs != 0 || got.Data == 0 {
		t.Fatalf("check: %+v, %v", got, err)
	}
	if _, err := offline.Receive(t.Context(), bytes.NewReader(text), "", offline.ReceiveOptions{Origin: replica, COW: cow, ChunkSectors: 8}); err != nil {
		t.Fatal(err)
	}
	wantContent(t, replica, p.old)
	checkStore(t, cow)
	again := func() (io.Reader, error) { return bytes.NewReader(text), nil }
	if got, err = offline.Receive(t.Context(), bytes.NewReader(text), replica, offline.ReceiveOptions{Again: again, Undo: undo}); err != nil || got.Written == 0 {
		t.Fatalf("%+v, %v", got, err)
	}
	wantContent(t, replica, p.shown)
	if got, err = offline.Receive(t.Context(), bytes.NewReader(text), replica, offline.ReceiveOptions{}); err != nil || got.Written != 0 || got.Present == 0 {
		t.Errorf("repeated: %+v, %v", got, err)
	}
	if _, err := offline.Merge(t.Context(), []string{replica, undo}, offline.MergeOptions{}); err != nil {
		t.Fatal(err)
	}
	wantContent(t, replica, p.old)
	checkStore(t, undo)

	foreign := blocktest.Pattern(len(p.old), 99)
	if err := os.WriteFile(replica, foreign, 0o600); err != nil {
		t.Fatal(err)
	}
	var mismatch *stream.MismatchError
	if _, err := offline.Receive(t.Context(), bytes.NewReader(text), replica, offline.ReceiveOptions{}); !errors.As(err, &mismatch) {
		t.Errorf("another disk: %v", err)
	}
	wantContent(t, replica, foreign)
}
