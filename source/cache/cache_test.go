package cache_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/layer"
	"github.com/dmsnap/dmsnap/source/cache"
)

func open(t testing.TB, dir string, size int64) *cache.Cache {
	t.Helper()
	c, err := cache.Open(dir, cache.Options{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func blob(t testing.TB, c *cache.Cache, kind cache.Kind) *cache.Blob {
	t.Helper()
	b, err := c.Blob(kind, layer.DigestOf([]byte("key")), "oci://host/disk")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// content is that of a unit.
func content(unit int64) []byte {
	return blocktest.Pattern(layer.UnitBytes-int(unit%2)*512, uint64(unit))
}

func put(t testing.TB, b *cache.Blob, unit int64, p []byte) {
	t.Helper()
	release, err := b.Claim(context.Background(), unit, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if err := b.Put(unit, p, layer.DigestOf(p)); err != nil {
		t.Fatal(err)
	}
}

// holds reports whether a unit is there, and compares it.
func holds(t testing.TB, b *cache.Blob, unit int64, want []byte) bool {
	t.Helper()
	p := make([]byte, 1000)
	if !b.Read(p, unit, 512, len(want), layer.DigestOf(want)) {
		return false
	}
	if !bytes.Equal(p, want[512:1512]) {
		t.Fatalf("unit %d has other bytes", unit)
	}
	return true
}

func segments(t testing.TB, dir string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "v1", "*-*", "[0-9]*"))
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// A damaged byte, in content or digest, is a unit that is not there; it can be put again, and who had verified it before reads on.
func TestDamaged(t *testing.T) {
	for _, at := range []int64{64<<10 + 3*layer.UnitBytes + 700, 3*32 + 5} {
		dir := t.TempDir()
		c := open(t, dir, 0)
		first := blob(t, c, cache.Data)
		want := content(3)
		if holds(t, first, 3, want) {
			t.Fatal("an empty cache has it")
		}
		put(t, first, 3, want)
		if !holds(t, first, 3, want) {
			t.Fatal("it is not there")
		}
		f, err := os.OpenFile(segments(t, dir)[0], os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var b [1]byte
		f.ReadAt(b[:], at)
		b[0] ^= 1
		if _, err := f.WriteAt(b[:], at); err != nil {
			t.Fatal(err)
		}
		second := blob(t, c, cache.Data)
		if holds(t, second, 3, want) {
			t.Fatal("damage was not found")
		}
		put(t, second, 3, want)
		third := blob(t, open(t, dir, 0), cache.Data)
		if !holds(t, second, 3, want) || !holds(t, third, 3, want) {
			t.Fatal("it was not put again")
		}
	}
}

// A disk that claims the data of another one does not replace its units.
func TestNobodyReplacesContent(t *testing.T) {
	dir := t.TempDir()
	a, b := blob(t, open(t, dir, 0), cache.Data), blob(t, open(t, dir, 0), cache.Data)
	put(t, a, 5, content(5))
	put(t, b, 5, content(7))
	if !holds(t, a, 5, content(5)) || holds(t, b, 5, content(7)) {
		t.Error("the content was replaced")
	}
	put(t, b, 5, content(5))
	if !holds(t, a, 5, content(5)) || !holds(t, b, 5, content(5)) {
		t.Error("it is not there")
	}
	index := blob(t, open(t, dir, 0), cache.Index)
	if index.Has(5) {
		t.Error("blobs of two kinds are one")
	}
}

// A segment that is removed while it is in use is read on from, and a new one takes what is put.
func TestEvictWhileInUse(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, 0)
	b := blob(t, c, cache.Data)
	for unit := range int64(3) {
		put(t, b, unit*cache.SegmentUnits, content(unit))
	}
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(segments(t, dir)[1], old, old); err != nil {
		t.Fatal(err)
	}
	items, err := c.List()
	if err != nil || len(items) != 1 || items[0].Name != "oci://host/disk" || items[0].Bytes == 0 {
		t.Fatalf("%+v, %v", items, err)
	}
	removed, err := c.Evict(items[0].Bytes - 1)
	if err != nil || removed == 0 || removed >= items[0].Bytes || len(segments(t, dir)) != 2 {
		t.Fatalf("%d bytes, %v, %v", removed, err, segments(t, dir))
	}
	if !holds(t, b, cache.SegmentUnits, content(1)) {
		t.Error("who has it open can't read it any more")
	}
	other := blob(t, open(t, dir, 0), cache.Data)
	if holds(t, other, cache.SegmentUnits, content(1)) {
		t.Error("it was not removed")
	}
	put(t, b, cache.SegmentUnits+1, content(8))
	if !holds(t, blob(t, c, cache.Data), cache.SegmentUnits+1, content(8)) {
		t.Error("it went into a file without a name")
	}
	if _, err := c.Evict(0); err != nil || len(segments(t, dir)) != 0 {
		t.Errorf("%v, %v", err, segments(t, dir))
	}
	put(t, b, 9, content(9))
	if !holds(t, b, 9, content(9)) {
		t.Error("nothing can be put after the directory was emptied")
	}
}

// The cache stays within its size and what one process writes between evictions.
func TestBounded(t *testing.T) {
	dir := t.TempDir()
	const size = 8 << 20
	c := open(t, dir, size)
	b := blob(t, c, cache.Data)
	p := content(0)
	for i := range int64(2200) { // 137 MiB in segments of two units
		put(t, b, i/2*cache.SegmentUnits+i%2, p)
	}
	c.Close()
	items, err := c.List()
	if err != nil || len(items) != 1 || items[0].Bytes > size+80<<20 {
		t.Errorf("%+v, %v", items, err)
	}
}

func TestReferences(t *testing.T) {
	c := open(t, t.TempDir(), 0)
	if _, ok := c.Reference("a"); ok {
		t.Error("an empty cache knows it")
	}
	for _, text := range []string{"one", "two", "two"} {
		if err := c.SaveReference("a", []byte(text)); err != nil {
			t.Fatal(err)
		}
		if got, ok := c.Reference("a"); !ok || string(got) != text {
			t.Errorf("%q, %v", got, ok)
		}
	}
}

// Of many who want a unit, in several Blobs, one at a time has claimed it, and the others find it there. A wait ends with its context.
func TestClaims(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex
	fetched := map[int64]int{}
	var running sync.WaitGroup
	for w := range 16 {
		b := blob(t, open(t, dir, 0), cache.Data)
		running.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 1))
			for range 30 {
				unit := r.Int64N(20)
				release, err := b.Claim(context.Background(), unit, 1)
				if err != nil {
					t.Error(err)
					return
				}
				if want := content(unit); !holds(t, b, unit, want) {
					mu.Lock()
					fetched[unit]++
					mu.Unlock()
					if err := b.Put(unit, want, layer.DigestOf(want)); err != nil {
						t.Error(err)
					}
				}
				release()
			}
		})
	}
	running.Wait()
	for unit, n := range fetched {
		if n != 1 {
			t.Errorf("unit %d was fetched %d times", unit, n)
		}
	}
	b := blob(t, open(t, dir, 0), cache.Data)
	release, err := b.Claim(context.Background(), 4, 4)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	over := errors.New("over")
	for _, other := range []*cache.Blob{b, blob(t, open(t, dir, 0), cache.Data)} {
		ctx, cancel := context.WithCancelCause(context.Background())
		time.AfterFunc(20*time.Millisecond, func() { cancel(over) })
		if _, err := other.Claim(ctx, 7, 2); !errors.Is(err, over) {
			t.Error(err)
		}
		free, err := other.Claim(context.Background(), 8, 2)
		if err != nil {
			t.Fatal(err)
		}
		free()
	}
}

// TestKilledWriter kills a process that writes to the cache, again and again: what is read afterwards is right or not there, and nothing
// stays claimed.
func TestKilledWriter(t *testing.T) {
	if dir := os.Getenv("DMSNAP_TEST_CACHE"); dir != "" {
		b := blob(t, open(t, dir, 0), cache.Data)
		fmt.Println("begun")
		for unit := int64(0); ; unit++ {
			put(t, b, unit%4000, content(unit%4000))
		}
	}
	dir := t.TempDir()
	for round := range 6 {
		child := exec.Command(os.Args[0], "-test.run=^TestKilledWriter$")
		child.Env = append(os.Environ(), "DMSNAP_TEST_CACHE="+dir)
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		out.Read(make([]byte, 5))
		time.Sleep(time.Duration(1+round*7) * time.Millisecond) // any moment will do
		child.Process.Kill()
		child.Wait()
		b := blob(t, open(t, dir, 0), cache.Data)
		for unit := range int64(60) {
			holds(t, b, unit, content(unit)) // compares
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		release, err := b.Claim(ctx, 0, cache.SegmentUnits)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		release()
	}
}
