package e2e_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/test/e2e/faultfs"
)

// rig is an origin full of A with snapshots on a file system that can fail.
type rig struct {
	t      *testing.T
	fs     *faultfs.FS
	dir    string // for sockets and output files
	origin string
	size   int64
	s      *server
}

// newRig makes an origin of size bytes, of which the first full bytes are A and the rest is a hole, and stores for
// snapshots of the given names.
func newRig(t *testing.T, size, full int64, names ...string) *rig {
	t.Helper()
	r := &rig{t: t, fs: newFS(t), dir: newFolder(t), size: size}
	r.origin = filepath.Join(r.fs.Dir(), "o", "disk")
	f, err := os.Create(r.origin)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(bytes.Repeat([]byte{'A'}, int(full)), 0)
	if err := errors.Join(err, f.Truncate(size), f.Sync(), f.Close(), syncDir(filepath.Dir(r.origin))); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		r.create(name)
	}
	t.Cleanup(func() {
		if r.s != nil {
			r.must(r.fs.Clear())
			r.s.kill()
		}
	})
	return r
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) cow(name string) string { return filepath.Join(r.fs.Dir(), "c", name+".cow") }

// create makes a store.
func (r *rig) create(name string, more ...string) {
	r.t.Helper()
	r.run(0, append([]string{"create", r.origin, r.cow(name)}, more...)...)
}

// run runs a verb that must end with a status, and returns what it printed.
func (r *rig) run(status int, args ...string) string {
	r.t.Helper()
	o := run(args...)
	if o.status != status {
		r.t.Fatalf("want status %d: %v", status, o)
	}
	return o.out
}

// serve starts a server on the origin and the named snapshots.
func (r *rig) serve(names []string, more ...string) {
	r.t.Helper()
	args := append([]string{r.origin, "--export-origin"}, more...)
	for _, name := range names {
		args = append(args, name+"="+r.cow(name))
	}
	var err error
	r.s, err = serve(r.dir, args...)
	r.must(err)
}

func (r *rig) dial(export string) *conn {
	r.t.Helper()
	c, err := dial(r.s.socket, export, allContexts)
	r.must(err)
	r.t.Cleanup(c.kill)
	return c
}

// terminate ends the server by SIGTERM and checks the exit status.
func (r *rig) terminate(want ...int) {
	r.t.Helper()
	status, err := r.s.terminate()
	r.must(err)
	if !slices.Contains(want, status) {
		r.t.Errorf("SIGTERM: status %d, want %d; the log:\n%s", status, want, r.s.log())
	}
	r.s = nil
}

// kill ends the server by SIGKILL.
func (r *rig) kill() {
	r.s.kill()
	r.s = nil
}

// cut is a power cut.
func (r *rig) cut(seed uint64) {
	r.t.Helper()
	r.must(r.fs.PowerOff())
	if r.s != nil {
		r.kill()
	}
	_, err := r.fs.PowerOn(seed)
	r.must(err)
}

func (r *rig) state(name string) snapshotStatus {
	r.t.Helper()
	var st snapshotStatus
	r.must(r.s.api("GET", "snapshots/"+name, nil, &st))
	return st
}

// validOnDisk reports whether a store is not marked invalid.
func (r *rig) validOnDisk(name string) bool {
	r.t.Helper()
	var st struct{ Valid bool }
	r.must(json.Unmarshal([]byte(r.run(0, "status", "--json", r.cow(name))), &st))
	return st.Valid
}

// shown returns what a snapshot shows without a server; nil if it is invalid.
func (r *rig) shown(name string) []byte {
	r.t.Helper()
	if !r.validOnDisk(name) {
		return nil
	}
	return []byte(r.run(0, "export", r.origin, r.cow(name), "-"))
}

// rightOrInvalid checks that a snapshot shows what it should, or is marked invalid.
func (r *rig) rightOrInvalid(name string, want []byte) {
	r.t.Helper()
	if got := r.shown(name); got != nil && !bytes.Equal(got, want) {
		at := 0
		for got[at] == want[at] {
			at++
		}
		r.t.Errorf("snapshot %s is valid and shows %q at %d, want %q", name, got[at:at+4], at, want[at:at+4])
	}
}

// past is the content of the origin in the beginning.
func (r *rig) past(full int64) []byte {
	return append(bytes.Repeat([]byte{'A'}, int(full)), make([]byte, r.size-full)...)
}

// originHolds checks bytes of the origin's file.
func (r *rig) originHolds(want []byte, off int64) {
	r.t.Helper()
	b, err := os.ReadFile(r.origin)
	r.must(err)
	if !bytes.Equal(b[off:off+int64(len(want))], want) {
		r.t.Errorf("the origin holds %q at %d, want %q", b[off:off+4], off, want[:4])
	}
}

func (r *rig) inject(rule faultfs.Rule) {
	r.t.Helper()
	r.must(r.fs.Add(rule))
}

// merge starts a live merge.
func (r *rig) merge(name string) error {
	return r.s.api("POST", "merge", map[string]any{"name": name}, nil)
}

func (r *rig) mergeState(wait string) (m mergeStatus) {
	r.t.Helper()
	r.must(r.s.api("GET", "merge?wait="+wait, nil, &m))
	return m
}

func fill(c byte, n int) []byte { return bytes.Repeat([]byte{c}, n) }

const eio, enospc = syscall.EIO, syscall.ENOSPC
