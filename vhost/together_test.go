package vhost_test

import (
	"bytes"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/inline"
)

const coldSize = 1 << 20

// offerReads makes reads of 512 bytes at sectors, and a flush where the sector is noSector, available at once.
func (f *frontend) offerReads(sectors []uint64) (all []request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var heads []uint16
	for _, sector := range sectors {
		kind, data := uint32(0), make([]byte, 512)
		if sector == noSector {
			kind, sector, data = 4, 0, nil
		}
		r, err := f.prepare(kind, sector, data, false)
		if err != nil {
			f.t.Fatal(err)
		}
		all, heads = append(all, r), append(heads, r.head)
	}
	f.offer(heads...)
	return all
}

const noSector = 1<<64 - 1

// together serves a device and has use make requests available at once after many quick ones, until reads were executed together: on a
// machine that was slow a moment ago they are executed one by one.
func together(t *testing.T, from int64, use func(d *blocktest.Cold, c *client, content []byte)) {
	for range 100 {
		content := blocktest.Pattern(coldSize, 4)
		d := &blocktest.Cold{Memory: block.MemoryFrom(content), From: from, Free: make(chan struct{})}
		_, path := serve(t, d, nil)
		c := connect(t, path)
		for range 3 * inline.TrialLength {
			c.want(0, 0, 0, make([]byte, 512), false)
		}
		use(d, c, content)
		c.close()
		if d.Together.Load() > 0 {
			return
		}
	}
	t.Fatal("no reads were executed together")
}

// Reads that are available together are executed together, and each gets its own bytes. Those that are illegal among them get an error, and
// other requests among them are executed.
func TestReadsTogether(t *testing.T) {
	together(t, coldSize, func(d *blocktest.Cold, c *client, content []byte) {
		sectors := make([]uint64, 40)
		for i := range sectors {
			sectors[i] = uint64(i) * 31
		}
		sectors[7], sectors[20], sectors[22] = coldSize/512, noSector, noSector
		for i, r := range c.offerReads(sectors) {
			got := make([]byte, 512)
			status, err := c.wait(r, got)
			if err != nil || (status == 1) != (i == 7) || status > 1 {
				t.Fatalf("request %d: status %d, %v", i, status, err)
			}
			if at := sectors[i] * 512; i != 7 && sectors[i] != noSector && !bytes.Equal(got, content[at:at+512]) {
				t.Fatalf("other bytes at sector %d", sectors[i])
			}
		}
	})
}

// What is not in memory is waited for by nobody else: neither by reads that came with it, nor by later requests.
func TestReadsTogetherLeaveSlowOnes(t *testing.T) {
	sectors := []uint64{0, 1, coldSize / 1024, 2, coldSize/512 - 1, 3}
	together(t, coldSize/2, func(d *blocktest.Cold, c *client, content []byte) {
		slow := func(i int) bool { return i == 2 || i == 4 }
		all := c.offerReads(sectors)
		check := func(i int) {
			t.Helper()
			got := make([]byte, 512)
			if err := c.ok(c.wait(all[i], got)); err != nil || !bytes.Equal(got, content[sectors[i]*512:][:512]) {
				t.Fatalf("request %d: %v, or other bytes", i, err)
			}
		}
		for i := range all {
			if !slow(i) {
				check(i)
			}
		}
		c.want(0, 4, 0, nil, false)
		close(d.Free)
		for i := range all {
			if slow(i) {
				check(i)
			}
		}
		if n := d.Waiting.Load(); n != 2 {
			t.Errorf("%d reads had to wait", n)
		}
	})
}
