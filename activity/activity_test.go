package activity_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/dmsnap/dmsnap/activity"
	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

func TestPassesOn(t *testing.T) {
	blocktest.RunForward(t, func(_ *testing.T, dev block.Device) block.Device { return activity.Observe(dev) })
}

func TestSuite(t *testing.T) {
	blocktest.Run(t, func(*testing.T) block.Device { return activity.Observe(block.NewMemory(1 << 20)) })
}

func TestCounts(t *testing.T) {
	dev := activity.Observe(block.NewMemory(1 << 20))
	p := make([]byte, 4096)
	for i := range 4 {
		if _, err := dev.WriteAt(p, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	if err := block.Zero(dev, 1<<19, 8192, 0); err != nil {
		t.Fatal(err)
	}
	if err := block.WriteDurable(dev, p, 1<<20-4096); err != nil {
		t.Fatal(err)
	}
	if _, err := dev.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	_, outside := dev.ReadAt(p, 1<<20)
	if err := dev.Flush(); err != nil || outside == nil {
		t.Fatal(err, outside)
	}
	c := dev.Counts()
	if c.Reads.Count != 2 || c.ReadBytes != 4096 || c.Writes.Count < 6 || c.WriteBytes != 4*4096+8192+4096 || c.Flushes.Count == 0 || c.Errors != 1 {
		t.Errorf("counts %+v", c)
	}
	// Four parts: the first one has four writes, the third the zeroing, the last the durable write.
	cells := dev.Writes(4)
	if cells[0] < 4 || cells[1] != 0 || cells[2] == 0 || cells[3] == 0 {
		t.Errorf("writes in four parts: %v", cells)
	}
	if len(dev.Writes(1000)) != 512 || len(dev.Writes(0)) != 1 {
		t.Errorf("%d parts, %d parts", len(dev.Writes(1000)), len(dev.Writes(0)))
	}
}

// A write that fails is an error, and changes no part of the map.
func TestFailedWrite(t *testing.T) {
	dev := activity.Observe(readOnly{block.NewMemory(1 << 20)})
	if _, err := dev.WriteAt(make([]byte, 512), 0); !errors.Is(err, block.ErrReadOnly) {
		t.Fatal(err)
	}
	if c := dev.Counts(); c.Errors != 1 || c.WriteBytes != 0 || c.Writes.Count != 1 || slices.Max(dev.Writes(512)) != 0 {
		t.Errorf("counts %+v", c)
	}
}

type readOnly struct {
	*block.Memory // only WriteAt is called
}

func (readOnly) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }

// Parts cover the disk, whatever its size.
func TestEveryByteIsInAPart(t *testing.T) {
	for _, size := range []int64{512, 5 * 512, 1<<20 + 512, 3 << 20} {
		dev := activity.Observe(block.NewMemory(size))
		if err := block.Zero(dev, 0, size, 0); err != nil {
			t.Fatal(err)
		}
		if cells := dev.Writes(512); slices.Min(cells) != 1 {
			t.Errorf("%d bytes: %v", size, cells)
		}
	}
}

func BenchmarkWriteAt(b *testing.B) {
	for name, dev := range map[string]block.Device{"plain": block.NewMemory(1 << 20), "observed": activity.Observe(block.NewMemory(1 << 20))} {
		b.Run(name, func(b *testing.B) {
			p := make([]byte, 4096)
			for b.Loop() {
				dev.WriteAt(p, 8192)
			}
		})
	}
}

func Example() {
	dev := activity.Observe(block.NewMemory(1 << 20))
	dev.WriteAt([]byte("hello"), 600<<10)
	fmt.Println(dev.Counts().WriteBytes, dev.Writes(4))
	// Output: 5 [0 0 1 0]
}
