package block

import (
	"bytes"
	"fmt"
	"path/filepath"
	"testing"
)

// One look at a stretch of data is enough for all of its pieces, until the file gets a hole.
func TestExtentsRemembersData(t *testing.T) {
	const mib = 1 << 20
	punch := map[string]func(f *File) error{
		"zero":    func(f *File) error { return f.ZeroAt(mib, mib, 0) },
		"discard": func(f *File) error { return f.Discard(mib, mib) },
	}
	for name, do := range punch {
		t.Run(name, func(t *testing.T) {
			f, err := Create(filepath.Join(t.TempDir(), "f"), 8*mib)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(bytes.Repeat([]byte{1}, 4*mib), 0); err != nil {
				t.Fatal(err)
			}
			want := func(off, n int64, extents ...Extent) {
				t.Helper()
				if list, err := f.Extents(off, n); err != nil || fmt.Sprint(list) != fmt.Sprint(extents) {
					t.Errorf("extents of %d at %d: %v, %v, want %v", n, off, list, err, extents)
				}
			}
			want(0, 4096, Extent{Length: 4096})
			if to := f.knownData(mib); to != 4*mib {
				t.Skipf("SKIPPED: the file system does not report holes: data up to %d", to)
			}
			want(3*mib, 2*mib, Extent{Length: mib}, Extent{mib, Hole | ReadsZero})
			if err := do(f); err != nil {
				t.Fatal(err)
			}
			if to := f.knownData(0); to != 0 {
				t.Errorf("data up to %d is known after a hole was made", to)
			}
			want(0, 3*mib, Extent{Length: mib}, Extent{mib, Hole | ReadsZero}, Extent{Length: mib})
			if err := f.Allocate(5*mib, 4096); err != nil {
				t.Fatal(err)
			}
			if to := f.knownData(2 * mib); to != 4*mib {
				t.Errorf("data up to %d is known after space was reserved, want %d", to, 4*mib)
			}
		})
	}
}
