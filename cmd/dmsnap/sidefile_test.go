package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/merge"
)

// halfMerged merges p and kills that when it has written its side file and is not complete. A merge that was faster is
// taken back and begun again.
func halfMerged(t *testing.T, p pair, more ...string) {
	t.Helper()
	before := folderContent(t, p.dir)
	for delay := 4 * time.Millisecond; delay > 100*time.Microsecond; delay /= 2 {
		m := launch(t, append([]string{"merge", p.origin, p.cow}, more...)...)
		begun := func() bool {
			s, err := merge.ReadSideFile(p.origin)
			if err != nil || s == nil || s.COW() != p.cow {
				return false
			}
			text, err := os.ReadFile(s.Path())
			return err == nil && (len(more) == 0 || strings.Contains(string(text), `"undo"`)) // the undo store is noted a moment later
		}
		for end := time.Now().Add(30 * time.Second); !begun() && time.Now().Before(end) && syscall.Kill(m.Process.Pid, 0) == nil; {
			time.Sleep(100 * time.Microsecond)
		}
		time.Sleep(delay) // a moment is what this is about
		m.Process.Kill()
		if m.end(t) != exitDone && begun() {
			return
		}
		for path := range folderContent(t, p.dir) {
			os.Remove(path)
		}
		for path, b := range before {
			writeFile(t, path, b)
		}
	}
	t.Fatal("no merge was killed in time")
}

// folderContent returns the files in a folder, by their paths.
func folderContent(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		path := filepath.Join(dir, e.Name())
		if files[path], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// mergingBeside is what inspect shows of the merge into an origin, whatever the origin holds.
func mergingBeside(t *testing.T, origin string) *inspect.Merging {
	t.Helper()
	var i inspect.Inspection
	if o := dmsnap("inspect", origin, "--json"); o.status == exitTrouble {
		t.Fatalf("inspect: %s", o.stderr)
	} else if err := json.Unmarshal([]byte(o.out), &i); err != nil {
		t.Fatal(err)
	}
	text := dmsnap("inspect", origin).out
	if i.Merging != nil != strings.Contains(text, ".merging") {
		t.Errorf("inspect as text: %s", text)
	}
	return i.Merging
}

// A killed offline merge leaves a side file: the origin is refused with any other COW, and taken with the same one,
// also when that was moved; at the end the side file is gone.
func TestMergeKilledLeavesASideFile(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	p, shown := bigPair(t)
	other := filepath.Join(p.dir, "other.cow")
	mustRun(t, "create", p.origin, other)
	halfMerged(t, p)
	if m := mergingBeside(t, p.origin); m == nil || m.COW != p.cow || m.SideFile != p.origin+".merging" {
		t.Errorf("inspect: %+v", m)
	}
	moved := filepath.Join(p.dir, "moved.cow")
	if err := os.Rename(p.cow, moved); err != nil {
		t.Fatal(err)
	}
	files := digests(t, p.dir)
	dmsnap("merge", p.origin, other).wantRefused(t, "not complete", p.cow, ".merging", "--force")
	dmsnap("merge", "-n", p.origin, other).wantRefused(t, "not complete", p.cow)
	dmsnap("serve", p.origin, other).wantRefused(t, "not complete", p.cow, "--force")
	dmsnap("serve", p.origin).wantRefused(t, "not complete", p.cow, "--force") // would make one
	dmsnap("serve", p.origin, p.cow, "--store", "N", "--create").wantRefused(t, "not complete", "--force")
	wantSame(t, p.dir, files)
	mustRun(t, "merge", p.origin, moved, "--sibling", other)
	wantContent(t, p.origin, shown)
	if s, err := merge.ReadSideFile(p.origin); s != nil || err != nil {
		t.Errorf("after the merge: %v, %v", s, err)
	}
	mustRun(t, "merge", p.origin, other, "--sibling", moved)
}

// An undo store takes back a merge that was killed, without force, and the side file goes when the origin is whole.
func TestKilledMergeTakenBack(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	p, _ := bigPair(t)
	before := p.withContent(t)
	undo, again := filepath.Join(p.dir, "undo.cow"), filepath.Join(p.dir, "again.cow")
	halfMerged(t, p, "--undo", undo)
	if _, err := os.Stat(undo); err != nil {
		t.Fatal(err)
	}
	halfBack := p
	halfBack.cow = undo
	halfMerged(t, halfBack, "--undo", again)
	if m := mergingBeside(t, p.origin); m == nil || m.COW != undo || !m.TakingBack {
		t.Errorf("inspect: %+v", m)
	}
	dmsnap("merge", p.origin, p.cow).wantRefused(t, "not complete", undo)
	mustRun(t, "merge", p.origin, undo, "--undo", again)
	wantContent(t, p.origin, before)
	if m := mergingBeside(t, p.origin); m != nil {
		t.Errorf("inspect afterwards: %+v", m)
	}
}

// While a merge is not complete nothing is read over the origin, made over it or written to it but with the stores of the merge. rescue reads it, and
// says so.
func TestMixtureIsRefused(t *testing.T) {
	p, shown := bigPair(t)
	before := p.withContent(t)
	other, undo, stream := filepath.Join(p.dir, "other.cow"), filepath.Join(p.dir, "undo.cow"), filepath.Join(p.dir, "stream")
	mustRun(t, "create", p.origin, other)
	mustRun(t, "send", p.origin, other, "--output", stream)
	halfMerged(t, p, "--undo", undo)
	out, socket := filepath.Join(p.dir, "out"), filepath.Join(p.dir, "socket")
	files := digests(t, p.dir)
	for _, args := range [][]string{
		{"export", p.origin, other, out},
		{"export", "--format", "qcow2", p.origin, other, out},
		{"diff", p.origin, other, p.cow},
		{"diff", p.origin, p.cow, other},
		{"send", p.origin, other, "--output", out},
		{"send", p.origin, p.cow, "--since", other, "--output", out},
		{"send", p.origin, "--output", out},
		{"push", p.origin, "localhost:1/disk"},
		{"push", p.origin, other, "localhost:1/disk"},
		{"compact", other, out, "--origin", p.origin},
		{"create", p.origin, out},
		{"receive", stream, "--origin", p.origin, "--cow", out},
		{"receive", stream, p.origin},
		{"receive", stream, p.origin, "--undo", out},
		{"serve", p.origin, "--read-only", "--socket", socket},
		{"mount", p.origin, other, t.TempDir()},
	} {
		dmsnap(args...).wantRefused(t, "a merge into this origin is not complete", p.cow, ".merging")
	}
	wantSame(t, p.dir, files)
	rescue := launch(t, "rescue", "--dry-run", p.origin, other)
	if status := rescue.end(t); status != exitDone || !strings.Contains(rescue.stderr.String(), "warning: "+p.origin+": what is read is a mixture") {
		t.Errorf("rescue: status %d, %s", status, &rescue.stderr)
	}
	for cow, want := range map[string][]byte{p.cow: shown, undo: before} {
		if got := mustRun(t, "export", p.origin, cow, "-"); got != string(want) {
			t.Errorf("%s shows something else", cow)
		}
	}
	mustRun(t, "check", other, "--origin", p.origin)
	mustRun(t, "merge", p.origin, p.cow, "--sibling", other)
	mustRun(t, "export", p.origin, other, out)
}

// A merge that goes on says which undo store does not revert it any more.
func TestMergeSaysWhichUndoStoreIsLost(t *testing.T) {
	p, shown := bigPair(t)
	undo := filepath.Join(p.dir, "undo.cow")
	halfMerged(t, p, "--undo", undo)
	if err := os.Remove(undo); err != nil {
		t.Fatal(err)
	}
	if o := dmsnap("merge", p.origin, p.cow); o.status != exitDone || !strings.Contains(o.stderr, "warning: undo store "+undo+" can't undo this merge any more") {
		t.Errorf("status %d, %s", o.status, o.stderr)
	}
	wantContent(t, p.origin, shown)
	mustRun(t, "check", p.cow, "--origin", p.origin)
}

// A side file that is damaged refuses, and can be overridden.
func TestSideFileDamaged(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	writeFile(t, p.origin+".merging", []byte("{"))
	dmsnap("merge", p.origin, p.cow).wantRefused(t, "not complete", ".merging", "--force")
	dmsnap("serve", p.origin, p.cow).wantRefused(t, "not complete", "--force")
	if m := mergingBeside(t, p.origin); m == nil || m.Error == "" {
		t.Errorf("inspect: %+v", m)
	}
	mustRun(t, "merge", p.origin, p.cow, "--force")
	wantContent(t, p.origin, shown)
	if _, err := os.Stat(p.origin + ".merging"); !os.IsNotExist(err) {
		t.Error("the side file is left", err)
	}
}

// A side file that is damaged refuses a live merge, with all as before.
func TestLiveMergeRefusedByASideFile(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	r := start(t, p, serveOptions{exportOrigin: true}, "disk="+p.cow)
	writeFile(t, p.origin+".merging", []byte("{"))
	before := digests(t, p.dir)
	dmsnap("merge", "--control", r.control, "disk").wantRefused(t, "not complete", ".merging")
	wantSame(t, p.dir, before)
	if out := mustRun(t, "status", "--control", r.control); !strings.Contains(out, "snapshot disk: ok") {
		t.Errorf("after the refused merge: %s", out)
	}
	if err := os.Remove(p.origin + ".merging"); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "merge", "--control", r.control, "disk", "--wait")
	r.stop()
	wantContent(t, p.origin, shown)
	mustRun(t, "check", p.cow, "--origin", p.origin)
}

// Where no side file can be made, merges say so and go on.
func TestMergeWithoutASideFile(t *testing.T) {
	for _, live := range []bool{false, true} {
		p := newPair(t)
		shown := p.withStore(t)
		long := filepath.Join(p.dir, strings.Repeat("n", 250)) // too long for a suffix
		if err := os.Rename(p.origin, long); err != nil {
			t.Fatal(err)
		}
		p.origin = long
		if live {
			s := launch(t, "serve", p.origin, "disk="+p.cow, "--socket", filepath.Join(p.dir, "s"), "--control", filepath.Join(p.dir, "c"))
			if _, err := s.stdout.ReadString('\n'); err != nil {
				t.Fatalf("%v: %s", err, &s.stderr)
			}
			mustRun(t, "merge", "--control", filepath.Join(p.dir, "c"), "disk", "--wait")
			s.Process.Signal(syscall.SIGTERM)
			if status := s.end(t); status != exitDone || !strings.Contains(s.stderr.String(), "disk: no side file can be made") {
				t.Errorf("status %d, %s", status, &s.stderr)
			}
		} else if o := dmsnap("merge", p.origin, p.cow); o.status != exitDone || !strings.Contains(o.stderr, "warning: no side file can be made") {
			t.Errorf("status %d, %s", o.status, o.stderr)
		}
		wantContent(t, p.origin, shown)
		mustRun(t, "check", p.cow, "--origin", p.origin)
	}
}

// A live merge continues an offline one, and the side file is removed when it is complete.
func TestLiveMergeEndsAnOfflineOne(t *testing.T) {
	p, shown := bigPair(t)
	halfMerged(t, p)
	r := start(t, p, serveOptions{exportOrigin: true}, "disk="+p.cow)
	other := filepath.Join(p.dir, "other.cow")
	dmsnap("snapshot", "--control", r.control, "other", other, "--create").wantRefused(t, "not complete", p.cow, "--force")
	if _, err := os.Stat(other); !os.IsNotExist(err) {
		t.Error("the refused snapshot left its file", err)
	}
	mustRun(t, "merge", "--control", r.control, "disk", "--wait")
	if m := mergingBeside(t, p.origin); m != nil {
		t.Errorf("inspect after the merge: %+v", m)
	}
	mustRun(t, "snapshot", "--control", r.control, "other", other, "--create")
	r.stop()
	wantContent(t, p.origin, shown)
}
