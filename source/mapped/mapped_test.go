package mapped

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }

// linear returns a device of one range.
func linear(t *testing.T, dev block.Device, off, n int64) *Device {
	t.Helper()
	return mustNew(t, Target{Length: n, Areas: []Area{{dev, off}}})
}

func mustNew(t *testing.T, targets ...Target) *Device {
	t.Helper()
	d, err := New("", targets)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// guarded fails the test when a byte outside of the ranges given was changed.
func guarded(t *testing.T, size int64, ranges ...[2]int64) *block.Memory {
	before := blocktest.Pattern(int(size), 77)
	m := block.MemoryFrom(bytes.Clone(before))
	t.Cleanup(func() {
		after := make([]byte, size)
		if _, err := m.ReadAt(after, 0); err != nil {
			t.Error(err)
		}
		for _, r := range ranges {
			copy(after[r[0]:r[0]+r[1]], before[r[0]:])
		}
		if !bytes.Equal(before, after) {
			t.Error("a byte outside of the mapped ranges was changed")
		}
	})
	return m
}

func TestSuite(t *testing.T) {
	const k = 1 << 10
	t.Run("one range", func(t *testing.T) {
		blocktest.Run(t, func(t *testing.T) block.Device {
			return linear(t, guarded(t, 300*k, [2]int64{3 * k, 256 * k}), 3*k, 256*k)
		})
	})
	t.Run("a range of a range of a file, and of two", func(t *testing.T) {
		for _, lengths := range [][]int64{{256 * k}, {100 * k, 156 * k}} {
			blocktest.Run(t, func(t *testing.T) block.Device {
				path := filepath.Join(t.TempDir(), "disk")
				if err := os.WriteFile(path, blocktest.Pattern(300*k, 78), 0o600); err != nil {
					t.Fatal(err)
				}
				f, err := block.Open(path, block.Options{})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { f.Close() })
				part := linear(t, f, 3*k, 290*k)
				var targets []Target
				for i, n := range lengths {
					targets = append(targets, Target{Length: n, Areas: []Area{{part, int64(i) * 110 * k}}})
				}
				return mustNew(t, targets...)
			})
		}
	})
	t.Run("several ranges and stripes", func(t *testing.T) {
		blocktest.Run(t, func(t *testing.T) block.Device {
			a := guarded(t, 200*k, [2]int64{2 * k, 5 * k}, [2]int64{20 * k, 64 * k})
			b := guarded(t, 200*k, [2]int64{0, 37 * k}, [2]int64{100 * k, 64 * k})
			return mustNew(t,
				Target{Length: 5 * k, Areas: []Area{{a, 2 * k}}},
				Target{Length: 128 * k, Stripe: 4 * k, Areas: []Area{{b, 100 * k}, {a, 20 * k}}},
				Target{Length: 37 * k, Areas: []Area{{b, 0}}})
		})
	})
	t.Run("read-only", func(t *testing.T) {
		blocktest.RunReadOnly(t, func(t *testing.T) block.Device {
			return linear(t, guarded(t, 300*k), 3*k, 256*k).ReadOnly()
		})
	})
	t.Run("zeros", func(t *testing.T) {
		blocktest.RunReadOnly(t, func(t *testing.T) block.Device { return mustNew(t, Target{Length: 64 * k}) })
	})
}

// TestPassesOn: a range that is the whole device passes on every ability.
func TestPassesOn(t *testing.T) {
	blocktest.RunForward(t, func(t *testing.T, lower block.Device) block.Device {
		return linear(t, lower, 0, lower.Size())
	}, "Refresh", "Grow", "CanGrow", "Identity", "Size", "BlockSize")
}

func TestStripes(t *testing.T) {
	a, b, c := block.MemoryFrom([]byte("..AABB")), block.MemoryFrom([]byte("CCDD")), block.MemoryFrom([]byte(".EEFF"))
	d := mustNew(t, Target{Length: 3}, Target{Length: 12, Stripe: 2, Areas: []Area{{a, 2}, {b, 0}, {c, 1}}})
	got := make([]byte, 15)
	if _, err := d.ReadAt(got, 0); err != nil || string(got) != "\x00\x00\x00AACCEEBBDDFF" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := d.ReadAt(got[:5], 4); err != nil || string(got[:5]) != "ACCEE" {
		t.Errorf("%q, %v", got[:5], err)
	}
}

func TestRefused(t *testing.T) {
	m := block.NewMemory(100)
	for name, targets := range map[string][]Target{
		"no length":         {{Length: 0}},
		"overflow":          {{Length: 1 << 62}, {Length: 1 << 62}},
		"behind the device": {{Length: 51, Areas: []Area{{m, 50}}}},
		"before the device": {{Length: 5, Areas: []Area{{m, -1}}}},
		"uneven stripes":    {{Length: 20, Stripe: 3, Areas: []Area{{m, 0}, {m, 50}}}},
		"no stripe size":    {{Length: 20, Areas: []Area{{m, 0}, {m, 50}}}},
	} {
		if _, err := New("", targets); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestFailedFlush: each device is flushed although one fails.
func TestFailedFlush(t *testing.T) {
	log := &blocktest.Log{}
	bad := errors.New("no")
	a := blocktest.NewFaulty(block.NewMemory(512), blocktest.FailKind(blocktest.Flush, bad))
	b := log.Record("b", block.NewMemory(512))
	d := mustNew(t, Target{Length: 512, Areas: []Area{{a, 0}}}, Target{Length: 512, Areas: []Area{{b, 0}}})
	if err := d.Flush(); !errors.Is(err, bad) {
		t.Errorf("flush: %v", err)
	}
	if n := len(log.Ops()); n != 1 {
		t.Errorf("%d operations on the second device, want its flush", n)
	}
}

func TestIdentity(t *testing.T) {
	m := block.NewMemory(1024)
	if !block.Same(linear(t, m, 0, 512), linear(t, m, 0, 512)) {
		t.Error("one range twice: not the same")
	}
	if block.Same(linear(t, m, 0, 512), linear(t, m, 512, 512)) || block.Same(linear(t, m, 0, 512), m) {
		t.Error("different ranges are the same")
	}
}
