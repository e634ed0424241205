package blocktest

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
)

// testReads is the reading half of the suite: every read of a part, also side by side with others, returns what a read of the whole
// returned, requests outside are refused, and extents that read as zeros do.
func testReads(t *testing.T, dev block.Device) {
	testSize(t, dev)
	reads := map[string]func(off, n int64) error{"read": func(off, n int64) error { return refusedRead(t, dev, off, n) }, "extents": func(off, n int64) error {
		_, err := block.Extents(dev, off, n)
		return err
	}}
	testOutside(t, dev, reads)
	for _, off := range []int64{0, 1, dev.Size() - 1, dev.Size()} {
		if n, err := dev.ReadAt(nil, off); n != 0 || err != nil {
			t.Errorf("read of nothing at %d: %d, %v", off, n, err)
		}
	}
	starts, n := windows(dev)
	for _, start := range starts {
		content := read(t, dev, start, n)
		checkExtents(t, dev, start, content)
		var workers sync.WaitGroup
		for w := range uint64(4) {
			workers.Go(func() {
				r := rand.New(rand.NewPCG(8, w))
				p := make([]byte, n)
				checkReadsTogether(t, dev, r, start, content)
				for range 100 {
					off := r.Int64N(n)
					part := p[:r.Int64N(min(n-off, 1<<(1+r.IntN(17))))+1]
					if got, err := dev.ReadAt(part, start+off); err != nil || got != len(part) || !bytes.Equal(part, content[off:off+int64(len(part))]) {
						t.Errorf("read of %d bytes at %d: %d, %v, or other bytes than before", len(part), start+off, got, err)
						return
					}
				}
			})
		}
		workers.Wait()
	}
}

// checkReadsTogether reads parts of content, which begins at start, with one call: those that are done are right, and the others
// can be read one by one.
func checkReadsTogether(t *testing.T, dev block.Device, r *rand.Rand, start int64, content []byte) {
	n := int64(len(content))
	for range 10 {
		reads := make([]block.Read, r.IntN(150))
		for i := range reads {
			off := r.Int64N(n)
			reads[i] = block.Read{P: make([]byte, r.Int64N(min(n-off, 1<<r.IntN(14)))+1), Off: start + off}
		}
		inside := len(reads)
		reads = append(reads, block.Read{P: make([]byte, 2), Off: dev.Size() - 1}, block.Read{P: make([]byte, 2), Off: -1})
		done := block.ReadCached(dev, reads)
		for i, r := range reads {
			if r.Done {
				done--
			}
			if r.Done && (i >= inside || !bytes.Equal(r.P, content[r.Off-start:][:len(r.P)])) {
				t.Errorf("read %d of %d, %d bytes at %d with others: other bytes than before, or outside of the device", i, len(reads), len(r.P), r.Off)
				return
			}
		}
		if done != 0 {
			t.Errorf("ReadCached returned %d more than there are reads that are done", done)
		}
		if err := block.ReadAll(dev, reads[:inside]); err != nil {
			t.Error(err)
			return
		}
		for _, r := range reads[:inside] {
			if !r.Done || !bytes.Equal(r.P, content[r.Off-start:][:len(r.P)]) {
				t.Errorf("ReadAll: %d bytes at %d are other bytes than before", len(r.P), r.Off)
				return
			}
		}
		if block.ReadAll(dev, reads[inside:]) == nil {
			t.Error("ReadAll outside of the device succeeded")
		}
	}
}
