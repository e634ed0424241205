package inspect_test

import (
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// dropping counts how often its cache is dropped.
type dropping struct {
	block.Forward
	drops int
}

func (d *dropping) DropCache(off, n int64) error {
	d.drops++
	return d.Forward.DropCache(off, n)
}

// TestKeepCache: a store that is loaded for a report is read as it is cached; one that is opened otherwise, as it is on the disk.
func TestKeepCache(t *testing.T) {
	l, err := ondisk.NewLayout(8)
	if err != nil {
		t.Fatal(err)
	}
	d := &dropping{Forward: block.NewForward(block.NewMemory(1 << 20))}
	if _, err := store.Create(d, l, true); err != nil {
		t.Fatal(err)
	}
	d.drops = 0
	if _, err := inspect.OpenStore(d, false); err != nil || d.drops != 0 {
		t.Errorf("for a report the cache was dropped %d times, or %v", d.drops, err)
	}
	if _, err := store.OpenToRead(d); err != nil || d.drops == 0 {
		t.Errorf("the cache was dropped %d times, or %v", d.drops, err)
	}
}
