package blocktest_test

import (
	"errors"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

// plain hides all abilities of a device, so that the functions of package block fall back.
func TestConformance(t *testing.T) {
	const size = 300 << 10
	for name, open := range map[string]func(*testing.T) block.Device{
		"memory":          func(*testing.T) block.Device { return block.NewMemory(size) },
		"memory, 64 KiB":  func(*testing.T) block.Device { return block.NewMemory(64 << 10) },
		"memory, 1 TiB":   func(*testing.T) block.Device { return block.NewMemory(1 << 40) },
		"without ability": func(*testing.T) block.Device { return blocktest.Plain(block.NewMemory(size)) },
		"crash":           func(*testing.T) block.Device { return blocktest.NewCrash(make([]byte, size)) },
		"recorder":        func(*testing.T) block.Device { return new(blocktest.Log).Record("A", block.NewMemory(size)) },
		"recorder, plain": func(*testing.T) block.Device {
			return new(blocktest.Log).Record("", blocktest.Plain(block.NewMemory(size)))
		},
		"faulty, no fault": func(*testing.T) block.Device { return blocktest.NewFaulty(block.NewMemory(size), nil) },
		"quota":            func(*testing.T) block.Device { return blocktest.NewQuota(block.NewMemory(size), 1<<30, true) },
		"page cache": func(*testing.T) block.Device {
			return blocktest.NewPageCache(block.NewMemory(size), nil).Open()
		},
		"page cache over a pool": func(*testing.T) block.Device {
			return blocktest.NewPageCache(blocktest.NewPool(1<<30).Sparse(blocktest.Plain(block.NewMemory(size)), false), nil).Open()
		},
		"all together": func(*testing.T) block.Device {
			return new(blocktest.Log).Record("A", blocktest.NewFaulty(blocktest.NewCrash(make([]byte, size)), nil))
		},
	} {
		t.Run(name, func(t *testing.T) { blocktest.Run(t, open) })
	}
}

func TestReadOnly(t *testing.T) {
	blocktest.RunReadOnly(t, func(t *testing.T) block.Device {
		return blocktest.NewFaulty(block.NewMemory(1<<20), func(op blocktest.Op) error {
			if op.Kind.Changes() || op.Kind == blocktest.Grow {
				return block.ErrReadOnly
			}
			return nil
		})
	})
}

func TestPattern(t *testing.T) {
	a := blocktest.Pattern(1001, 1)
	if len(a) != 1001 || string(a) != string(blocktest.Pattern(1001, 1)) || string(a[:500]) != string(blocktest.Pattern(500, 1)) {
		t.Error("a pattern is not the same each time")
	}
	if string(a) == string(blocktest.Pattern(1001, 2)) {
		t.Error("two seeds, one pattern")
	}
}

var errDisk = errors.New("the disk is broken")
