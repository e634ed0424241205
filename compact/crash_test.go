package compact_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/snapshot"
)

// cutAnywhere has work done on a disk, and hands over what it may hold after a power cut at any moment.
func cutAnywhere(t *testing.T, disk *blocktest.Crash, work func() error, look func(img *blocktest.Image, dev *block.Memory)) (images int) {
	t.Helper()
	disk.Power().Observe(func(blocktest.Op) {
		for img := range disk.Power().Cut().Images(blocktest.Choices{Limit: 6, Random: 3, Seed: uint64(images)}) {
			images++
			look(img, block.MemoryFrom(img.Disk(disk)))
		}
	})
	if err := work(); err != nil {
		t.Fatal(err)
	}
	disk.Power().Observe(nil)
	return images
}

// A new store is none at all at any moment, or a sound one of some of the chunks; and whole when it is done.
func TestWriteSurvivesPowerCuts(t *testing.T) {
	r := rand.New(rand.NewPCG(8, 8))
	images, none := 0, 0
	for i := range 6 {
		w := newWorld(t, r, past{sectors: 1 << (i % 2), kind: snapshot.Persistent, holes: i%3 == 1, halfMerged: i%3 == 2, disk: 512 * 60})
		p, err := compact.NewPlan(t.Context(), w.cow, compact.Options{Origin: w.origin, DropUnchanged: i%2 == 0, ChunkSectors: 1 << (i / 2 % 2)})
		if err != nil {
			t.Fatal(err)
		}
		out := blocktest.NewCrash(make([]byte, p.Size()))
		origin := w.origin.Bytes()
		images += cutAnywhere(t, out, func() error {
			_, err := p.Write(t.Context(), out)
			return err
		}, func(img *blocktest.Image, dev *block.Memory) {
			if report, err := check.Run(t.Context(), dev, check.Options{}); err != nil || report.Has(check.NoStore) {
				none++
				return
			} else if !report.Clean() {
				t.Fatalf("%v: %v", img, report.Findings)
			}
			got := shown(t, w.origin, dev)
			for at := 0; at < len(got); at += 512 {
				if now := got[at : at+512]; !bytes.Equal(now, w.view[at:at+512]) && !bytes.Equal(now, origin[at:at+512]) {
					t.Fatalf("%v: sector %d is neither the snapshot's nor the origin's", img, at/512)
				}
			}
		})
		if left := out.Power().Pending(); len(left) > 0 {
			t.Errorf("done, and not durable: %v", left)
		}
		if !bytes.Equal(shown(t, w.origin, block.MemoryFrom(out.Durable())), w.view) {
			t.Error("the snapshot shows something else")
		}
	}
	t.Logf("%d images, %d without a store", images, none)
	if none == 0 || none == images {
		t.Error("not every kind of image was seen")
	}
}

// Punching changes nothing that anybody sees, whatever of it reached the disk.
func TestPunchSurvivesPowerCuts(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	r := rand.New(rand.NewPCG(9, 9))
	images := 0
	for i := range 4 {
		w := newWorld(t, r, past{sectors: 8, kind: snapshot.Persistent, holes: true, halfMerged: i%2 == 1, disk: 512 * 300})
		if err := fillUnused(t, w.cow); err != nil {
			t.Fatal(err)
		}
		finds := func(dev block.Device) string { // it may have notes: holes are what punching is for
			report, err := check.Run(t.Context(), dev, check.Options{Origin: w.origin})
			if err != nil {
				t.Fatal(err)
			}
			return fmt.Sprint(report.Exceptions, report.Findings)
		}
		was := finds(w.cow)
		disk := blocktest.NewCrash(w.cow.Bytes())
		images += cutAnywhere(t, disk, func() error {
			_, err := compact.Punch(t.Context(), disk, nil)
			return err
		}, func(img *blocktest.Image, dev *block.Memory) {
			if now := finds(dev); now != was || !bytes.Equal(shown(t, w.origin, dev), w.view) {
				t.Fatalf("%v: %s before, %s now, or the snapshot shows something else", img, was, now)
			}
		})
	}
	t.Logf("%d images", images)
	if images < 10 {
		t.Errorf("only %d images", images)
	}
}
