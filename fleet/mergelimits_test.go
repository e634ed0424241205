package fleet

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/server/api"
)

// TestMergeIntoWritable merges into a disk that is exported: not while it has clients, and it is not exported meanwhile.
func TestMergeIntoWritable(t *testing.T) {
	f := newFleet(t, Options{})
	newWritable(t, f)
	f.fork("base", "a")
	f.fork("base", "sibling")
	sibling := readAll(t, f.dial("sibling"))
	base := f.dial("base")
	put(t, base, 8192, "written to the disk") // a shows what was there before
	put(t, f.dial("a"), 0, "written to a")
	if _, err := f.Merge(t.Context(), "a"); codeOf(err) != api.CodeInUse {
		t.Errorf("while the disk has a client: %v", err)
	}
	put(t, base, 16384, "still connected")
	base.Close()
	waitFor(t, "disconnection", func() bool { c, _ := f.nbd.Counters("base"); return c.Connections == 0 })

	merged := readAll(t, f.dial("a"))
	var exported atomic.Int64
	f.mu.Lock()
	f.appended = func(c *change) {
		if c.Op == "merge" || c.Op == "merged" {
			if _, ok := f.nbd.Counters("base"); ok || f.disks["base"].exported != nil {
				exported.Add(1)
			}
		}
	}
	f.mu.Unlock()
	f.merge("a")
	if exported.Load() > 0 {
		t.Error("the disk was exported while it was a mixture")
	}
	verify := func() {
		t.Helper()
		if !bytes.Equal(readAll(t, f.dial("base")), merged) || !bytes.Equal(readAll(t, f.dial("a")), merged) {
			t.Error("the disk, or the node, is not what the node was")
		}
		if !bytes.Equal(readAll(t, f.dial("sibling")), sibling) {
			t.Error("the sibling shows something else")
		}
	}
	verify()
	f.restart()
	verify()
	put(t, f.dial("base"), 0, "written again")
	want(t, f.dial("a"), 0, "written to a")
}

// TestMergeOfLarger makes a disk longer that a larger node is merged into. What else lies over it shows zeros there.
func TestMergeOfLarger(t *testing.T) {
	f := newFleet(t, Options{})
	const size = 2*testSize + 512
	f.fork("golden", "sibling")
	for _, name := range []string{"big", "big2", "empty"} {
		if _, err := f.Fork(t.Context(), api.ForkRequest{From: "golden", Name: name, Size: size}); err != nil {
			t.Fatal(err)
		}
	}
	put(t, f.dial("big"), 0, "big")
	put(t, f.dial("big"), testSize-2, "across the old end")
	put(t, f.dial("big"), size-3, "end")
	put(t, f.dial("big2"), 2*testSize, "of big2")
	put(t, f.dial("sibling"), testSize-4, "last")
	shown := map[string][]byte{}
	for _, name := range []string{"sibling", "big", "big2", "empty"} {
		shown[name] = readAll(t, f.dial(name))
	}
	verify := func(disk string) {
		t.Helper()
		for name, want := range shown {
			if got := readAll(t, f.dial(name)); !bytes.Equal(got, want) {
				t.Errorf("%s differs at byte %d", name, firstDifference(got, want))
			}
		}
		if got, err := os.ReadFile(f.golden); err != nil || !bytes.Equal(got, shown[disk]) {
			t.Errorf("the disk is not what %s shows: %v", disk, err)
		}
	}
	for _, name := range []string{"big", "big2", "empty"} { // the last one shows nothing but zeros behind the old end
		f.merge(name)
		verify(name)
		f.restart()
		verify(name)
	}
	if d, err := f.Disk("golden"); err != nil || d.SizeBytes != size {
		t.Errorf("%+v %v", d, err)
	}
	f.fork("golden", "later")
	if got := readAll(t, f.dial("later")); !bytes.Equal(got, shown["empty"]) {
		t.Error("a fork of the disk is not the disk")
	}
	if _, err := f.Merge(t.Context(), "sibling"); codeOf(err) != api.CodeBadRequest {
		t.Errorf("a node that is smaller than its disk: %v", err)
	}
}

// TestMergeOfLargerIsRefused of a disk that can't be made longer.
func TestMergeOfLargerIsRefused(t *testing.T) {
	f := newFleet(t, Options{Open: func(name string, o cowfile.OriginOptions) (cowfile.Origin, error) {
		dev, err := cowfile.OpenRaw(name, o)
		return fixedSize{dev}, err
	}})
	if _, err := f.Fork(t.Context(), api.ForkRequest{From: "golden", Name: "big", Size: 2 * testSize}); err != nil {
		t.Fatal(err)
	}
	put(t, f.dial("big"), 0, "big")
	if _, err := f.Merge(t.Context(), "big"); codeOf(err) != api.CodeBadRequest {
		t.Error(err)
	}
	want(t, f.dial("big"), 0, "big")
	if err := f.Drop(t.Context(), "big"); err != nil {
		t.Error(err)
	}
}

// fixedSize is an origin that can't be made longer.
type fixedSize struct{ cowfile.Origin }

// faultyOrigin is an origin whose writes and flushes fail as the test asks.
type faultyOrigin struct {
	block.Forward // the methods below say which of the two is meant where both have one
	cowfile.Origin
}

func (o faultyOrigin) ReadAt(p []byte, off int64) (int, error)  { return o.Forward.ReadAt(p, off) }
func (o faultyOrigin) WriteAt(p []byte, off int64) (int, error) { return o.Forward.WriteAt(p, off) }
func (o faultyOrigin) Flush() error                             { return o.Forward.Flush() }
func (o faultyOrigin) Size() int64                              { return o.Forward.Size() }

// TestMergeFails has the n-th operation on the disk fail, for all n: the merge fails, and then it is begun again, or taken
// back, and the node dropped. Nobody but the disk shows anything else, ever.
func TestMergeFails(t *testing.T) {
	for n := int64(1); ; n++ {
		if !mergeFails(t, n) {
			if n < 4 {
				t.Errorf("only %d operations", n)
			}
			return
		}
	}
}

// mergeFails has the n-th write or flush fail, and reports whether there was one.
func mergeFails(t *testing.T, n int64) (failed bool) {
	var count, failAt atomic.Int64
	failAt.Store(-1)
	f := newFleet(t, Options{Open: func(name string, o cowfile.OriginOptions) (cowfile.Origin, error) {
		dev, err := cowfile.OpenRaw(name, o)
		if err != nil {
			return nil, err
		}
		return faultyOrigin{block.NewForward(blocktest.NewFaulty(dev, func(op blocktest.Op) error {
			if op.Kind != blocktest.Read && failAt.Load() >= 0 && count.Add(1) == failAt.Load() {
				return unix.EIO
			}
			return nil
		})), dev}, nil
	}})
	original, err := os.ReadFile(f.golden)
	if err != nil {
		t.Fatal(err)
	}
	f.fork("golden", "a")
	f.fork("golden", "sibling")
	put(t, f.dial("a"), 0, "written to a")
	put(t, f.dial("a"), 300_000, "in two places")
	f.checkpoint("c", "a")
	put(t, f.dial("sibling"), 4096, "of the sibling")
	shown := map[string][]byte{"a": readAll(t, f.dial("a")), "sibling": readAll(t, f.dial("sibling"))}
	verify := func(names ...string) {
		t.Helper()
		for _, name := range names {
			if got := readAll(t, f.dial(name)); !bytes.Equal(got, shown[name]) {
				t.Errorf("operation %d failed: %s differs at byte %d", n, name, firstDifference(got, shown[name]))
			}
		}
	}
	failAt.Store(n)
	if _, err := f.Merge(t.Context(), "a"); err != nil { // it did not begin
		if !errors.Is(err, unix.EIO) {
			t.Error(err)
		}
		verify("a", "sibling")
		if err := f.Drop(t.Context(), "a"); err != nil {
			t.Error(err)
		}
		f.reopenFailed()
		verify("sibling")
		f.stop()
		return true
	}
	var d api.Disk
	waitFor(t, "merge", func() bool {
		d, err = f.Disk("golden")
		return err == nil && d.Merge.State != api.MergeRunning
	})
	verify("a", "sibling")
	failAt.Store(-1)
	if d.Merge.State == api.MergeDone {
		f.stop()
		return false
	}
	if err := f.Drop(t.Context(), "a"); codeOf(err) != api.CodeMerging {
		t.Errorf("drop of a node whose merge failed: %v", err)
	}
	if _, err := f.Fork(t.Context(), api.ForkRequest{From: "golden", Name: "x"}); codeOf(err) != api.CodeMerging {
		t.Errorf("fork of a disk that is a mixture: %v", err)
	}
	// A failed flush stays failed until the file is opened again, and a start continues the merge.
	if _, err := f.TakeBackMerge(t.Context(), "a"); err != nil {
		if !errors.Is(err, unix.EIO) {
			t.Error(err)
		}
		verify("a", "sibling")
		f.reopenFailed()
		f.waitMerged("golden")
		verify("a", "sibling")
		f.stop()
		return true
	}
	if got, err := os.ReadFile(f.golden); err != nil || !bytes.Equal(got, original) {
		t.Errorf("operation %d failed: the disk is not what it was before the merge: %v", n, err)
	}
	verify("a", "sibling")
	if n%2 == 0 {
		f.merge("a")
		verify("a", "sibling")
	} else if err := f.Drop(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	f.fork("golden", "x")
	verify("sibling")
	f.restart()
	verify("sibling")
	f.stop()
	return true
}

// reopenFailed is restart for a fleet whose disk failed, which Close says.
func (f *testFleet) reopenFailed() {
	f.t.Helper()
	f.cancel()
	if err := f.wait(); err != nil {
		f.t.Error(err)
	}
	f.Close()
	checkLayers(f.t, f.dir)
	f.open()
}

// TestTakeBack takes back the merge of a node into a writable disk, after a kill at its very end: the node has the size of the
// disk, or is larger.
func TestTakeBack(t *testing.T) {
	t.Run("same size", func(t *testing.T) { takeBack(t, testSize) })
	t.Run("larger", func(t *testing.T) { takeBack(t, 2*testSize) })
}

func takeBack(t *testing.T, size int64) {
	f := newFleet(t, Options{})
	newWritable(t, f)
	if _, err := f.Fork(t.Context(), api.ForkRequest{From: "base", Name: "big", Size: size}); err != nil {
		t.Fatal(err)
	}
	put(t, f.dial("big"), size-50, "at the end")
	put(t, f.dial("big"), 0, "at the beginning")
	if err := f.dial("big").Flush(); err != nil {
		t.Fatal(err)
	}
	c := f.dial("base")
	put(t, c, 4096, "before the merge")
	before := readAll(t, c)
	c.Close()
	waitFor(t, "disconnection", func() bool { c, _ := f.nbd.Counters("base"); return c.Connections == 0 })
	// A copy of what a kill leaves when the merge has copied, and is not recorded as complete.
	where := testhost.ShortDir(t)
	f.mu.Lock()
	f.appended = func(c *change) {
		if c.Op == "preserve" && f.state.Disks["base"].Merging != "" {
			copyDirectory(t, f.dir, filepath.Join(where, "f"))
			copyFile(t, filepath.Join(filepath.Dir(f.golden), "base.img"), filepath.Join(where, "base.img"))
		}
	}
	f.mu.Unlock()
	f.merge("big")
	f.stop()
	s, _, _, err := loadState(filepath.Join(where, "f"))
	if err != nil {
		t.Fatal(err)
	}
	moveDisk(t, filepath.Join(where, "f"), s, "base", filepath.Join(where, "base.img"))
	f.dir = filepath.Join(where, "f")
	failing := &atomic.Bool{}
	failing.Store(true)
	f.opts.Open = func(name string, o cowfile.OriginOptions) (cowfile.Origin, error) {
		dev, err := cowfile.OpenRaw(name, o)
		if err != nil {
			return nil, err
		}
		return faultyOrigin{block.NewForward(blocktest.NewFaulty(dev, func(op blocktest.Op) error {
			if op.Kind != blocktest.Read && op.Kind != blocktest.Flush && failing.Load() {
				return unix.EIO
			}
			return nil
		})), dev}, nil
	}
	f.open()
	waitFor(t, "merge", func() bool { d, err := f.Disk("base"); return err == nil && d.Merge.State == api.MergeFailed })
	if d, err := f.Disk("base"); err != nil || d.URI != "" || d.SizeBytes != size {
		t.Errorf("%+v %v", d, err)
	}
	failing.Store(false)
	disk := filepath.Join(where, "base.img")
	if err := merge.CheckOrigin(disk); !errors.Is(err, merge.ErrMixture) {
		t.Errorf("a merge that failed: %v", err)
	}
	if _, err := f.TakeBackMerge(t.Context(), "big"); err != nil {
		t.Fatal(err)
	}
	if err := merge.CheckOrigin(disk); err != nil {
		t.Errorf("a merge that was taken back: %v", err)
	}
	if got, want := readAll(t, f.dial("base")), append(bytes.Clone(before), make([]byte, size-testSize)...); !bytes.Equal(got, want) {
		t.Errorf("the disk differs from what it was at byte %d", firstDifference(got, want))
	}
	want(t, f.dial("big"), size-50, "at the end")
	want(t, f.dial("big"), 4096, "0123456789abcdef")
	if _, err := f.TakeBackMerge(t.Context(), "big"); codeOf(err) != api.CodeNoMerge {
		t.Errorf("taken back twice: %v", err)
	}
	if err := f.Drop(t.Context(), "big"); err != nil {
		t.Error(err)
	}
	f.stop()
}
