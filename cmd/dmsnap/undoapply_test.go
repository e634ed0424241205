package main

import (
	"os"
	"testing"
)

// An undo file is applied to the store that it is of, and to no other, however alike.
func TestUndoFileOfAnotherStore(t *testing.T) {
	for _, c := range []struct{ store, change string }{
		{"BAD", "repair BAD --in-place --undo OUT"},
		{"INVALID", "rescue --revalidate INVALID --in-place --undo OUT"},
	} {
		k := newKit(t)
		damaged := readFile(t, k.path[c.store])
		if o := k.call(c.change); o.status != exitDone {
			t.Fatalf("%s: status %d, %s", c.change, o.status, o.stderr)
		}
		changed := readFile(t, k.path[c.store])

		// A twin, changed in the same way, has an undo file of its own.
		twin := newKit(t)
		if o := twin.call(c.change); o.status != exitDone {
			t.Fatalf("%s: status %d, %s", c.change, o.status, o.stderr)
		}
		own := k.path["OUT"]
		for _, cow := range []string{twin.path[c.store], k.path["COW"], k.path["COW2"]} {
			before := readFile(t, cow)
			dmsnap("repair", cow, "--undo-apply", own).wantRefused(t, own, "not of this store")
			if digest(readFile(t, cow)) != digest(before) {
				t.Errorf("%s: %s was changed", c.change, cow)
			}
		}

		// Nor to its own, when somebody wrote to it since.
		if err := patchFile(k.path[c.store], 4, 7); err != nil {
			t.Fatal(err)
		}
		dmsnap("repair", k.path[c.store], "--undo-apply", own).wantRefused(t, own, "not of this store")

		// A copy of the store is accepted like the store itself.
		writeFile(t, k.path["COW"], changed)
		os.Truncate(k.path["COW"], int64(len(changed)))
		mustRun(t, "repair", k.path["COW"], "--undo-apply", own)
		if digest(readFile(t, k.path["COW"])) != digest(damaged) {
			t.Errorf("%s: it was not taken back", c.change)
		}
	}
}
