package nbd

import (
	"math/bits"
	"sync"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// A buffer is a payload on its way. Its room is a power of two from minBuffer on, so that buffers of
// one size can be used again whatever they held.
type buffer struct {
	b     []byte
	class int
}

const (
	minBuffer   = 4 << 10
	bufferSizes = 14 // 4 KiB … 32 MiB
)

var buffers [bufferSizes]sync.Pool

// getBuffer returns a buffer of n ≤ wire.MaxPayload bytes whose content is anything.
func getBuffer(n uint32) *buffer {
	if n > wire.MaxPayload {
		panic("nbd: buffer longer than a payload")
	}
	class := max(0, bits.Len32((max(n, 1)-1)/minBuffer))
	if p, _ := buffers[class].Get().(*buffer); p != nil {
		p.b = p.b[:n]
		return p
	}
	return &buffer{make([]byte, n, minBuffer<<class), class}
}

func (p *buffer) free() {
	if p != nil {
		buffers[p.class].Put(p)
	}
}
