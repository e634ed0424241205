package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/rescue"
	"github.com/dmsnap/dmsnap/snapshot"
)

// An invalid snapshot is rescued, its map is kept, and a copy of its store loads again.
func TestRescue(t *testing.T) {
	p := newPair(t)
	mustRun(t, "create", p.origin, p.cow, "--cow-size", "32k")
	origin, cow := openFile(t, p.origin, false), openFile(t, p.cow, false)
	o := snapshot.NewOrigin(origin)
	snap, err := o.Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(10) { // six fit
		writeAt(t, o, []byte("overwritten"), i*8192)
	}
	for _, err := range []error{snap.Close(), cow.Close(), origin.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	dmsnap("export", p.origin, p.cow, "-").wantRefused(t, "invalid")
	before := digests(t, p.dir)

	plan := mustJSON[rescue.Result](t, "rescue", "--dry-run", p.origin, p.cow)
	wantSame(t, p.dir, before)
	out, table := filepath.Join(p.dir, "old.img"), filepath.Join(p.dir, "old.map")
	got := mustJSON[rescue.Result](t, "rescue", p.origin, p.cow, out, "--map", table)
	if fmt.Sprint(plan.Ranges) != fmt.Sprint(got.Ranges) || got.Certain != 6*4096 || got.Lost != 0 || got.Doubtful != int64(len(p.content))-got.Certain {
		t.Errorf("planned %+v, got %+v", plan, got)
	}
	if len(got.Problems) != 1 || !strings.Contains(got.Problems[0], "DS007") {
		t.Errorf("problems %q", got.Problems)
	}
	image, lines := readFile(t, out), strings.Split(strings.TrimSpace(string(readFile(t, table))), "\n")
	if len(lines) != len(got.Ranges) || lines[0] != "0 4096 certain" || lines[1] != "4096 4096 doubtful" {
		t.Errorf("map %q", lines)
	}
	for _, x := range got.Ranges {
		if x.Class == rescue.Certain && !bytes.Equal(image[x.Off:x.Off+x.Length], p.content[x.Off:x.Off+x.Length]) {
			t.Errorf("%v is called certain", x)
		}
	}
	asJSON := filepath.Join(p.dir, "old.json")
	text := mustRun(t, "rescue", p.origin, p.cow, out, "--force", "--map", asJSON)
	if !strings.Contains(text, "24 KiB certain") || !strings.Contains(text, "DS007") || !strings.HasPrefix(string(readFile(t, asJSON)), "[") {
		t.Errorf("it said %q", text)
	}

	for name, begins := range map[string]string{"old.svg": "<svg", "old.png": "\x89PNG"} {
		mustRun(t, "rescue", p.origin, p.cow, out, "--force", "--map", filepath.Join(p.dir, name))
		if b := readFile(t, filepath.Join(p.dir, name)); !bytes.HasPrefix(b, []byte(begins)) {
			t.Errorf("%s begins with %q", name, b[:20])
		}
	}

	again := filepath.Join(p.dir, "again.cow")
	if said := mustRun(t, "rescue", "--revalidate", p.cow, again); !strings.Contains(said, "24 KiB are certain; all other ranges") {
		t.Errorf("it did not say what that means: %q", said)
	}
	if st := mustJSON[inspect.Status](t, "status", again); !st.Valid || st.Exceptions != 6 {
		t.Errorf("%+v", st)
	}
	if view := mustRun(t, "export", p.origin, again, "-"); view != string(image) {
		t.Error("the copy shows something else than was rescued")
	}

	// In place, and back.
	undo := filepath.Join(p.dir, "undo")
	invalid, sound := digest(readFile(t, p.cow)), digest(readFile(t, again))
	if said := mustRun(t, "rescue", "--revalidate", p.cow, "--in-place", "--undo", undo); !strings.Contains(said, "24 KiB are certain; all other ranges") || !strings.Contains(said, "--undo-apply "+undo) {
		t.Errorf("it said %q", said)
	}
	inPlace := readFile(t, p.cow)
	clear(inPlace[ondisk.ChangeLabelAt:][:ondisk.ChangeLabelBytes]) // what the undo file has too
	if got := digest(inPlace); got != sound {
		t.Error("in place it is not what the copy is")
	}
	if res := mustJSON[offline.RevalidateResult](t, "rescue", "--revalidate", p.cow, "--in-place", "--undo", filepath.Join(p.dir, "none")); res.Changed || res.Kept != 24<<10 {
		t.Errorf("a valid store: %+v", res)
	}
	mustRun(t, "repair", p.cow, "--undo-apply", undo)
	if got := digest(readFile(t, p.cow)); got != invalid {
		t.Error("taken back it is not as it was")
	}

	// Manners.
	before = digests(t, p.dir)
	dmsnap("rescue", p.origin, p.cow, out).wantRefused(t, out, "exists")
	dmsnap("rescue", p.origin, p.cow, p.cow, "--force").wantRefused(t, "same file")
	dmsnap("rescue", p.origin, p.cow, filepath.Join(p.dir, "x"), "--map", table).wantRefused(t, table, "exists")
	dmsnap("rescue", p.origin, p.origin, filepath.Join(p.dir, "x")).wantRefused(t, p.origin)
	dmsnap("rescue", p.origin, out, filepath.Join(p.dir, "x")).wantRefused(t, out)
	dmsnap("rescue", p.origin, filepath.Join(p.dir, "none"), filepath.Join(p.dir, "x")).wantRefused(t, "none")
	dmsnap("rescue", p.origin, p.dir, filepath.Join(p.dir, "x")).wantRefused(t, p.dir)
	dmsnap("rescue", "--revalidate", p.cow, again).wantRefused(t, again, "exists")
	dmsnap("rescue", "--revalidate", p.origin, filepath.Join(p.dir, "x")).wantRefused(t, p.origin)
	dmsnap("rescue", p.origin, p.cow).wantRefused(t, "OUT")
	dmsnap("rescue", "--revalidate", p.cow, "--in-place").wantRefused(t, "--undo FILE")
	dmsnap("rescue", "--revalidate", p.cow, again, "--in-place", "--undo", undo+"2").wantRefused(t, "no NEWCOW")
	dmsnap("rescue", p.origin, p.cow, "--in-place", "--undo", undo+"2").wantRefused(t, "requires --revalidate")
	dmsnap("rescue", "--revalidate", p.cow, "--in-place", "--undo", undo).wantRefused(t, undo, "exists", "--force")
	dmsnap("rescue", "--revalidate", p.cow, "--in-place", "--undo", p.cow, "--force").wantRefused(t, "same file")
	wantSame(t, p.dir, before)
	if left, _ := filepath.Glob(filepath.Join(p.dir, ".*.part")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if err := os.Chmod(p.cow, 0o400); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "rescue", "--dry-run", p.origin, p.cow)
}
