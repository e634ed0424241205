package diff_test

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/dmsnap/dmsnap/diff"
)

func bitmap(t *testing.T, size, granule int64, extents ...diff.Extent) []byte {
	t.Helper()
	var b bytes.Buffer
	p, err := diff.NewBitmapPrinter(&b, size, granule)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range extents {
		if err := p.Extent(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.End(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestBitmap(t *testing.T) {
	got := bitmap(t, 20*512, 512, diff.Extent{Off: 512, Length: 1024, Class: diff.Changed}, diff.Extent{Off: 4096, Length: 512, Class: diff.Copied},
		diff.Extent{Off: 19 * 512, Length: 512, Class: diff.Changed})
	if want := []byte{0b110, 0, 0b1000}; !bytes.Equal(got, want) {
		t.Errorf("bitmap %08b, want %08b", got, want)
	}
	for _, bad := range []int64{0, 256, 1000, -4096} {
		if _, err := diff.NewBitmapPrinter(nil, 1<<20, bad); err == nil {
			t.Errorf("a granularity of %d bytes was taken", bad)
		}
	}
}

// Each bit says whether some byte of its granule differs, whatever the extents are.
func TestBitmapRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		granule := int64(512) << r.IntN(4)
		size := int64(512 * (1 + r.IntN(3000)))
		var extents []diff.Extent
		want := make([]byte, ((size+granule-1)/granule+7)/8)
		for off := int64(0); off < size; {
			e := diff.Extent{Off: off, Length: min(size-off, int64(512*(1+r.IntN(100)))), Class: diff.Copied}
			if r.IntN(2) == 0 {
				e.Class = diff.Changed
				for at := e.Off; at < e.Off+e.Length; at += 512 {
					want[at/granule/8] |= 1 << (at / granule % 8)
				}
			}
			extents = append(extents, e)
			off += e.Length + int64(512*r.IntN(50))
		}
		if got := bitmap(t, size, granule, extents...); !bytes.Equal(got, want) {
			t.Fatalf("%d bytes by %d:\n%08b\nwant\n%08b", size, granule, got, want)
		}
	}
}
