package snapshot

import (
	"sync"

	"github.com/dmsnap/dmsnap/block"
)

// A payload is what a changing request puts in its range: bytes, or zeros when data is nil.
type payload struct {
	data    []byte
	zero    block.ZeroFlags // how, when data is nil
	durable bool            // the caller needs it durable: FUA
}

// part is the payload of bytes [from, from+n) of the request.
func (pl payload) part(from, n int64) payload {
	if pl.data != nil {
		pl.data = pl.data[from : from+n]
	}
	return pl
}

// put applies pl to n bytes of dev at off.
func (pl payload) put(dev block.Device, off, n int64) error {
	switch {
	case pl.data == nil:
		if err := block.Zero(dev, off, n, pl.zero); err != nil || !pl.durable {
			return err
		}
		return dev.Flush()
	case pl.durable:
		return block.WriteDurable(dev, pl.data, off)
	}
	_, err := dev.WriteAt(pl.data, off)
	return err
}

// lay puts pl in b, which is as long as it.
func (pl payload) lay(b []byte) {
	if pl.data == nil {
		clear(b)
		return
	}
	copy(b, pl.data)
}

// copyUnit is the most that is held in memory to copy a stretch, in bytes; longer ones go in pieces.
const copyUnit = 1 << 20

// Two sizes of buffers, so that many small writers don't hold a mebibyte each.
const smallUnit = 64 << 10

var (
	smallBuffers = sync.Pool{New: func() any { return new([smallUnit]byte) }}
	largeBuffers = sync.Pool{New: func() any { return new([copyUnit]byte) }}
)

// withBuffer calls f with a buffer of n ≤ copyUnit bytes whose content is anything.
func withBuffer(n int64, f func(b []byte) error) error {
	if n <= smallUnit {
		b := smallBuffers.Get().(*[smallUnit]byte)
		defer smallBuffers.Put(b)
		return f(b[:n])
	}
	b := largeBuffers.Get().(*[copyUnit]byte)
	defer largeBuffers.Put(b)
	return f(b[:n])
}

// copyRange copies n bytes from one device to another, in pieces of at most copyUnit. A read that
// failed is told apart by readError.
func copyRange(dst block.Device, to int64, src block.Device, from, n int64) error {
	return withBuffer(min(n, copyUnit), func(b []byte) error {
		for n > 0 {
			b = b[:min(n, copyUnit)]
			if _, err := src.ReadAt(b, from); err != nil {
				return &copyError{"read", err}
			}
			if _, err := dst.WriteAt(b, to); err != nil {
				return &copyError{"write", err}
			}
			k := int64(len(b))
			from, to, n = from+k, to+k, n-k
		}
		return nil
	})
}

// A copyError says which side of a copy failed.
type copyError struct {
	op  string // "read" or "write"
	err error
}

func (e *copyError) Error() string { return e.op + ": " + e.err.Error() }
func (e *copyError) Unwrap() error { return e.err }
