package store

import (
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// A Filler adds chunks to a store that nothing else uses. It stores them one after the other, so that it combines
// scattered origin chunks to large writes. Ranges of zeros become holes where the device supports them.
type Filler struct {
	st      *Store
	buf     []byte        // gathered
	at      int64         // byte of the device where buf belongs
	waiting []Reservation // whose last bytes are in buf
}

// NewFiller returns a Filler that writes at most together bytes at once.
func NewFiller(st *Store, together int) *Filler {
	return &Filler{st: st, buf: make([]byte, 0, together)}
}

// Add adds the origin chunks old, old+1, … of which none has an exception yet. read gives their content: it fills p
// with the bytes at off of the origin. They are in the store after the next Flush.
//
// Errors: those of Reserve, ErrFull among them, of the device and of read. After an error the Filler must not be used
// again.
func (f *Filler) Add(old ondisk.OriginChunk, count uint64, read func(p []byte, off int64) error) error {
	for count > 0 {
		r, err := f.st.Reserve(old, count)
		if err != nil {
			return err
		}
		if err := f.gather(r, read); err != nil {
			return err
		}
		old, count = old+ondisk.OriginChunk(r.Count), count-r.Count
	}
	return nil
}

// gather reads the chunks of a reservation.
func (f *Filler) gather(r Reservation, read func(p []byte, off int64) error) error {
	l := f.st.layout
	for i, n := int64(0), int64(r.Count)<<l.Shift(); i < n; {
		off := l.COWOffset(r.New) + i
		if len(f.buf) == cap(f.buf) || f.at+int64(len(f.buf)) != off { // full, or there is an area between
			if err := f.Flush(); err != nil {
				return err
			}
			f.at = off
		}
		p := f.buf[len(f.buf):min(cap(f.buf), len(f.buf)+int(n-i))]
		if err := read(p, l.OriginOffset(r.Old)+i); err != nil {
			return err
		}
		f.buf = f.buf[:len(f.buf)+len(p)]
		i += int64(len(p))
	}
	f.waiting = append(f.waiting, r)
	return nil
}

// Flush writes what was gathered and commits it. Sync makes it durable.
func (f *Filler) Flush() error {
	if err := block.WriteSparse(f.st.dev, f.buf, f.at, block.AllHoles); err != nil {
		return fmt.Errorf("write the new store: %w", err)
	}
	for _, r := range f.waiting {
		if err := r.Commit(); err != nil {
			return err
		}
	}
	f.buf, f.waiting = f.buf[:0], f.waiting[:0]
	return nil
}
