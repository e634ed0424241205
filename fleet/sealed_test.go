package fleet

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
)

// dialFor connects to an export by its URI, with meta contexts.
func (f *testFleet) dialFor(uri string, contexts ...string) *nbd.Client {
	f.t.Helper()
	c, err := nbd.Dial(f.t.Context(), uri, contexts...)
	if err != nil {
		f.t.Fatalf("%s: %v", uri, err)
	}
	f.t.Cleanup(func() { c.Close() })
	return c
}

// bitsOf returns which bytes a context has set, a byte of the result for each.
func bitsOf(t testing.TB, c *nbd.Client, context string) []byte {
	t.Helper()
	bits := make([]byte, 0, c.Size())
	for off := int64(0); off < c.Size(); {
		list, err := c.BlockStatus(context, off, c.Size()-off)
		if err != nil || len(list) == 0 {
			t.Fatalf("%s at byte %d: %v, %v", context, off, list, err)
		}
		for _, e := range list {
			bits = append(bits, bytes.Repeat([]byte{byte(e.Flags)}, int(e.Length))...)
			off += e.Length
		}
	}
	return bits
}

// compareSealed compares the exports of all checkpoints with models, and what their contexts say with the differences. It
// returns how many contexts it looked at.
func (f *testFleet) compareSealed(models map[string][]byte) (contexts int) {
	f.t.Helper()
	for _, e := range f.Tree().Elements {
		if e.Kind != api.KindCheckpoint {
			continue
		}
		all, err := f.Layers(e.Name)
		if err != nil {
			f.t.Fatal(err)
		}
		content := make([][]byte, len(all.Layers))
		for i, l := range all.Layers {
			c := f.dialFor(l.URI, "dmsnap:changed")
			content[i] = readAll(f.t, c)
			if want := models[l.Name]; want != nil && !bytes.Equal(content[i], want) {
				f.t.Fatalf("%s differs from its model at byte %d", l.Name, firstDifference(content[i], want))
			}
			for j, lower := range all.Layers[:i] {
				name := "qemu:dirty-bitmap:" + lower.Name
				d := f.dialFor(l.URI, name)
				bits := bitsOf(f.t, d, name)
				for at := range bits {
					if content[i][at] != content[j][at] && bits[at] != 1 {
						f.t.Fatalf("%s: byte %d differs, and %s has %d", l.Name, at, name, bits[at])
					}
				}
				if own := bitsOf(f.t, c, "dmsnap:changed"); j == i-1 && !bytes.Equal(own, bits) {
					f.t.Fatalf("%s: dmsnap:changed and %s differ", l.Name, name)
				}
				contexts++
				d.Close()
			}
			c.Close()
		}
		if last := all.Layers[len(all.Layers)-1]; last.Name != e.Name {
			f.t.Fatalf("the uppermost layer of %s is %s", e.Name, last.Name)
		}
	}
	return contexts
}

// Checkpoints are exports that are only read, with contexts that say what changed, while the node is written.
func TestSealedExports(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm1")
	vm1 := f.dial("vm1")
	put(t, vm1, 5000, "one")
	f.checkpoint("one", "vm1")
	put(t, vm1, 100_000, "two")
	f.checkpoint("two", "vm1")
	put(t, vm1, 5000, "now")

	two := f.dialFor(f.uri("vm1@two"), "qemu:dirty-bitmap:vm1@one", "qemu:dirty-bitmap:golden", "dmsnap:changed", "qemu:dirty-bitmap:vm1@two")
	want(t, two, 5000, "one")
	want(t, two, 100_000, "two")
	want(t, f.dial("vm1@~1"), 5000, "one")
	want(t, f.dial("golden@~0"), 5000, string([]byte{byte(5000>>12) ^ byte(5000%256)}))
	if got := two.Info(); !got.ReadOnly || !got.MultiConn || !slices.Equal(got.Contexts, []string{"base:allocation", "dmsnap:changed", "qemu:dirty-bitmap:golden", "qemu:dirty-bitmap:vm1@one"}) {
		t.Errorf("%+v", got)
	}
	if _, err := two.WriteAt([]byte("x"), 0); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("a write: %v", err)
	}
	since := func(c *nbd.Client, context string) (list []int) {
		for at, bit := range bitsOf(t, c, context) {
			if bit == 1 && at%4096 == 0 {
				list = append(list, at/4096)
			}
		}
		return list
	}
	for context, want := range map[string][]int{"dmsnap:changed": {24}, "qemu:dirty-bitmap:vm1@one": {24}, "qemu:dirty-bitmap:golden": {1, 24}} {
		if got := since(two, context); !slices.Equal(got, want) {
			t.Errorf("%s: chunks %v, want %v", context, got, want)
		}
	}
	for _, name := range []string{"vm1@three", "vm1@~3", "vm1@~01", "vm2@~1", "golden@~1", "golden@~", "other@~0", "@~0", "vm1@"} {
		if _, err := nbd.Dial(t.Context(), f.uri(name)); err == nil {
			t.Errorf("there is an export %s", name)
		}
	}
	if list := f.nbd.Names(); !slices.Equal(list, []string{"vm1"}) {
		t.Errorf("listed: %q", list)
	}
	for name, disk := range map[string]string{"vm1": "golden", "golden": "golden", "vm1@one": "golden", "vm1@~1": "golden", "golden@~0": "golden", "vm1@none": ""} {
		if got := f.DiskOf(name); got != disk {
			t.Errorf("the disk of %s is %q", name, got)
		}
	}
	if n := f.compareSealed(nil); n != 4 {
		t.Errorf("%d contexts", n)
	}
	f.restart()
	if n := f.compareSealed(nil); n != 4 {
		t.Errorf("%d contexts after a restart", n)
	}
}

// A connection keeps what it reads: its checkpoint may be forgotten, squashed and dropped. In the end nothing is left.
func TestSealedIsKept(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm1")
	vm1 := f.dial("vm1")
	for i, name := range []string{"one", "two", "three"} {
		put(t, vm1, int64(i)*50_000, name)
		f.checkpoint(name, "vm1")
	}
	context := "qemu:dirty-bitmap:vm1@one"
	three, one := f.dialFor(f.uri("vm1@three"), context), f.dialFor(f.uri("vm1@one"))
	before, bits := readAll(t, three), bitsOf(t, three, context)
	for _, name := range []string{"vm1@one", "vm1@two"} {
		if err := f.Forget(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Squash(t.Context(), api.SquashRequest{Node: "vm1@three"}); err != nil {
		t.Fatal(err)
	}
	same := func(what string) {
		t.Helper()
		f.reap()
		if !bytes.Equal(readAll(t, three), before) || !bytes.Equal(bitsOf(t, three, context), bits) {
			t.Errorf("%s: it shows something else", what)
		}
		want(t, one, 0, "one")
	}
	same("squashed")
	for _, name := range []string{"vm1", "vm1@three"} {
		if err := f.Drop(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	same("dropped")
	if _, err := nbd.Dial(t.Context(), f.uri("vm1@three")); err == nil {
		t.Error("a new client finds what was dropped")
	}
	three.Close()
	one.Close()
	waitFor(t, "files", func() bool {
		f.reap()
		files, err := filepath.Glob(filepath.Join(f.dir, layersDir, "*"))
		return err == nil && len(files) == 0
	})
}

// What a client reads of a checkpoint is durable.
func TestSealedIsDurable(t *testing.T) {
	f := newFleet(t, Options{})
	f.fork("golden", "vm1")
	put(t, f.dial("vm1"), 0, "content")
	f.checkpoint("one", "vm1")
	if e, err := f.Element("vm1@one"); err != nil || e.Durable {
		t.Skipf("it is durable already: %v", err)
	}
	f.dial("vm1@one")
	if e, err := f.Element("vm1@one"); err != nil || !e.Durable {
		t.Errorf("%+v, %v", e, err)
	}
	crashed := filepath.Join(t.TempDir(), "copy")
	if err := os.MkdirAll(crashed, 0o700); err != nil {
		t.Fatal(err)
	}
	copyDirectory(t, f.dir, crashed)
	after, err := Open(crashed, Options{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := after.pinSealed("vm1@one")
	if err != nil {
		t.Fatal(err)
	}
	want(t, s.chain, 0, "content")
	s.release(after)
	if err := after.Close(); err != nil {
		t.Error(err)
	}
	checkLayers(t, crashed)
}

// Of a disk that is written, nodes and clients of what is beneath them have what it was.
func TestSealedDiskIsWritten(t *testing.T) {
	f := newFleet(t, Options{})
	newWritable(t, f)
	base := f.dial("base")
	f.fork("base", "a")
	put(t, f.dial("a"), 4096, "aaaa")
	f.checkpoint("x", "a")
	put(t, base, 0, "AAAA")
	f.fork("base", "b")
	put(t, f.dial("b"), 0, "bbbb")
	f.checkpoint("x", "b")
	put(t, base, 0, "BBBB")
	var kept []*nbd.Client
	for node, has := range map[string]string{"a": "0123", "b": "AAAA"} {
		l, err := f.Layers(node + "@x")
		if err != nil || len(l.Layers) != 2 || l.Layers[0].Source != "" || l.Layers[0].Name != "base" {
			t.Fatalf("%+v, %v", l, err)
		}
		c := f.dialFor(l.Layers[0].URI)
		want(t, c, 0, has)
		kept = append(kept, c)
		if _, err := nbd.Dial(t.Context(), f.uri("base@~0")); err == nil {
			t.Error("there is an export of the disk as it never was written")
		}
	}
	before := [][]byte{readAll(t, kept[0]), readAll(t, kept[1])}
	f.fork("base", "c") // a further generation
	put(t, base, 0, "CCCC")
	for _, name := range []string{"a", "a@x", "b", "b@x"} {
		if err := f.Drop(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	f.reap()
	put(t, base, 8192, "DDDD")
	for i, c := range kept {
		if !bytes.Equal(readAll(t, c), before[i]) {
			t.Error("it shows something else")
		}
	}
}

// Seal makes a checkpoint of what was written, and none when nothing was.
func TestSeal(t *testing.T) {
	froze := 0
	f := newFleet(t, Options{Freeze: func(_ context.Context, thaw bool, nodes []string) error {
		if !thaw {
			froze++
		}
		return nil
	}})
	f.fork("golden", "vm1")
	names := func(l api.Layers, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		var list []string
		for _, e := range l.Layers {
			list = append(list, e.Name)
		}
		return strings.Join(list, " ")
	}
	if got := names(f.Seal(t.Context(), "vm1")); got != "golden" || froze != 0 {
		t.Errorf("nothing was written: %s, frozen %d times", got, froze)
	}
	vm1 := f.dial("vm1")
	put(t, vm1, 0, "one")
	l, err := f.Seal(t.Context(), "vm1")
	if got := names(l, err); got != "golden vm1@~1" || froze != 1 {
		t.Errorf("%s, frozen %d times", got, froze)
	}
	put(t, vm1, 0, "two")
	c := f.dialFor(l.Layers[1].URI)
	want(t, c, 0, "one")
	f.checkpoint("named", "vm1")
	if got := names(f.Seal(t.Context(), "vm1")); got != "golden vm1@~1 vm1@named" {
		t.Error(got)
	}
	if got := names(f.Layers("vm1@~1")); got != "golden vm1@~1" {
		t.Error(got)
	}
	for name, code := range map[string]api.Code{"vm2": api.CodeNoSuchNode, "vm1@named": api.CodeSealed} {
		if _, err := f.Seal(t.Context(), name); codeOf(err) != code {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := f.Layers("golden"); codeOf(err) != api.CodeNoSuchElement {
		t.Errorf("the layers of a disk: %v", err)
	}
}
