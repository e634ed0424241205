package ondemand_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testremote"
	"github.com/dmsnap/dmsnap/layer"
	"github.com/dmsnap/dmsnap/publish"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/cache"
	"github.com/dmsnap/dmsnap/source/ondemand"
	"github.com/dmsnap/dmsnap/source/remote"
	"github.com/dmsnap/dmsnap/store"
)

const diskSize = 6<<20 - 512

// A golden disk: a base and two stores in a registry, and what is seen.
type golden struct {
	registry *testremote.Registry
	faults   *testremote.Faults
	ref      string
	content  []byte
}

// push makes a disk and pushes it.
func push(t testing.TB, seed uint64) *golden {
	t.Helper()
	g := &golden{registry: testremote.NewRegistry()}
	g.faults = &testremote.Faults{Next: g.registry}
	g.ref = "oci://" + testremote.Start(t, g.faults) + "/golden/disk:1"
	g.content = g.pushTo(t, g.ref, seed)
	return g
}

// pushTo pushes a disk of which a third is zeros, and returns its content.
func (g *golden) pushTo(t testing.TB, ref string, seed uint64) []byte {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 3))
	shown := make([]byte, diskSize)
	for off := 0; off < diskSize; off += 16 << 10 {
		if r.IntN(3) > 0 {
			copy(shown[off:], bytes.Repeat(blocktest.Pattern(512, r.Uint64()), 1+r.IntN(32)))
		}
	}
	base := block.NewMemory(diskSize)
	write(t, base, shown, 0)
	var under block.Device = base
	var stores []*store.Store
	for range 2 {
		cow := block.NewMemory(8 << 20)
		snap, err := snapshot.NewOrigin(under).Attach(cow, snapshot.Options{ChunkSectors: 8})
		if err != nil {
			t.Fatal(err)
		}
		for range 40 {
			off := r.IntN(diskSize - 8192)
			p := make([]byte, 1+r.IntN(8192))
			if r.IntN(4) > 0 {
				copy(p, blocktest.Pattern(len(p), r.Uint64()))
			}
			write(t, snap, p, int64(off))
			copy(shown[off:], p)
		}
		if err := snap.Close(); err != nil {
			t.Fatal(err)
		}
		st, err := store.OpenToRead(cow)
		if err != nil {
			t.Fatal(err)
		}
		view, err := store.NewView(under, st)
		if err != nil {
			t.Fatal(err)
		}
		under, stores = view, append(stores, st)
	}
	repo, err := remote.Open(ref, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := publish.Push(context.Background(), repo, base, stores, publish.Options{Temp: t.TempDir()}); err != nil {
		t.Fatal(err)
	}
	return shown
}

func write(t testing.TB, dev block.Device, p []byte, off int64) {
	t.Helper()
	if _, err := dev.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

func openCache(t testing.TB, dir string) *cache.Cache {
	t.Helper()
	c, err := cache.Open(dir, cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func open(t testing.TB, ref string, o ondemand.Options) *ondemand.Disk {
	t.Helper()
	if o.Cache == nil {
		o.Cache = openCache(t, t.TempDir())
	}
	d, err := ondemand.Open(context.Background(), ref, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// readSome reads at random. An error is returned; other bytes than those of want end the test.
func readSome(t testing.TB, d block.Device, want []byte, n int, seed uint64) error {
	r := rand.New(rand.NewPCG(seed, 9))
	for range n {
		if err := readOnce(t, d, want, r); err != nil {
			return err
		}
	}
	return nil
}

// readOnce is one read of readSome.
func readOnce(t testing.TB, d block.Device, want []byte, r *rand.Rand) error {
	off := r.IntN(len(want))
	b := make([]byte, 1+r.IntN(min(len(want)-off, 1<<(8+r.IntN(8)))))
	if _, err := d.ReadAt(b, int64(off)); err != nil {
		return err
	}
	if !bytes.Equal(b, want[off:off+len(b)]) {
		t.Fatalf("%d bytes at byte %d are others", len(b), off)
	}
	return nil
}

func TestDevice(t *testing.T) {
	g := push(t, 1)
	d := open(t, g.ref, ondemand.Options{})
	blocktest.RunReadOnly(t, func(t *testing.T) block.Device { return d })
	if err := readSome(t, d, g.content, 500, 1); err != nil {
		t.Error(err)
	}
	if _, err := d.WriteAt(make([]byte, 512), 0); !errors.Is(err, block.ErrReadOnly) {
		t.Error(err)
	}
	f := &testremote.File{}
	f.Set(`"1"`, g.content)
	file := open(t, "http://"+testremote.Start(t, f)+"/disk.img", ondemand.Options{})
	blocktest.RunReadOnly(t, func(t *testing.T) block.Device { return file })
	if err := readSome(t, file, g.content, 500, 2); err != nil {
		t.Error(err)
	}
}

// The first read of a disk: the manifest has the description, and the pages of the index that lead there are requested side by side. A
// manifest with another description is not trusted.
func TestFirstRead(t *testing.T) {
	base := block.NewMemory(600 * layer.UnitBytes) // more than a small index
	for unit := range int64(600) {
		write(t, base, []byte{1 + byte(unit)}, unit*layer.UnitBytes)
	}
	registry := testremote.NewRegistry()
	direct := "oci://" + testremote.Start(t, registry) + "/golden/disk:1"
	repo, err := remote.Open(direct, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	pushed, err := publish.Push(context.Background(), repo, base, nil, publish.Options{Temp: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	text, err := repo.Description(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	desc, err := layer.ParseDescription(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, changed := range []bool{false, true} {
		var asked atomic.Bool
		both := make(chan struct{}, 1)
		between := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch {
			case changed && strings.Contains(r.URL.Path, "/manifests/"):
				answer := httptest.NewRecorder()
				registry.ServeHTTP(answer, r)
				w.Header().Set("Content-Type", answer.Header().Get("Content-Type"))
				w.Write(bytes.Replace(answer.Body.Bytes(), []byte(`"data":"`), []byte(`"data":"YWJj`), 1))
				return
			case strings.HasSuffix(r.URL.Path, pushed.Digest.String()):
				asked.Store(true)
			case strings.HasSuffix(r.URL.Path, desc.Index.Digest.String()): // the first two wait for each other
				select {
				case both <- struct{}{}:
				case <-both:
				}
				for deadline := time.Now().Add(10 * time.Second); len(both) > 0; time.Sleep(time.Millisecond) {
					if time.Now().After(deadline) {
						t.Error("pages of the index were requested one after the other")
						<-both
					}
				}
			}
			registry.ServeHTTP(w, r)
		})
		d := open(t, "oci://"+testremote.Start(t, between)+"/golden/disk:1", ondemand.Options{})
		var p [1]byte
		if _, err := d.ReadAt(p[:], 0); err != nil || p[0] != 1 {
			t.Errorf("%v, byte %d", err, p[0])
		}
		if asked.Load() != changed {
			t.Errorf("changed %v: the description was requested: %v", changed, asked.Load())
		}
	}
}

// Slack is what a read may take beyond its timeout: for a machine that executes other tests as well.
const slack = 3 * time.Second

// Whatever happens to answers on their way, no byte is wrong, and a read ends in time. Each round reads what is not in the cache, and meets
// faults there.
func TestFaults(t *testing.T) {
	t.Parallel()
	least := 2_000 // reads against each fault
	switch {
	case testing.Short():
		least = 400
	case os.Getenv("DMSNAP_DEEP") != "":
		least = 10_000
	}
	const perRound = 100
	for _, fault := range []testremote.Fault{testremote.Cut, testremote.Stall, testremote.Hang, testremote.Busy, testremote.Wrong, testremote.Whole, testremote.Shifted, testremote.Redirect} {
		t.Run(string(fault), func(t *testing.T) {
			t.Parallel()
			g := push(t, 2)
			file := &testremote.File{}
			file.Set(`"v1"`, g.content)
			fileFaults := &testremote.Faults{Next: file}
			url := "http://" + testremote.Start(t, fileFaults) + "/disk.img"
			odds, timeout := 0.25, remote.DefaultTimeout
			slow := fault == testremote.Stall || fault == testremote.Hang
			if slow {
				odds, timeout = 0.04, 1500*time.Millisecond
			}
			changed := fault == testremote.Wrong || fault == testremote.Shifted
			dir, reads, failed := t.TempDir(), 0, 0
			var longest time.Duration
			for round := uint64(0); reads < least; round++ {
				for _, ref := range []string{g.ref, url} {
					if ref == url && changed {
						continue // a file has no digests
					}
					c := openCache(t, filepath.Join(dir, fmt.Sprint(round/2))) // the second round finds what the first one kept
					d := open(t, ref, ondemand.Options{Cache: c, Remote: remote.Options{Timeout: timeout}})
					before, _ := d.Fetched()
					g.faults.Set(fault, odds)
					fileFaults.Set(fault, odds)
					r := rand.New(rand.NewPCG(round, 9))
					for range perRound {
						begun := time.Now()
						err := readOnce(t, d, g.content, r)
						if reads++; err != nil {
							failed++
						}
						if err != nil && (!slow && !changed || strings.Contains(err.Error(), "s3cr3t")) {
							t.Error(err)
						}
						longest = max(longest, time.Since(begun))
					}
					if after, _ := d.Fetched(); after-before < perRound/20 {
						t.Errorf("round %d: %d requests for %d reads", round, after-before, perRound)
					}
					g.faults.Set("", 0)
					fileFaults.Set("", 0)
					if slow {
						continue // on a slow machine the timeout may be too short
					}
					if err := readSome(t, d, g.content, 100, round); err != nil { // all is well again
						t.Error(err)
					}
				}
			}
			faulty := g.faults.Done() + fileFaults.Done()
			t.Logf("%d reads, %d of them failed, the longest took %v, %d faulty answers", reads, failed, longest, faulty)
			if longest > timeout+slack {
				t.Errorf("a read took %v", longest)
			}
			if faulty < least/100 {
				t.Errorf("%d answers were faulty", faulty)
			}
		})
	}
}

// Without an answer, a read ends after the timeout that is documented, 30 s, and a connection on which nothing arrives is replaced after a third
// of it.
func TestDefaultTimeout(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	t.Parallel()
	for _, fault := range []testremote.Fault{testremote.Stall, testremote.Hang} {
		t.Run(string(fault), func(t *testing.T) {
			t.Parallel()
			g := push(t, 12)
			d := open(t, g.ref, ondemand.Options{})
			g.faults.Set(fault, 1)
			begun := time.Now()
			_, err := d.ReadAt(make([]byte, diskSize), 0)
			if !errors.Is(err, block.ErrUnavailable) || !errors.Is(err, remote.ErrUnreachable) {
				t.Error(err)
			}
			if took := time.Since(begun); took > 30*time.Second+slack {
				t.Errorf("it took %v", took)
			}
			if n := g.faults.Done(); n < 3 {
				t.Errorf("%d attempts", n)
			}
		})
	}
}

// Bytes that are always wrong are an error, and never kept.
func TestWrongForever(t *testing.T) {
	g := push(t, 3)
	c := openCache(t, t.TempDir())
	d := open(t, g.ref, ondemand.Options{Cache: c})
	g.faults.Set(testremote.Wrong, 1)
	if err := readSome(t, d, g.content, 50, 1); !errors.Is(err, layer.ErrCorrupt) {
		t.Error(err)
	}
	g.faults.Set("", 0)
	if err := readSome(t, d, g.content, 50, 1); err != nil {
		t.Error(err)
	}
}

// A server that does not answer: a read fails in time, others of what is in the cache go on, and so do writes, flushes and a checkpoint of the
// engine elsewhere.
func TestHungServerBlocksNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	const timeout = 3 * time.Second
	g := push(t, 4)
	d := open(t, g.ref, ondemand.Options{Remote: remote.Options{Timeout: timeout}})
	p := make([]byte, 4096)
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	snap, err := snapshot.NewOrigin(d).Attach(block.NewMemory(8<<20), snapshot.Options{ChunkSectors: 8, Fetched: true})
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	g.faults.Set(testremote.Hang, 1)
	hung := make(chan error, 2)
	go func() {
		_, err := snap.ReadAt(make([]byte, 1<<20), 4<<20)
		hung <- err
	}()
	go func() { // it needs the rest of its chunk
		_, err := snap.WriteAt(p[:512], 2<<20)
		hung <- err
	}()
	time.Sleep(100 * time.Millisecond) // for both to begin
	done := make(chan error, 1)
	go func() {
		_, err := snap.WriteAt(p, 8192)
		err = errors.Join(err, snap.Flush())
		_, readErr := snap.ReadAt(p, 4096)
		done <- errors.Join(err, readErr)
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case err := <-hung:
		t.Errorf("a request without an answer ended first: %v", err)
		hung <- err
	}
	for range 2 {
		select {
		case err := <-hung:
			if !errors.Is(err, block.ErrUnavailable) {
				t.Errorf("a request without an answer: %v", err)
			}
		case <-time.After(timeout + slack):
			t.Errorf("a request without an answer takes longer than %v", timeout)
			d.Close() // which ends it
			return
		}
	}
	g.faults.Set("", 0) // the snapshot stays valid
	if _, err := snap.WriteAt(p[:512], 2<<20); err != nil {
		t.Error(err)
	}
	got := make([]byte, 4096)
	if _, err := snap.ReadAt(got, 2<<20); err != nil || !bytes.Equal(got[512:], g.content[2<<20+512:2<<20+4096]) || !bytes.Equal(got[:512], p[:512]) {
		t.Errorf("%v, or other bytes", err)
	}
}

// Many requests without an answer, to a server that answers others: reads of other units don't wait for them.
func TestHungRequestsDelayNoOthers(t *testing.T) {
	g := push(t, 13)
	d := open(t, g.ref, ondemand.Options{})
	got := make([]byte, 512)
	if _, err := d.ReadAt(got, 0); err != nil { // the index is here then
		t.Fatal(err)
	}
	g.faults.Set(testremote.Hang, 1)
	var hung sync.WaitGroup
	const last = 60 // unit
	for unit := int64(4); unit < last; unit += 2 {
		hung.Go(func() { d.ReadAt(make([]byte, layer.UnitBytes), unit*layer.UnitBytes) })
	}
	for begun := time.Now(); g.faults.Done() < 16; time.Sleep(time.Millisecond) {
		if time.Since(begun) > 5*time.Second {
			t.Errorf("%d requests", g.faults.Done())
			break
		}
	}
	g.faults.Set("", 0)
	begun, off := time.Now(), int64(last+1)*layer.UnitBytes
	if _, err := d.ReadAt(got, off); err != nil || !bytes.Equal(got, g.content[off:][:512]) {
		t.Errorf("%v, or other bytes", err)
	}
	if took := time.Since(begun); took > 5*time.Second { // before any connection is replaced
		t.Errorf("it ended after %v", took)
	}
	d.Close()
	hung.Wait()
}

// The error of a request without an answer says what was waited for, and where. Other attempts were made before.
func TestWhatWasWaitedFor(t *testing.T) {
	g := push(t, 14)
	address := strings.TrimPrefix(strings.TrimSuffix(g.ref, "/golden/disk:1"), "oci://")
	file := &testremote.Faults{Next: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"1"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(g.content))
	})}
	fileAddress := testremote.Start(t, file)
	deaf := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	const timeout = time.Second
	check := func(what string, err error, want ...string) {
		t.Helper()
		if !errors.Is(err, remote.ErrUnreachable) {
			t.Errorf("%s: %v", what, err)
			return
		}
		for _, part := range append(want, remote.ErrUnreachable.Error()) {
			if strings.Count(err.Error(), part) != 1 {
				t.Errorf("%s: not once %q: %v", what, part, err)
			}
		}
	}
	try := func(ref string, transport http.RoundTripper) error {
		_, err := ondemand.Open(context.Background(), ref, ondemand.Options{Cache: openCache(t, t.TempDir()), Remote: remote.Options{Timeout: timeout, Transport: transport}})
		return err
	}
	for _, s := range []struct {
		ref, address string
		faults       *testremote.Faults
	}{{g.ref, address, g.faults}, {"http://" + fileAddress + "/disk.img", fileAddress, file}} {
		check("connect", try(s.ref, deaf), s.ref, "connect to "+s.address)
		d := open(t, s.ref, ondemand.Options{Remote: remote.Options{Timeout: timeout}})
		s.faults.Set(testremote.Hang, 1)
		before := s.faults.Done()
		check("open", try(s.ref, nil), s.ref, "wait for the response of "+s.address)
		if n := s.faults.Done() - before; n < 2 {
			t.Errorf("%d attempts to open %s", n, s.ref)
		}
		_, err := d.ReadAt(make([]byte, 4096), 3<<20)
		check("read", err, s.ref, "wait for the response of "+s.address)
		s.faults.Set(testremote.Stall, 1)
		_, err = d.ReadAt(make([]byte, 4096), 3<<20)
		check("stall", err, s.ref, "receive from "+s.address)
		s.faults.Set("", 0)
	}
}

// A hundred forks, in processes of their own as far as the cache can see: each unit is fetched once.
func TestForksFetchOnce(t *testing.T) {
	g := push(t, 5)
	dir := t.TempDir()
	var forks sync.WaitGroup
	before := g.registry.Gets.Load()
	for i := range uint64(100) {
		d := open(t, g.ref, ondemand.Options{Cache: openCache(t, dir)})
		forks.Go(func() {
			if err := readSome(t, d, g.content, 20, i); err != nil {
				t.Error(err)
			}
			got := make([]byte, diskSize)
			if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, g.content) {
				t.Errorf("%v, or other bytes", err)
			}
		})
	}
	forks.Wait()
	units, descriptions := int64(3*(diskSize/layer.UnitBytes+1)), int64(100)
	if n := g.registry.Gets.Load() - before; n > units+descriptions+64 {
		t.Errorf("%d requests for at most %d units", n, units)
	}
	items, err := openCache(t, dir).List()
	if err != nil || len(items) != 4 { // three layers and an index
		t.Errorf("%+v, %v", items, err)
	}
}

// What is in the cache can be read without the server; a reference names the disk of last time, and a URL the version of last time.
func TestOffline(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	g := push(t, 6)
	file := &testremote.File{}
	file.Set(`"v1"`, g.content)
	fileFaults := &testremote.Faults{Next: file}
	url := "http://" + testremote.Start(t, fileFaults) + "/disk.img"
	for _, c := range []struct {
		ref, other string
		faults     *testremote.Faults
	}{{g.ref, strings.Replace(g.ref, ":1", ":2", 1), g.faults}, {url, strings.Replace(url, "disk.img", "other.img", 1), fileFaults}} {
		dir := t.TempDir()
		d := open(t, c.ref, ondemand.Options{Cache: openCache(t, dir)})
		got := make([]byte, diskSize)
		if _, err := d.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		c.faults.Set(testremote.Hang, 1)
		var logged []string
		o := ondemand.Options{Cache: openCache(t, dir), Remote: remote.Options{Timeout: time.Second}, Log: func(s string) { logged = append(logged, s) }}
		again := open(t, c.ref, o)
		if err := readSome(t, again, g.content, 200, 1); err != nil {
			t.Error(err)
		}
		if len(logged) != 1 || again.ID() != d.ID() {
			t.Errorf("%q", logged)
		}
		if _, err := ondemand.Open(context.Background(), c.other, o); !errors.Is(err, remote.ErrUnreachable) {
			t.Error(err)
		}
		c.faults.Set("", 0)
	}
	// A file that was replaced meanwhile is noticed as soon as it is fetched from.
	o := ondemand.Options{Cache: openCache(t, t.TempDir()), Remote: remote.Options{Timeout: time.Second}}
	open(t, url, o)
	fileFaults.Set(testremote.Hang, 1)
	d := open(t, url, o)
	file.Set(`"v2"`, g.content)
	fileFaults.Set("", 0)
	if _, err := d.ReadAt(make([]byte, 512), 0); !errors.Is(err, remote.ErrChanged) {
		t.Error(err)
	}
}

// Without space in the cache a disk can be read: it is fetched again and again.
func TestNoSpaceForTheCache(t *testing.T) {
	g := push(t, 15)
	dir := t.TempDir()
	o := ondemand.Options{Cache: openCache(t, dir)}
	d := open(t, g.ref, o)
	for _, c := range []struct {
		what string
		hide string // has no space for a file any more: it is a file itself
	}{{"segments", "data-*"}, {"pages", "index-*"}, {"references", "references"}} {
		paths, err := filepath.Glob(filepath.Join(dir, "v1", c.hide))
		if err != nil || len(paths) == 0 {
			t.Fatalf("%s: %q, %v", c.what, paths, err)
		}
		for _, path := range paths {
			if err := errors.Join(os.RemoveAll(path), os.WriteFile(path, nil, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		if err := readSome(t, d, g.content, 100, 1); err != nil {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	var logged []string
	o.Log = func(s string) { logged = append(logged, s) }
	d = open(t, g.ref, o)
	if err := readSome(t, d, g.content, 100, 1); err != nil || len(logged) != 1 {
		t.Errorf("%v, %q", err, logged)
	}
}

// A tag that moves, and a file that is replaced, don't change a disk that is open.
func TestMoved(t *testing.T) {
	g := push(t, 7)
	d := open(t, g.ref, ondemand.Options{})
	if err := readSome(t, d, g.content, 5, 1); err != nil {
		t.Fatal(err)
	}
	other := g.pushTo(t, g.ref, 77)
	if err := readSome(t, d, g.content, 200, 2); err != nil {
		t.Error(err)
	}
	moved := open(t, g.ref, ondemand.Options{})
	if err := readSome(t, moved, other, 200, 3); err != nil || moved.ID() == d.ID() {
		t.Errorf("%v", err)
	}
	f := &testremote.File{}
	f.Set(`"1"`, g.content)
	url := "http://" + testremote.Start(t, f) + "/disk.img"
	file := open(t, url, ondemand.Options{})
	if err := readSome(t, file, g.content, 2, 1); err != nil {
		t.Fatal(err)
	}
	f.Set(`"2"`, other)
	got := make([]byte, diskSize)
	if _, err := file.ReadAt(got, 0); !errors.Is(err, remote.ErrChanged) {
		t.Error(err)
	}
	if next := open(t, url, ondemand.Options{}); next.ID() == file.ID() {
		t.Error("two versions have one identity")
	}
	for _, tag := range []string{"", `W/"1"`} {
		f.Set(tag, g.content)
		if _, err := ondemand.Open(context.Background(), url, ondemand.Options{Cache: openCache(t, t.TempDir())}); err == nil || !strings.Contains(err.Error(), "ETag") {
			t.Errorf("%q: %v", tag, err)
		}
	}
}

// Reads in order, also with several in flight, are fetched ahead.
func TestReadAhead(t *testing.T) {
	g := push(t, 11)
	d := open(t, g.ref, ondemand.Options{})
	p := make([]byte, 256<<10)
	for off := int64(0); off < 3<<20; off += 2 * int64(len(p)) { // each pair in the wrong order
		for _, at := range []int64{off + int64(len(p)), off} {
			if _, err := d.ReadAt(p, at); err != nil || !bytes.Equal(p, g.content[at:][:len(p)]) {
				t.Fatalf("%v, or other bytes", err)
			}
		}
	}
	d.WaitBackground()
	before, _ := d.Fetched()
	if _, err := d.ReadAt(p, 3<<20); err != nil || !bytes.Equal(p, g.content[3<<20:][:len(p)]) {
		t.Fatalf("%v, or other bytes", err)
	}
	if after, _ := d.Fetched(); after != before {
		t.Error("what follows was not fetched ahead")
	}
}

// The units of a boot are recorded, and fetched at the next one before they are read.
func TestPrefetch(t *testing.T) {
	g := push(t, 8)
	var mu sync.Mutex
	var recorded []block.Range
	d := open(t, g.ref, ondemand.Options{Record: func(r block.Range) {
		mu.Lock()
		defer mu.Unlock()
		recorded = append(recorded, r)
	}})
	p := make([]byte, 100_000)
	for _, off := range []int64{5 << 20, 1 << 20, 5 << 20} {
		if _, err := d.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	if len(recorded) == 0 || recorded[0].Off != 5<<20 && recorded[0].Off != 5<<20+layer.UnitBytes || len(recorded) > 4 {
		t.Fatalf("%v", recorded)
	}
	second := open(t, g.ref, ondemand.Options{Prefetch: append(recorded, block.Range{Off: 1 << 60, Length: 5})})
	second.WaitBackground()
	g.faults.Set(testremote.Busy, 1)
	got := make([]byte, 100_000)
	if _, err := second.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, p) && !bytes.Equal(got, g.content[1<<20:][:100_000]) {
		t.Error(err)
	}
}

// Pulled files pushed again are the same disk; a file that was changed is refused.
func TestPull(t *testing.T) {
	g := push(t, 9)
	d := open(t, g.ref, ondemand.Options{})
	dir := t.TempDir()
	for round := range 2 {
		c := openCache(t, t.TempDir())
		files, err := publish.Pull(context.Background(), d, dir, publish.Options{Cache: c})
		if items, err := c.List(); err != nil || slices.ContainsFunc(items, func(i cache.Item) bool { return strings.HasPrefix(i.Key, "data-") && i.Bytes > 0 }) {
			t.Errorf("what is pulled is kept in the cache, too: %+v, %v", items, err)
		}
		if err != nil || len(files) != 3 || files[0].Kept != (round == 1) || files[0].Store || !files[2].Store {
			t.Fatalf("%+v, %v", files, err)
		}
		var stores []*store.Store
		base, err := block.Open(files[0].Path, block.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		defer base.Close()
		var under block.Device = base
		for _, f := range files[1:] {
			cow, err := block.Open(f.Path, block.Options{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			defer cow.Close()
			st, err := store.Open(cow)
			if err != nil {
				t.Fatal(err)
			}
			if under, err = store.NewView(under, st); err != nil {
				t.Fatal(err)
			}
			stores = append(stores, st)
		}
		if err := readSome(t, under, g.content, 200, 1); err != nil {
			t.Error(err)
		}
		again := strings.Replace(g.ref, ":1", ":again", 1)
		repo, err := remote.Open(again, remote.Options{})
		if err != nil {
			t.Fatal(err)
		}
		pushed, err := publish.Push(context.Background(), repo, base, stores, publish.Options{Temp: t.TempDir()})
		if err != nil || pushed.Digest != d.ID() || pushed.Written != 0 {
			t.Errorf("%+v, %v", pushed, err)
		}
		if round == 1 {
			continue
		}
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) != 3 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		changed := bytes.Clone(b)
		changed[bytes.LastIndexFunc(changed, func(r rune) bool { return r != 0 })] ^= 1
		os.Chmod(f, 0o644)
		if err := os.WriteFile(f, changed, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := publish.Pull(context.Background(), d, dir, publish.Options{Cache: openCache(t, t.TempDir())}); err == nil {
			t.Errorf("%s was changed, and is taken", f)
		}
		if err := os.WriteFile(f, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// A delta over a disk that is in the registry already makes one layer, and reads nothing of the base.
func TestPushOverRemoteBase(t *testing.T) {
	g := push(t, 10)
	for _, target := range []string{g.ref, strings.Replace(g.ref, "golden/disk:1", "other/disk:2", 1), "oci://" + testremote.Start(t, testremote.NewRegistry()) + "/far/away"} {
		base := open(t, g.ref, ondemand.Options{})
		cow := block.NewMemory(8 << 20)
		snap, err := snapshot.NewOrigin(base).Attach(cow, snapshot.Options{ChunkSectors: 1})
		if err != nil {
			t.Fatal(err)
		}
		want := bytes.Clone(g.content)
		copy(want[100_352:], blocktest.Pattern(5120, 1))
		write(t, snap, want[100_352:][:5120], 100_352)
		if err := snap.Close(); err != nil {
			t.Fatal(err)
		}
		st, err := store.OpenToRead(cow)
		if err != nil {
			t.Fatal(err)
		}
		repo, err := remote.Open(target, remote.Options{})
		if err != nil {
			t.Fatal(err)
		}
		pushed, err := publish.Push(context.Background(), repo, base, []*store.Store{st}, publish.Options{Temp: t.TempDir()})
		if err != nil || pushed.NewLayers != 1 || pushed.Layers != len(base.Description().Layers)+1 {
			t.Fatalf("%+v, %v", pushed, err)
		}
		if _, data := base.Fetched(); data > 128<<10 {
			t.Errorf("%d bytes were fetched", data)
		}
		if err := readSome(t, open(t, target, ondemand.Options{}), want, 300, 1); err != nil {
			t.Error(err)
		}
		g.content = want
		if target != g.ref {
			g.content = g.pushTo(t, g.ref, 10) // as it was
		}
	}
}
