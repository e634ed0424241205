package e2e_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/test/e2e/faultfs"
)

// fileVerb is a verb that writes a file OUT in the directory of COW devices.
type fileVerb struct {
	name string
	args func(r *rig, out string) []string
	// right says whether OUT is what it should be.
	right func(r *rig, out string) bool
}

func fileVerbs(r *rig, view []byte) []fileVerb {
	shows := func(r *rig, out string) bool {
		return run("check", out).status == 0 && run("export", r.origin, out, "-").out == string(view)
	}
	holds := func(r *rig, out string) bool {
		b, err := os.ReadFile(out)
		return err == nil && bytes.Equal(b, view)
	}
	text := filepath.Join(r.dir, "text")
	r.run(0, "dump", r.cow("v"), "--data", "--output", text)
	return []fileVerb{
		{"create", func(r *rig, out string) []string { return []string{"create", r.origin, out} },
			func(r *rig, out string) bool { return run("check", out).status == 0 }},
		{"export", func(r *rig, out string) []string { return []string{"export", r.origin, r.cow("v"), out} }, holds},
		{"compact", func(r *rig, out string) []string { return []string{"compact", r.cow("v"), out} }, shows},
		{"repair", func(r *rig, out string) []string { return []string{"repair", r.cow("v"), out} }, shows},
		{"rescue", func(r *rig, out string) []string { return []string{"rescue", r.origin, r.cow("v"), out} }, holds},
		{"restore", func(r *rig, out string) []string { return []string{"restore", text, out} }, shows},
		{"dump", func(r *rig, out string) []string { return []string{"dump", r.cow("v"), "--output", out} },
			func(r *rig, out string) bool {
				b, err := os.ReadFile(out)
				return err == nil && string(b) == run("dump", r.cow("v")).out
			}},
	}
}

// newVerbRig has a store with a few exceptions.
func newVerbRig(t *testing.T) (r *rig, view []byte) {
	const size = 128 << 10
	r = newRig(t, size, size, "v")
	r.serve([]string{"v"})
	v := r.dial("v")
	view = r.past(size)
	for i, off := range []int{8192, 0, 40960, 65536} {
		r.must(v.write(int64(off), fill(byte('a'+i), 5000), 0))
		copy(view[off:], fill(byte('a'+i), 5000))
	}
	r.terminate(0)
	return r, view
}

// directory returns what is in the directory of COW devices.
func (r *rig) folder() map[string]string {
	r.t.Helper()
	list, err := os.ReadDir(filepath.Join(r.fs.Dir(), "c"))
	r.must(err)
	all := map[string]string{}
	for _, e := range list {
		b, err := os.ReadFile(filepath.Join(r.fs.Dir(), "c", e.Name()))
		r.must(err)
		all[e.Name()] = string(b)
	}
	return all
}

// Each verb that writes a file, and each of its calls on files that can fail: the verb ends with status 2, leaves what
// was there as it was, and OUT is missing, or complete where only the flush of the directory failed. When it succeeds
// OUT survives a power cut.
func TestVerbsWhenACallFails(t *testing.T) {
	r, view := newVerbRig(t)
	before := r.folder()
	out := filepath.Join(r.fs.Dir(), "c", "out")
	calls := 0
	for _, v := range fileVerbs(r, view) {
		for _, op := range []faultfs.Op{faultfs.Read, faultfs.Write, faultfs.Fsync, faultfs.Create, faultfs.Rename, faultfs.SyncDir, faultfs.Truncate} {
			for skip := 0; ; skip++ {
				if skip == 4 && !deep { // the later ones are of the same kind
					break
				}
				rule := faultfs.Rule{Op: op, File: "*", Errno: eio, Skip: skip, Count: 1}
				if op == faultfs.Read {
					rule.Count = 0 // the kernel asks again after a read ahead that failed
				}
				r.inject(rule)
				o := run(v.args(r, out)...)
				r.must(r.fs.Clear())
				hits, err := r.fs.Hits()
				r.must(err)
				what := fmt.Sprintf("%s, %s %d", v.name, op, skip)
				_, missing := os.Stat(out)
				if len(hits) == 0 {
					if o.status != 0 {
						t.Errorf("%s: nothing failed: %v", what, o)
					}
					r.must(r.fs.PowerOff())
					if _, err := r.fs.PowerOn(uint64(skip)); err != nil {
						t.Fatal(err)
					}
					if !v.right(r, out) {
						t.Errorf("%s: after a power cut the output is wrong or gone", what)
					}
					r.must(os.Remove(out))
					r.must(syncDir(filepath.Dir(out)))
					break
				}
				calls++
				// These keep what can be read, and name what can't.
				salvages := op == faultfs.Read && (v.name == "dump" || v.name == "repair" || v.name == "rescue")
				if salvages && o.status == 0 && missing == nil {
					named := strings.Contains(o.out, "lost") || strings.Contains(o.out+o.stderr, "input/output error")
					if v.name != "dump" && !named && !v.right(r, out) {
						t.Errorf("%s: the output is wrong, and nothing is called lost: %v", what, o)
					}
				} else if o.status != 2 || !strings.HasPrefix(o.stderr, "dmsnap: ") {
					t.Errorf("%s: %v", what, o)
				}
				if missing == nil && !salvages {
					if op != faultfs.SyncDir {
						t.Errorf("%s: %v leaves an output", what, o)
					}
					if !v.right(r, out) {
						t.Errorf("%s: the output is wrong", what)
					}
				}
				os.Remove(out)
				for name, b := range r.folder() {
					if before[name] != b {
						t.Errorf("%s: %s is left, or changed", what, name)
						os.Remove(filepath.Join(filepath.Dir(out), name))
					}
				}
				r.must(syncDir(filepath.Dir(out)))
			}
		}
	}
	t.Logf("%d calls failed", calls)
	if calls < 50 {
		t.Error("hardly anything was tried")
	}
}

// Verbs that change a store or an origin in place, and each of their flushes and writes: status 2, and the snapshot shows what
// it showed, also after a power cut; the same command again completes the work.
func TestVerbsInPlaceWhenACallFails(t *testing.T) {
	for _, verb := range []string{"merge", "merge --undo", "punch"} {
		for _, op := range []faultfs.Op{faultfs.Write, faultfs.Fsync, faultfs.Punch, faultfs.Read} {
			t.Run(verb+","+string(op), func(t *testing.T) {
				t.Parallel()
				for skip := 0; ; skip++ {
					r, view := newVerbRig(t)
					undo := filepath.Join(r.fs.Dir(), "c", "undo")
					args := map[string][]string{
						"merge":        {"merge", r.origin, r.cow("v")},
						"merge --undo": {"merge", r.origin, r.cow("v"), "--undo", undo},
						"punch":        {"compact", r.cow("v"), "--punch"},
					}[verb]
					r.inject(faultfs.Rule{Op: op, File: "*", Errno: eio, Skip: skip, Count: 1})
					o := run(args...)
					r.must(r.fs.Clear())
					hits, err := r.fs.Hits()
					r.must(err)
					if len(hits) > 0 && o.status != 2 && op != faultfs.Punch && !(op == faultfs.Read && o.status == 0) || len(hits) == 0 && o.status != 0 {
						t.Errorf("call %d (%v): %v", skip, hits, o)
					}
					r.cut(uint64(skip))
					got := r.shown("v")
					if !bytes.Equal(got, view) {
						t.Errorf("call %d (%v): the snapshot shows something else", skip, hits)
					}
					if o := run(args...); o.status != 0 {
						t.Errorf("call %d (%v), again: %v", skip, hits, o)
					}
					if verb == "merge" || verb == "merge --undo" {
						r.originHolds(view, 0)
					}
					r.run(0, "check", r.cow("v"))
					if len(hits) == 0 || skip == 5 && !deep {
						return
					}
				}
			})
		}
	}
}
