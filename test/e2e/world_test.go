package e2e_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/test/e2e/faultfs"
)

// A world is an origin with snapshots, on disk and in a server, beside the model of what they show. Everything
// it does depends on the seed, as far as the product does.
type world struct {
	seed, step uint64
	r          *rand.Rand // of the step
	log        []string
	dir        string // for sockets and output files
	fs         *faultfs.FS
	originPath string
	cowDir     string

	size    int64
	policy  string // --on-full
	sync    string
	limited bool // COW devices may become full
	faulty  bool // errors are being injected, or were since the server started
	again   bool // and more than one of them
	stamp   uint64

	origin    *device
	before    *device // during a merge: what the origin was; nil otherwise
	merging   *view   // the snapshot under merge, from its beginning until it is dropped
	mergeDone bool
	views     []*view
	made      int // snapshots ever made
	server    *server
	conns     map[string][]*conn
	counts    map[string]int
}

// view is a snapshot.
type view struct {
	name, cow string
	d         *device
	invalid   bool // it was seen to be
	// doubted: errors of its COW device went on, and with --on-full invalidate a mark that could not be made
	// durable does not block the origin. It may be valid and wrong.
	doubted bool
	limited bool
	size    int64 // of its COW file, when limited
}

// fault is a fault of the product.
type fault struct{ error }

func (w *world) fail(format string, args ...any) {
	panic(fault{fmt.Errorf("step %d: "+format, append([]any{w.step}, args...)...)})
}

func (w *world) must(err error, what string) {
	if err != nil {
		w.fail("%s: %w", what, err)
	}
}

func (w *world) logf(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf("%4d ", w.step)+fmt.Sprintf(format, args...))
}

func (w *world) count(what string) { w.counts[what]++ }

// next begins a step. Each has a generator of its own, so that a step does not depend on what those before drew.
func (w *world) next() {
	w.step++
	w.r = rand.New(rand.NewPCG(w.seed, w.step))
}

func (w *world) chance(percent int) bool { return w.r.IntN(100) < percent }

// content makes data that no write before had: sectors begin with their number, some are zeros.
func (w *world) content(n int64) []byte {
	p := make([]byte, n)
	zeros := w.chance(10)
	for at := int64(0); at < n; at += sectorSize {
		w.stamp++
		if zeros && w.chance(50) {
			continue
		}
		text := fmt.Sprintf("<%d.%d>", w.step, w.stamp)
		for b := p[at:min(at+sectorSize, n)]; len(b) > 0; {
			b = b[copy(b, text):]
		}
	}
	return p
}

// create makes an origin with one or two snapshots. f is nil for ordinary files.
func (w *world) create(seed uint64, dir string, f *faultfs.FS) {
	*w = world{seed: seed, dir: dir, fs: f, conns: map[string][]*conn{}, counts: map[string]int{}}
	w.next()
	originDir := filepath.Join(dir, "o")
	w.cowDir = filepath.Join(dir, "c")
	if f != nil {
		originDir, w.cowDir = filepath.Join(f.Dir(), "o"), filepath.Join(f.Dir(), "c")
	} else {
		w.must(errors.Join(os.Mkdir(originDir, 0o700), os.Mkdir(w.cowDir, 0o700)), "folders")
	}
	w.originPath = filepath.Join(originDir, "disk.img")
	w.size = int64(256+w.r.IntN(1024))<<10 + int64(w.r.IntN(8))*sectorSize
	w.policy = []string{"fail", "fail", "pause", "invalidate"}[w.r.IntN(4)]
	w.sync = []string{"flush", "flush", "always"}[w.r.IntN(3)]
	w.limited = w.chance(35)
	content := make([]byte, w.size)
	file, err := os.Create(w.originPath)
	w.must(err, "origin")
	w.must(file.Truncate(w.size), "origin")
	for at := int64(0); at < w.size; {
		n := min(int64(1+w.r.IntN(64))<<w.r.IntN(12)*64/sectorSize*sectorSize+sectorSize, w.size-at)
		if w.chance(60) {
			copy(content[at:], w.content(n))
			_, err := file.WriteAt(content[at:at+n], at)
			w.must(err, "origin")
		}
		at += n
	}
	w.must(errors.Join(file.Sync(), file.Close(), syncDir(originDir)), "origin")
	w.origin = newDevice(content)
	w.logf("origin of %d bytes; --on-full %s --sync %s; limited %v, FUSE %v", w.size, w.policy, w.sync, w.limited, f != nil)
	w.newView(true)
	if w.chance(40) {
		w.newView(true)
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

var chunkSizes = []string{"512", "1KiB", "4KiB", "4KiB", "4KiB", "16KiB", "64KiB"}

// newView makes a snapshot of the origin: a store by the offline verb, or by the server.
func (w *world) newView(offline bool) {
	w.made++
	v := &view{name: fmt.Sprintf("v%d", w.made), d: w.origin.clone()}
	v.cow = filepath.Join(w.cowDir, v.name+".cow")
	chunk := chunkSizes[w.r.IntN(len(chunkSizes))]
	if w.limited && w.chance(60) {
		v.limited, v.size = true, int64(300+w.r.IntN(400))<<10
	}
	if offline || v.limited {
		args := []string{"create", w.originPath, v.cow, "--chunk-size", chunk}
		if v.limited {
			args = append(args, "--cow-size", fmt.Sprint(v.size))
		}
		w.want(0, run(args...))
	}
	if !offline {
		body := map[string]any{"name": v.name, "cow": v.cow}
		if !v.limited {
			size := map[string]int{"512": 512, "1KiB": 1 << 10, "4KiB": 4 << 10, "16KiB": 16 << 10, "64KiB": 64 << 10}
			body["create"], body["chunk_size"] = true, size[chunk]
		}
		if err := w.server.api("POST", "snapshots", body, nil); err != nil {
			w.logf("attach %s: %v", v.name, err)
			var refused *apiError
			if !errors.As(err, &refused) || !w.faulty && !(w.limited && refused.Code == "failed") {
				w.fail("attach %s: %w", v.name, err)
			}
			if err := os.Remove(v.cow); err != nil && !errors.Is(err, os.ErrNotExist) {
				w.fail("%w", err)
			} else if err == nil && !v.limited {
				w.fail("the refused attach left %s", v.cow)
			}
			w.must(syncDir(w.cowDir), "COW folder") // a power cut would bring back what was made before
			return
		}
		// The origin as it was when the answer came; a client alone can't distinguish it from a little earlier.
		v.d = w.origin.clone()
		v.d.evicted = w.origin.evicted
	}
	w.count("attach")
	w.logf("snapshot %s, chunks of %s, limit %d, offline %v", v.name, chunk, v.size, offline)
	w.views = append(w.views, v)
}

// want checks how a verb ended.
func (w *world) want(status int, o outcome) outcome {
	if o.status != status {
		w.fail("want status %d: %v", status, o)
	}
	return o
}

// start starts the server on everything there is.
func (w *world) start() {
	args := []string{w.originPath, "--export-origin", "--on-full", w.policy, "--sync", w.sync}
	if w.limited && w.chance(15) {
		args = append(args, "--grow", "64KiB", "--grow-max", "700KiB")
	}
	for _, v := range w.views {
		args = append(args, v.name+"="+v.cow)
	}
	s, err := serve(w.dir, args...)
	w.must(err, "serve")
	w.server, w.faulty = s, false
	for _, d := range w.devices() {
		d.evicted = false
	}
	w.count("runs")
	w.logf("serve %s", strings.Join(args[1:], " "))
	for _, v := range w.views {
		if v.invalid {
			if st := w.status(v); st.Valid || st.State != "invalid" {
				w.fail("%s was invalid and is %q", v.name, st.State)
			}
		}
	}
	w.readAll()
}

// status asks the server about a snapshot.
func (w *world) status(v *view) (st snapshotStatus) {
	w.must(w.server.api("GET", "snapshots/"+v.name, nil, &st), "status of "+v.name)
	return st
}

// modelOf returns the model of an export.
func (w *world) modelOf(export string) *device {
	if w.merging != nil && (export == "origin" || export == w.merging.name) {
		return w.merging.d // one disk under two names
	}
	if export == "origin" {
		return w.origin
	}
	return w.viewOf(export).d
}

// viewOf returns the snapshot of an export, or nil for the origin.
func (w *world) viewOf(export string) *view {
	if i := slices.IndexFunc(w.views, func(v *view) bool { return v.name == export }); i >= 0 {
		return w.views[i]
	}
	return nil
}

// isOrigin reports whether an export shows the origin.
func (w *world) isOrigin(export string) bool {
	return export == "origin" || w.merging != nil && w.merging.name == export
}

// exports lists what can be read.
func (w *world) exports() []string {
	list := []string{"origin"}
	for _, v := range w.views {
		if !v.invalid {
			list = append(list, v.name)
		}
	}
	return list
}

// some returns an export.
func (w *world) some() string {
	list := w.exports()
	return list[w.r.IntN(len(list))]
}

// conn returns one of at most three connections to an export.
func (w *world) conn(export string) *conn {
	list := w.conns[export]
	if len(list) > 0 && (len(list) == 3 || !w.chance(5)) {
		return list[w.r.IntN(len(list))]
	}
	c, err := dial(w.server.socket, export, allContexts)
	w.must(err, "connect")
	if c.size != w.size {
		w.fail("export %q has %d bytes, want %d", export, c.size, w.size)
	}
	w.conns[export] = append(list, c)
	return c
}

// forget closes a connection without a word.
func (w *world) forget(c *conn) {
	c.kill()
	w.conns[c.export] = slices.DeleteFunc(w.conns[c.export], func(x *conn) bool { return x == c })
}

// forgetAll closes the connections of an export, or all.
func (w *world) forgetAll(export string) {
	for name, list := range w.conns {
		if export == "" || name == export {
			for _, c := range list {
				c.kill()
			}
			delete(w.conns, name)
		}
	}
}

// readAll reads every export in full.
func (w *world) readAll() {
	for _, export := range w.exports() {
		w.read(export, 0, w.size)
	}
}

// failed checks an error of a request.
func (w *world) failed(export, what string, err error) {
	w.logf("%s of %s: %v", what, export, err)
	var n nbdError
	if !errors.As(err, &n) {
		w.fail("%s of %s: %w", what, export, err)
	}
	v := w.viewOf(export)
	switch {
	case n == nbdEIO && v != nil && (w.merging == nil || w.merging != v) && w.becameInvalid(v):
		return
	case n == nbdENOSPC && w.limited && w.policy != "invalidate" && what != "read" && what != "block status":
		w.count("no space")
	case w.faulty && (n == nbdEIO || n == nbdENOSPC):
		w.count("injected")
	default:
		w.fail("%s of %s: %w", what, export, err)
	}
}

// becameInvalid reports whether a snapshot is invalid now, and whether it may be.
func (w *world) becameInvalid(v *view) bool {
	if w.status(v).State != "invalid" {
		return false
	}
	if !(w.policy == "invalidate" && w.limited) && !w.faulty {
		w.fail("%s is invalid; nothing that was done explains it", v.name)
	}
	if !v.invalid {
		w.logf("%s became invalid", v.name)
		w.count("invalid")
	}
	v.invalid = true
	w.forgetAll(v.name)
	return true
}

// flushed is what a successful flush of an export means.
func (w *world) flushed(export string) {
	if !w.isOrigin(export) {
		w.modelOf(export).snapshotFlushed()
		return
	}
	w.modelOf(export).flushed()
	for _, v := range w.views {
		if v != w.merging {
			v.d.originFlushed()
		}
	}
}

// devices lists all models.
func (w *world) devices() []*device {
	list := []*device{w.origin}
	for _, v := range w.views {
		list = append(list, v.d)
	}
	if w.before != nil {
		list = append(list, w.before)
	}
	return list
}

// stop ends the server: "term", "kill" or "cut" (the power fails as well).
func (w *world) stop(how string) {
	w.logf("stop: %s", how)
	w.count(how)
	s := w.server
	w.server = nil
	clean := false
	switch how {
	case "term":
		status, err := s.terminate()
		w.must(err, "the end")
		clean = status == 0
		switch {
		case status == 0 || w.faulty && status == 2:
		default:
			w.fail("SIGTERM: status %d, %s", status, s.log())
		}
		for _, path := range []string{s.socket, s.control} {
			if _, err := os.Lstat(path); err == nil {
				w.fail("%s is left", path)
			}
		}
		w.forgetAll("")
	case "kill":
		s.kill()
		w.forgetAll("")
	case "cut":
		w.must(w.fs.PowerOff(), "faultfs")
		s.kill()
		w.forgetAll("")
		lost, err := w.fs.PowerOn(w.r.Uint64())
		w.must(err, "faultfs")
		w.logf("%d sectors lost", lost)
		for _, d := range w.devices() {
			clear(d.doubted)
		}
	}
	if strings.Contains(s.log(), "panic") || strings.Contains(s.log(), "DATA RACE") {
		w.fail("the server panicked: %s", s.log())
	}
	if w.fs != nil {
		w.must(w.fs.Clear(), "faultfs")
		hits, err := w.fs.Hits()
		w.must(err, "faultfs")
		for _, h := range hits {
			w.logf("injected: %v", h)
			for _, v := range w.views {
				if w.policy == "invalidate" && w.again && h.File == v.name+".cow" {
					v.doubted = true
				}
			}
			if h.Op != faultfs.Fsync {
				continue
			}
			w.dropCacheOf(h.File)
			if how != "cut" {
				for _, d := range w.devices() {
					d.flushFailed()
				}
			}
		}
	}
	w.lookAtDisks(how, clean)
}

// dropCacheOf drops what is cached of the file of that name, whose flush failed: a mark that could not be made durable, or what was written
// to the origin, may stand in the cache and not on the disk, and the cache may be dropped at any time. A snapshot that is made of such an
// origin would change then.
func (w *world) dropCacheOf(file string) {
	paths := []string{w.originPath}
	for _, v := range w.views {
		paths = append(paths, v.cow)
	}
	for _, path := range paths {
		if file != filepath.Base(path) {
			continue
		}
		f, err := os.Open(path)
		w.must(err, "drop the cache")
		err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		f.Close()
		w.must(err, "drop the cache")
	}
}

// lookAtDisks looks at what is on the disks, by the offline verbs, and takes it over.
func (w *world) lookAtDisks(how string, clean bool) {
	durable := clean || how == "cut"
	content, err := os.ReadFile(w.originPath)
	w.must(err, "origin")
	var lost []*view
	var merged *device // what the merge may have written to the origin
	if w.merging != nil {
		merged = w.merging.d.copyOf()
	}
	for _, v := range w.views {
		if _, err := os.Stat(v.cow); err != nil {
			w.fail("the store of %s is gone: %w", v.name, err)
		}
		var st struct{ Valid bool }
		o := w.want(0, run("status", "--json", v.cow))
		if err := json.Unmarshal([]byte(o.out), &st); err != nil {
			w.fail("%v: %w", o, err)
		}
		switch {
		case v.invalid && st.Valid && clean && !w.faulty:
			w.fail("%s was invalid and is valid again", v.name)
		case !v.invalid && !st.Valid && !(w.policy == "invalidate" && w.limited) && !w.faulty:
			w.fail("%s is invalid on disk; nothing that was done explains it", v.name)
		}
		if v.doubted && v != w.merging {
			w.logf("%s could not be marked; it is given up", v.name)
			lost = append(lost, v)
			continue
		}
		if v.invalid && st.Valid {
			w.logf("%s is not invalid on disk: its view must be right", v.name)
		}
		if v.invalid = !st.Valid; v.invalid {
			w.check(v, "DS007")
			continue
		}
		if clean {
			w.check(v)
		} else {
			w.check(v, "DS013", "DS022") // a torn write of slots; chunks whose slots were never written
		}
		got := []byte(w.want(0, run("export", w.originPath, v.cow, "-")).out)
		if v == w.merging && w.mergeDone {
			continue // below
		}
		if err := v.d.found(got, nil, durable); err != nil {
			w.fail("%s after %s: %w", v.name, how, err)
		}
	}
	switch m := w.merging; {
	case m == nil:
		if err := w.origin.found(content, nil, durable); err != nil {
			w.fail("origin after %s: %w", how, err)
		}
	case w.mergeDone:
		// The store is empty: the snapshot is one of the origin as it is now.
		if err := m.d.found(content, nil, durable); err != nil {
			w.fail("merged origin after %s: %w", how, err)
		}
		got := []byte(w.want(0, run("export", w.originPath, m.cow, "-")).out)
		w.origin = m.d
		m.d = m.d.clone()
		if err := m.d.observe(0, got); err != nil {
			w.fail("%s, whose merge is done, is not the origin after %s: %w", m.name, how, err)
		}
	default:
		// The origin alone is a mixture.
		if err := w.before.found(content, merged, durable); err != nil {
			w.fail("origin in the middle of a merge after %s: %w", how, err)
		}
		w.origin = w.before
	}
	if w.merging != nil && !durable && !w.mergeDone {
		w.merging.d.flushFailed() // it takes flushes of both disks from now on
	}
	if w.merging != nil {
		w.merging.d.merged = nil
	}
	w.merging, w.before, w.mergeDone = nil, nil, false
	w.removeSideFile()
	for _, v := range lost {
		w.remove(v)
	}
	w.noLeftovers()
}

// removeSideFile removes the file that says that a live merge is not complete: what follows uses the origin with all of its
// snapshots, which the server would refuse to attach others to. (TestPowerCutsOfALiveMerge is about the file.)
func (w *world) removeSideFile() {
	if err := os.Remove(w.originPath + ".merging"); err == nil {
		w.logf("the side file of a merge is removed")
		w.must(syncDir(filepath.Dir(w.originPath)), "side file")
	} else if !errors.Is(err, os.ErrNotExist) {
		w.fail("%w", err)
	}
}

// check runs the verb and allows problems of the given codes.
func (w *world) check(v *view, allowed ...string) {
	o := run("check", v.cow, "--origin", w.originPath)
	if o.status == 0 {
		return
	}
	if o.status != 1 {
		w.fail("%v", o)
	}
	for line := range strings.Lines(o.out) {
		if i := strings.Index(line, "DS0"); i >= 0 && !slices.ContainsFunc(allowed, func(c string) bool { return strings.HasPrefix(line[i:], c) }) {
			w.fail("%v", o)
		}
	}
}

// noLeftovers checks that the directory of COW devices holds nothing else.
func (w *world) noLeftovers() {
	list, err := os.ReadDir(w.cowDir)
	w.must(err, "COW folder")
	for _, e := range list {
		if strings.HasSuffix(e.Name(), ".part") { // of a process that was killed
			w.must(os.Remove(filepath.Join(w.cowDir, e.Name())), "left-over")
			continue
		}
		if !slices.ContainsFunc(w.views, func(v *view) bool { return filepath.Base(v.cow) == e.Name() }) {
			w.fail("%s is left", e.Name())
		}
	}
}

// remove removes a snapshot that is not served from the world.
func (w *world) remove(v *view) {
	w.must(errors.Join(os.Remove(v.cow), syncDir(w.cowDir)), "remove")
	w.views = slices.DeleteFunc(w.views, func(o *view) bool { return o == v })
}

// waitFor polls until f is true, for at most ten seconds.
func (w *world) waitFor(what string, f func() bool) {
	for late := time.Now().Add(10 * time.Second); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(late) {
			w.fail("%s: it does not happen\n%.20000s", what, w.server.log())
		}
	}
}
