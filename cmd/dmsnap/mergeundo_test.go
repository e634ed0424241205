package main

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/snapshot"
)

// withContent gives the origin of a pair whose exceptions are whole chunks content of its own.
func (p pair) withContent(t *testing.T) []byte {
	t.Helper()
	info, err := os.Stat(p.origin)
	if err != nil {
		t.Fatal(err)
	}
	content := blocktest.Pattern(int(info.Size()), 77)
	writeFile(t, p.origin, content)
	return content
}

// view is what a store shows, read without the verbs.
func (p pair) view(t *testing.T, cowPath string) []byte {
	t.Helper()
	origin, cow := openFile(t, p.origin, true), openFile(t, cowPath, true)
	snap, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	b := readAll(t, snap)
	if err := errors.Join(snap.Close(), cow.Close(), origin.Close()); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestMergeUndo(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	before := readFile(t, p.origin)
	undo := filepath.Join(p.dir, "before.cow")
	files := digests(t, p.dir)
	plan := mustJSON[offline.MergeResult](t, "merge", "-n", p.origin, p.cow, "--undo", undo)
	if !plan.DryRun || plan.Undo != undo || plan.UndoBytes == 0 {
		t.Errorf("dry run: %+v", plan)
	}
	wantSame(t, p.dir, files)
	out := mustRun(t, "merge", p.origin, p.cow, "--undo", undo)
	if !strings.Contains(out, "to undo the merge: dmsnap merge "+p.origin+" "+undo) {
		t.Errorf("it said %q", out)
	}
	wantContent(t, p.origin, shown)
	if info, err := os.Stat(undo); err != nil || info.Size() != plan.UndoBytes {
		t.Errorf("undo store: %v, %v; planned %d bytes", info, err, plan.UndoBytes)
	}
	if said := mustRun(t, "check", undo, "--origin", p.origin); strings.Count(said, "\n") != 1 {
		t.Errorf("check of the undo store said %q", said)
	}
	for range 2 { // complete, and asked for once more: nothing to do, nothing changed
		files = digests(t, p.dir)
		if res := mustJSON[offline.MergeResult](t, "merge", p.origin, p.cow, "--undo", undo); res.Chunks != 0 || res.Undo != undo {
			t.Errorf("once more: %+v", res)
		}
		mustRun(t, "merge", "-n", p.origin, p.cow, "--undo", undo)
		wantSame(t, p.dir, files)
	}
	if got := mustRun(t, "export", p.origin, undo, "-"); got != string(before) {
		t.Error("the undo store does not show the origin as it was")
	}
	mustRun(t, "merge", p.origin, undo)
	wantContent(t, p.origin, before)
}

// What must not be used or written over is refused with a reason, and nothing is touched.
func TestMergeUndoRefuses(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	undo := filepath.Join(p.dir, "undo.cow")
	refused := func(path string, words ...string) {
		t.Helper()
		files := digests(t, p.dir)
		for _, more := range [][]string{nil, {"--dry-run"}} {
			dmsnap(append([]string{"merge", p.origin, p.cow, "--undo", path}, more...)...).wantRefused(t, append(words, path)...)
		}
		wantSame(t, p.dir, files)
	}
	refused(p.origin, "is the same file as")
	refused(p.cow, "is the same file as")
	refused(p.dir, "is a directory")
	writeFile(t, undo, []byte("something precious"))
	refused(undo, "not the undo store of this merge", "--force")
	os.Remove(undo)
	mustRun(t, "create", p.origin, undo)
	refused(undo, "not made by a merge", "choose another name")

	held := openFile(t, undo, true)
	files := digests(t, p.dir)
	dmsnap("merge", p.origin, p.cow, "--undo", undo, "--force").wantRefused(t, undo, "in use")
	wantSame(t, p.dir, files)
	held.Close()
	dmsnap("merge", "--control", p.dir, "--force").wantRefused(t, "offline")
	dmsnap("merge", "--control", "socket", "--undo", undo).wantRefused(t, "offline")

	// With --force it is replaced; what belongs to the merge is not, even then.
	mustRun(t, "merge", p.origin, p.cow, "--undo", undo, "--force")
	kept := digest(readFile(t, undo))
	mustRun(t, "merge", p.origin, p.cow, "--undo", undo, "--force")
	if digest(readFile(t, undo)) != kept {
		t.Error("--force replaced the undo store of this very merge")
	}
	// The next merge of the same store has another undo store.
	origin, cow := openFile(t, p.origin, true), openFile(t, p.cow, false)
	snap, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	writeAt(t, snap, []byte("anew"), 0)
	if err := errors.Join(snap.Close(), cow.Close(), origin.Close()); err != nil {
		t.Fatal(err)
	}
	refused(undo, "there may be new writes")
}

// The undo store is locked during the merge, like the other two.
func TestMergeUndoIsLocked(t *testing.T) {
	p, _ := bigPair(t)
	undo, tried := filepath.Join(p.dir, "undo.cow"), 0
	_, err := offline.Merge(t.Context(), []string{p.origin, p.cow}, offline.MergeOptions{Undo: undo, Progress: func(int64, int64) {
		tried++
		for _, path := range []string{undo, p.origin, p.cow} {
			if _, err := block.Open(path, block.Options{}); !errors.Is(err, block.ErrInUse) {
				t.Errorf("%s, another writer: %v", path, err)
			}
		}
	}})
	if err != nil || tried == 0 {
		t.Errorf("%v, after %d calls", err, tried)
	}
}

// Killed at any moment and started again with the same words, a merge with --undo ends, and until the undo
// store has its name the origin is untouched; from then on it shows what the origin held.
func TestMergeUndoKilledAtAnyMoment(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	p, shown := bigPair(t)
	before := p.withContent(t)
	undo := filepath.Join(p.dir, "undo.cow")
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	kills, named := 0, 0
	for delay := 16 * time.Millisecond; ; delay += delay / 2 {
		m := launch(t, "merge", p.origin, p.cow, "--undo", undo)
		time.Sleep(delay/2 + time.Duration(r.Int64N(int64(delay)))) // a moment is what this test is about
		m.Process.Kill()
		status := m.end(t)
		if status != -1 && status != exitDone {
			t.Fatalf("merge: status %d, %s", status, &m.stderr)
		}
		if _, err := os.Stat(undo); errors.Is(err, fs.ErrNotExist) {
			wantContent(t, p.origin, before)
		} else if !bytes.Equal(p.view(t, undo), before) {
			t.Fatalf("killed after %v: the undo store does not show the origin as it was", delay)
		} else if status == -1 {
			if named++; named == 1 {
				delay = 16 * time.Millisecond // what is left takes less time
			}
		}
		if !bytes.Equal(p.view(t, p.cow), shown) {
			t.Fatalf("killed after %v: the snapshot shows something else", delay)
		}
		if status == exitDone {
			break
		}
		kills++
	}
	t.Logf("%d kills, %d of them when the undo store was there", kills, named)
	if kills == 0 {
		t.Error("it was never killed in time")
	}
	wantContent(t, p.origin, shown)
	// Taken back, killed too.
	for delay := 16 * time.Millisecond; ; delay += delay / 2 {
		m := launch(t, "merge", p.origin, undo)
		time.Sleep(delay)
		m.Process.Kill()
		status := m.end(t)
		if !bytes.Equal(p.view(t, undo), before) {
			t.Fatalf("taking back killed after %v: the undo store shows something else", delay)
		}
		if status == exitDone {
			break
		}
	}
	wantContent(t, p.origin, before)
	left, err := filepath.Glob(filepath.Join(p.dir, ".undo.cow.*"))
	if err != nil || len(left) > kills {
		t.Errorf("%d temporary files of %d kills, %v", len(left), kills, err)
	}
}

// A file system that is too small for the undo store: nothing is merged, nothing is left.
func TestMergeUndoWithoutRoom(t *testing.T) {
	p, shown := bigPair(t)
	before := p.withContent(t)
	dir := testhost.Mount(t, "tmpfs", "tmpfs", "size=16m")
	files := digests(t, p.dir)
	dmsnap("merge", p.origin, p.cow, "--undo", filepath.Join(dir, "undo.cow")).wantRefused(t, "no space left on device", "did not begin")
	wantSame(t, p.dir, files)
	wantContent(t, p.origin, before)
	mustRun(t, "merge", p.origin, p.cow, "--undo", filepath.Join(p.dir, "undo.cow"))
	wantContent(t, p.origin, shown)
}

// A live merge is taken back by a snapshot of the origin that was made before it.
func TestLiveMergeTakenBack(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	before := readFile(t, p.origin)
	r := start(t, p, serveOptions{exportOrigin: true}, "disk="+p.cow)
	mustRun(t, "snapshot", "--control", r.control, "before", filepath.Join(p.dir, "before.cow"), "--create")
	for _, step := range []struct {
		merge string
		want  []byte
	}{{"disk", shown}, {"before", before}} {
		mustRun(t, "merge", "--control", r.control, step.merge, "--wait")
		if !bytes.Equal(readAll(t, r.Origin()), step.want) {
			t.Errorf("after the merge of %s the origin shows something else", step.merge)
		}
	}
	r.stop()
	wantContent(t, p.origin, before)
}
