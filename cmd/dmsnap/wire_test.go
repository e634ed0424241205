package main

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
)

// dial connects to an export.
func dial(t *testing.T, uri string) *nbd.Client {
	t.Helper()
	c, err := nbd.Dial(t.Context(), uri, "dmsnap:changed")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Names that mean something to URIs, shells or terminals reach their export by the URI that is printed.
func TestOddNamesOverTheWire(t *testing.T) {
	p := newPair(t)
	names := []string{"a b", "a&b=c", "50%", "what?", "#1", "a+b", "ünï/çødé", "/a//b/", "new\nline", "tab\t", `"q"`, "x;y"}
	r := start(t, p, serveOptions{create: true}, "first="+p.cow)
	for i, name := range names {
		s, err := r.Attach(api.AttachRequest{Name: name, COW: filepath.Join(p.dir, string(rune('a'+i))+".cow"), Create: true})
		if err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		c := dial(t, s.URI)
		writeAt(t, c, []byte(name), 4096)
		if got := readAll(t, r.dev(name))[4096:]; !bytes.HasPrefix(got, []byte(name)) {
			t.Errorf("%q: %s is another export", name, s.URI)
		}
		mustRun(t, "status", "--control", r.control)
		mustRun(t, "drop", "--control", r.control, name)
	}
}

// The default export, what the server says of an export, and the abilities of a snapshot.
func TestSnapshotOverTheWire(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	r := start(t, p, serveOptions{exportOrigin: true}, p.cow)
	c := dial(t, r.uri(""))
	if i := c.Info(); !i.CanTrim || !i.CanFUA || !i.MultiConn || i.ReadOnly || i.Size != int64(len(shown)) || i.PreferredBlock != 4096 {
		t.Errorf("the default export: %+v", i)
	}
	if i := dial(t, r.uri(server.OriginName)).Info(); i.CanTrim || i.ReadOnly {
		t.Errorf("the origin: %+v", i)
	}
	if !bytes.Equal(readAll(t, c), shown) {
		t.Error("the default export is another disk")
	}
	// Five chunks live in the COW file: 0, 24 and 25, 122, 256.
	var inCOW []int64
	for off := int64(0); off < c.Size(); {
		es, err := c.BlockStatus("dmsnap:changed", off, c.Size()-off)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range es {
			if e.Flags == snapshot.InCOW {
				inCOW = append(inCOW, off/4096, e.Length)
			}
			off += e.Length
		}
	}
	if want := []int64{0, 4096, 24, 8192, 122, 4096, 256, 2048}; !equal(inCOW, want) {
		t.Errorf("dmsnap:changed reports %v, want %v", inCOW, want)
	}
	if err := c.Discard(24*4096, 8192); err != nil {
		t.Fatal(err)
	}
	clear(shown[24*4096 : 26*4096])
	if !bytes.Equal(readAll(t, c), shown) {
		t.Error("trimmed chunks that live in the COW file do not read as zeros, or others changed")
	}
	if err := c.WriteDurableAt([]byte("durable"), 300_000); err != nil {
		t.Fatal(err)
	}
	if st := mustJSON[inspect.Status](t, "status", p.cow); st.Exceptions != 6 {
		t.Errorf("%d exceptions on disk after a durable write, want 6", st.Exceptions)
	}
}

func equal(a, b []int64) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// Clients of a snapshot's export notice nothing of its live merge, whenever it begins.
func TestLiveMergeOverTheWire(t *testing.T) {
	p, shown := bigPair(t)
	r := start(t, p, serveOptions{exportOrigin: true}, p.cow)
	var clients sync.WaitGroup
	part := len(shown) / 3 &^ 4095 // of the disk for each client: two of the snapshot's export, one of the origin
	var warm sync.WaitGroup
	for i := range 2 {
		c := dial(t, r.uri("disk"))
		warm.Add(1)
		clients.Go(func() { useDisk(t, c, int64(i*part), shown[i*part:(i+1)*part], uint64(i), warm.Done) })
	}
	warm.Wait()
	if _, err := r.StartMerge("disk"); err != nil {
		t.Fatal(err)
	}
	o := dial(t, r.uri(server.OriginName))
	clients.Go(func() { useDisk(t, o, int64(2*part), shown[2*part:3*part], 2, func() {}) })
	m := mustJSON[api.Merge](t, "merge", "--control", r.control, "--wait")
	if m.State != api.MergeDone {
		t.Errorf("merge %+v", m)
	}
	clients.Wait()
	if !bytes.Equal(readAll(t, dial(t, r.uri("disk"))), shown) {
		t.Error("the snapshot's export shows something else than was written")
	}
	r.stop()
	wantContent(t, p.origin, shown)
}

// useDisk writes to the part of a disk that begins at off, of which model is the content, and reads it
// back. It calls warm once when it is in the middle of it, or ends before.
func useDisk(t *testing.T, dev block.Device, off int64, model []byte, seed uint64, warm func()) {
	warm = sync.OnceFunc(warm)
	defer warm()
	r := rand.New(rand.NewPCG(seed, 1))
	got := make([]byte, 32<<10)
	for i := range 400 {
		if i == 50 {
			warm()
		}
		n := 1 + r.IntN(len(got))
		at := r.IntN(len(model) - n)
		for j := range n {
			model[at+j] = byte(r.Uint32())
		}
		if _, err := dev.WriteAt(model[at:at+n], off+int64(at)); err != nil {
			t.Error(err)
			return
		}
		at = r.IntN(len(model) - n)
		if _, err := dev.ReadAt(got[:n], off+int64(at)); err != nil || !bytes.Equal(got[:n], model[at:at+n]) {
			t.Errorf("request %d: wrong content at %d (%v)", i, off+int64(at), err)
			return
		}
		if i%100 == 99 {
			if err := dev.Flush(); err != nil {
				t.Error(err)
			}
		}
	}
}

// A drop ends the connections of its export alone; the disk of the others goes on.
func TestDropOverTheWire(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	other := filepath.Join(p.dir, "other.cow")
	r := start(t, p, serveOptions{create: true}, p.cow, other)
	a, b, def := dial(t, r.uri("disk")), dial(t, r.uri("other")), r.uri("")
	writeAt(t, a, []byte("kept, though not flushed"), 700_000)
	mustRun(t, "drop", "--control", r.control, "disk")
	if _, err := a.WriteAt([]byte("x"), 0); err == nil {
		t.Error("a write to a dropped export worked")
	}
	writeAt(t, b, []byte("x"), 0)
	if c, err := nbd.Dial(t.Context(), def); err == nil {
		c.Close()
		t.Error("the default export goes on as another disk")
	}
	if st := mustJSON[inspect.Status](t, "status", p.cow); st.Exceptions != 6 || st.InUse {
		t.Errorf("the dropped store: %+v", st)
	}
}

// A full COW file is an error to the client of that snapshot, and to nobody else.
func TestOverflowOverTheWire(t *testing.T) {
	for kind, want := range map[snapshot.StoreType]api.State{snapshot.Persistent: "invalid", snapshot.PersistentOverflow: "overflow"} {
		p := newPair(t)
		mustRun(t, "create", p.origin, p.cow, "--cow-size", "64k")
		r := start(t, p, serveOptions{exportOrigin: true, store: storeFlag{kind}, onFull: fullFlag{server.FullInvalidate}}, p.cow)
		c, o := dial(t, r.uri("disk")), dial(t, r.uri(server.OriginName))
		if _, err := c.WriteAt(make([]byte, 100<<10), 0); !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%v: a write that does not fit: %v", kind, err)
		}
		if st := mustJSON[api.Status](t, "status", "--control", r.control).Snapshots[0]; st.State != want {
			t.Errorf("%v: %+v, want %s", kind, st, want)
		}
		if kind == snapshot.PersistentOverflow {
			readAll(t, c) // reads go on
		}
		writeAt(t, o, []byte("the origin goes on"), 800_000)
	}
}
