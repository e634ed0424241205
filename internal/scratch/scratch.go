// Package scratch lends buffers for the time of one call, so that copying allocates nothing.
package scratch

import "sync"

// Most is the size of the largest buffer, in bytes: longer ranges are copied in pieces.
const Most = 1 << 20

// Two sizes of buffers, so that many small writers don't hold a mebibyte each.
const small = 64 << 10

var (
	smallBuffers = sync.Pool{New: func() any { return new([small]byte) }}
	largeBuffers = sync.Pool{New: func() any { return new([Most]byte) }}
)

// With calls f with a buffer of n ≤ Most bytes, whose content is anything. f must not keep it. It may be called
// concurrently.
func With(n int64, f func(b []byte) error) error {
	if n <= small {
		b := smallBuffers.Get().(*[small]byte)
		defer smallBuffers.Put(b)
		return f(b[:n])
	}
	b := largeBuffers.Get().(*[Most]byte)
	defer largeBuffers.Put(b)
	return f(b[:n])
}
