package repair_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/internal/undo"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/repair"
	"github.com/dmsnap/dmsnap/store"
)

// damages are stores to repair: with chunks to move, slots to drop, a header to write, no space for the end mark.
func damages() map[string]*block.Memory {
	l := ondisk.Layout{ChunkSectors: 1}
	var full []byte
	for i := range uint64(32) {
		full = append(full, slots(i*3, i+2)...)
	}
	oddValid := image(slots(5, 2, 6, 3), 20, l)
	oddValid.WriteAt([]byte{7}, 4)
	return map[string]*block.Memory{
		"duplicates":               image(slots(5, 9, 6, 3, 5, 8, 8, 3, 9, 10, 7, 11), 40, l),
		"named past the device":    image(slots(5, 2, 6, 1<<40, 7, 4, 8, 5), 20, l),
		"two areas":                image(append(bytes.Clone(full), slots(1, 38, 1, 40, 9, 41)...), 60, l),
		"no space for an end mark": image(full, 34, l),
		"odd valid word":           oddValid,
		"larger chunks":            image(slots(5, 5, 5, 3, 6, 4), 32, ondisk.Layout{ChunkSectors: 4}),
	}
}

// A crashed repair is a store under repair in place, and its undo file, on two disks that lose power together.
type crashed struct {
	t         *testing.T
	power     blocktest.Power
	cow, file *blocktest.Crash
	fileSize  int64 // of the undo file, 0 before it is begun
	old       []byte
	images    int
	took      map[string]int // how each image came right
}

// Write puts the undo file on its disk.
func (c *crashed) Write(p []byte) (int, error) {
	n, err := c.file.WriteAt(p, c.fileSize)
	c.fileSize += int64(n)
	return n, err
}

func (c *crashed) save(write func(io.Writer) error) error {
	if err := write(c); err != nil {
		return err
	}
	return c.file.Flush()
}

// judge wants every image to be the old store, or one that the undo file makes the old one; or, once the
// repair said that it is done, the new one.
func (c *crashed) judge(done bool) {
	c.t.Helper()
	for img := range c.power.Cut().Images(blocktest.Choices{Limit: 12, Random: 4, Seed: uint64(c.images)}) {
		c.images++
		cow := img.Disk(c.cow)
		sound := bytes.Equal(cow, c.cow.Bytes())
		if done && !sound {
			c.t.Fatalf("%v: repaired, and not on the disk", img)
		}
		file := img.Disk(c.file)[:c.fileSize]
		dev := blocktest.NewCrash(cow)
		_, err := undo.Apply(c.t.Context(), bytes.NewReader(file), dev)
		switch {
		case errors.Is(err, undo.ErrFormat) && bytes.Equal(cow, c.old):
			c.took["old, with no undo file yet"]++
		case err != nil:
			c.t.Fatalf("%v: %v, and the store is not the old one", img, err)
		case !bytes.Equal(dev.Durable()[:len(c.old)], c.old):
			c.t.Fatalf("%v: taken back, it is another store", img)
		case done:
			c.took["new, taken back"]++
		case bytes.Equal(cow, c.old):
			c.took["old, taken back"]++
		default:
			c.took["between, taken back"]++
			if c.images%17 == 0 {
				c.takenBackTwice(file, cow)
			}
		}
	}
}

// takenBackTwice cuts the taking back too, and begins it again.
func (c *crashed) takenBackTwice(file, cow []byte) {
	dev := blocktest.NewCrash(cow)
	dev.Power().Observe(func(blocktest.Op) {
		for img := range dev.Power().Cut().Images(blocktest.Choices{Limit: 4}) {
			c.images++
			again := block.MemoryFrom(img.Disk(dev))
			_, err := undo.Apply(c.t.Context(), bytes.NewReader(file), again)
			if err != nil || !bytes.Equal(again.Bytes()[:len(c.old)], c.old) {
				c.t.Fatalf("%v: taken back twice: %v, or another store", img, err)
			}
			c.took["cut while taken back"]++
		}
	})
	if _, err := undo.Apply(c.t.Context(), bytes.NewReader(file), dev); err != nil {
		c.t.Fatal(err)
	}
}

// Whenever the power goes during a repair in place: the undo file, if it is whole, brings the old store back;
// if it is not the old one is there. When the repair is done it stays.
func TestInPlaceSurvivesPowerCuts(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for name, dev := range damages() {
		t.Run(name, func(t *testing.T) {
			c := &crashed{t: t, old: dev.Bytes(), took: map[string]int{}}
			c.cow, c.file = c.power.NewCrash("COW", c.old), c.power.NewCrash("UNDO", make([]byte, 3*len(c.old)+4096))
			p, err := repair.NewPlan(t.Context(), c.cow, repair.Options{})
			if err != nil {
				t.Fatal(err)
			}
			c.power.Observe(func(blocktest.Op) { c.judge(false) })
			if changed, err := p.InPlace(t.Context(), c.save); err != nil || !changed {
				t.Fatal(changed, err)
			}
			c.power.Observe(nil)
			c.judge(true)
			if r := checked(t, block.MemoryFrom(c.cow.Durable()), nil); !r.Clean() {
				t.Errorf("repaired, with %v", r.Findings)
			}
			sameData(t, damaged{}, dev, block.MemoryFrom(c.cow.Durable()))
			t.Logf("%d images: %v", c.images, c.took)
			if c.took["old, with no undo file yet"] == 0 || c.took["new, taken back"] == 0 {
				t.Errorf("not every kind of image was seen: %v", c.took)
			}
		})
	}
}

// A repair into a new device holds no store or a sound one at any moment, and all of it when it is done.
func TestFreshSurvivesPowerCuts(t *testing.T) {
	for name, dev := range damages() {
		t.Run(name, func(t *testing.T) {
			p, err := repair.NewPlan(t.Context(), dev, repair.Options{})
			if err != nil {
				t.Fatal(err)
			}
			out := blocktest.NewCrash(make([]byte, p.Size()))
			images, none, begun := 0, 0, 0
			out.Power().Observe(func(blocktest.Op) {
				for img := range out.Power().Cut().Images(blocktest.Choices{Limit: 12, Random: 4, Seed: uint64(images)}) {
					images++
					now := block.MemoryFrom(img.Disk(out))
					r := checked(t, now, nil)
					if r.Has(check.NoStore) {
						none++
						continue
					}
					if r.Clean() {
						begun++
						continue
					}
					t.Fatalf("%v: %v", img, r.Findings)
				}
			})
			if err := p.Fresh(t.Context(), out); err != nil {
				t.Fatal(err)
			}
			out.Power().Observe(nil)
			if left := out.Power().Pending(); len(left) > 0 {
				t.Errorf("done, and not durable: %v", left)
			}
			sameData(t, damaged{}, dev, block.MemoryFrom(out.Durable()))
			if st, err := store.Open(block.MemoryFrom(out.Durable())); err != nil || st.Len() != p.Len() {
				t.Errorf("%v, or not every exception", err)
			}
			t.Logf("%d images: %d without a store, %d sound", images, none, begun)
			if none == 0 || begun == 0 {
				t.Error("not every kind of image was seen")
			}
		})
	}
}
