package blocktest

import (
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block"
)

// A Cold device has all of its bytes in memory (block.CacheReader) but those from byte From on, for which ReadAt waits until Free is
// closed.
type Cold struct {
	*block.Memory
	From     int64
	Free     chan struct{}
	Together atomic.Int64 // reads that came by ReadCached
	Waiting  atomic.Int64 // calls of ReadAt that have waited, or wait
}

// ReadCached reads what lies before From.
func (d *Cold) ReadCached(reads []block.Read) (done int) {
	d.Together.Add(int64(len(reads)))
	for i := range reads {
		r := &reads[i]
		if r.Off >= d.From {
			continue
		}
		if _, err := d.Memory.ReadAt(r.P, r.Off); err == nil {
			r.Done = true
			done++
		}
	}
	return done
}

// ReadAt reads, from From on after Free was closed.
func (d *Cold) ReadAt(p []byte, off int64) (int, error) {
	if off >= d.From {
		d.Waiting.Add(1)
		<-d.Free
	}
	return d.Memory.ReadAt(p, off)
}
