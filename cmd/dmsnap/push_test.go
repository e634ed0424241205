package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/internal/testremote"
)

// checkStores checks the stores in a folder.
func checkStores(t *testing.T, pattern string) {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		t.Fatalf("%s: %v, %v", pattern, paths, err)
	}
	for _, path := range paths {
		dev, err := block.Open(path, block.Options{ReadOnly: true, Lock: block.LockNone})
		if err != nil {
			t.Fatal(err)
		}
		r, err := check.Run(t.Context(), dev, check.Options{})
		if err = errors.Join(err, dev.Close()); err != nil || r.Worst() >= check.Error {
			t.Errorf("%s: %v, %+v", path, err, r)
		}
	}
}

// A disk with a store is pushed, is the origin of every kind of verb, and is pulled and pushed again as the same disk.
func TestPushAndPull(t *testing.T) {
	k := newKit(t)
	ref := testremote.Start(t, testremote.NewRegistry()) + "/golden/disk"
	cached := "--cache-dir=" + t.TempDir()
	before := k.state(t)
	var made struct {
		Reference, Digest string
		Layers            int
	}
	if err := json.Unmarshal([]byte(mustRun(t, "push", k.path["ORIGIN"], k.path["COW"], ref+":1", "--json")), &made); err != nil || made.Layers != 2 || made.Reference != "oci://"+ref+":1" {
		t.Fatalf("%+v, %v", made, err)
	}
	k.wantState(t, before)
	mustRun(t, "export", k.path["ORIGIN"], k.path["COW"], k.path["OUT"])
	shown := readFile(t, k.path["OUT"])
	name := "oci://" + ref + ":1"

	mustRun(t, "export", name, k.path["ALSO"], cached)
	if !bytes.Equal(readFile(t, k.path["ALSO"]), shown) {
		t.Error("the disk in the registry has other bytes")
	}

	// A store over it records which disk it is for.
	fork := filepath.Join(k.out, "fork.cow")
	if out := mustRun(t, "create", name, fork, cached, "--json"); !strings.Contains(out, `"origin_format": "raw@`) {
		t.Error(out)
	}
	if out := mustRun(t, "diff", name, fork, cached); !strings.Contains(out, "no difference") {
		t.Error(out)
	}
	mustRun(t, "check", fork, "--origin", name, cached)
	recorded := filepath.Join(k.out, "boot")
	mustRun(t, "export", name, fork, filepath.Join(k.out, "forked.img"), cached, "--prefetch-record="+recorded)
	if !bytes.Equal(readFile(t, filepath.Join(k.out, "forked.img")), shown) || len(readFile(t, recorded)) == 0 {
		t.Error("the fork has other bytes, or nothing was recorded")
	}
	mustRun(t, "export", name, fork, filepath.Join(k.out, "again.img"), cached, "--prefetch="+recorded)
	k.wantRefused(t, []string{"export", name, fork, filepath.Join(k.out, "no.img"), cached, "--prefetch-record=" + recorded}, recorded, "exists")
	k.wantRefused(t, []string{"export", name, fork, filepath.Join(k.out, "no.img"), cached, "--prefetch=" + k.path["TEXT"]}, "line 1")
	k.wantRefused(t, []string{"merge", name, fork}, name)

	// The tag moves: the store is refused over what it names now, and still served over what it was made for.
	mustRun(t, "push", k.path["ORIGIN"], ref+":moved")
	k.wantRefused(t, []string{"export", "oci://" + ref + ":moved", fork, filepath.Join(k.out, "no.img"), cached}, "another version", "--raw")

	// Pulled, and pushed again.
	folder := k.path["FOLDER"]
	files := strings.Fields(mustRun(t, "pull", ref+":1", folder, cached))
	if len(files) != 2 || mustRun(t, "pull", ref+":1", folder, cached) != strings.Join(files, "\n")+"\n" {
		t.Fatalf("%q", files)
	}
	checkStores(t, filepath.Join(folder, "*.cow"))
	if out := mustRun(t, "push", files[0], files[1], ref+":again", "--json"); !strings.Contains(out, made.Digest) || !strings.Contains(out, `"written": 0`) {
		t.Error(out)
	}
	// A delta over what is there.
	if out := mustRun(t, "push", name, fork, ref+":2", cached, "--json"); !strings.Contains(out, `"new_layers": 1`) || !strings.Contains(out, `"layers": 3`) {
		t.Error(out)
	}

	if out := mustRun(t, "cache", "list", cached); strings.Count(out, ref) < 2 {
		t.Error(out)
	}
	if out := mustRun(t, "cache", "prune", cached, "--json"); strings.Contains(out, `"removed_bytes": 0`) {
		t.Error(out)
	}
	k.wantRefused(t, []string{"pull", ref + ":none", folder, cached}, "not found")
	k.wantRefused(t, []string{"push", k.path["ORIGIN"], k.path["INVALID"], ref + ":x"}, k.path["INVALID"])
	k.wantRefused(t, []string{"push", k.path["ORIGIN"], "ftp://host/x"}, "oci://")
	checkStores(t, fork)
}

// A disk on a web server is the origin of a store; over another version of it the store is refused.
func TestWebServerOrigin(t *testing.T) {
	k := newKit(t)
	content := readFile(t, k.path["ORIGIN"])
	f := &testremote.File{}
	f.Set(`"1"`, content)
	name := "http://" + testremote.Start(t, f) + "/disk.img"
	cached := "--cache-dir=" + t.TempDir()
	fork := filepath.Join(k.out, "fork.cow")
	mustRun(t, "create", name, fork, cached)
	mustRun(t, "export", name, fork, k.path["OUT"], cached)
	if !bytes.Equal(readFile(t, k.path["OUT"]), content) {
		t.Error("other bytes")
	}
	f.Set(`"2"`, content)
	k.wantRefused(t, []string{"export", name, fork, k.path["ALSO"], cached}, "another version")
	mustRun(t, "export", name, fork, k.path["ALSO"], cached, "--raw")
	k.wantRefused(t, []string{"export", name + "?token=s3cr3t", k.path["ALSO"], "--raw", "--cache-dir=" + k.path["TEXT"]}, "not a directory")
	checkStores(t, fork)
}
