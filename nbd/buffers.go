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
	class := bits.Len32((max(n, 1) - 1) / minBuffer)
	if p, _ := buffers[class].Get().(*buffer); p != nil {
		p.b = p.b[:n]
		return p
	}
	return &buffer{make([]byte, n, minBuffer<<class), class}
}

func (p *buffer) free() { buffers[p.class].Put(p) }

const (
	maxHeld = 64 << 20 // bytes of payloads of one connection under way, replies included
	// smallPayload is the length up to which a payload takes no part in the limit of the whole server: who
	// reads and writes in small pieces never waits for others, and needs maxInFlight of them at most.
	smallPayload = 64 << 10
)

// held is what a connection has under way, in bytes of payloads.
type held struct {
	server *budget
	stop   <-chan struct{}

	mu   sync.Mutex
	n    int64
	room chan struct{} // of one: n went down
}

func (h *held) init(server *budget, stop <-chan struct{}) {
	h.server, h.stop, h.room = server, stop, make(chan struct{}, 1)
}

// add waits until n more bytes may be under way, of this connection and of all; one payload of the
// connection always may. It reports false when the connection stops meanwhile. One goroutine at a time
// calls it.
func (h *held) add(n int64) bool {
	for !h.fits(n) {
		select {
		case <-h.room:
		case <-h.stop:
			return false
		}
	}
	if n > smallPayload && !h.server.take(n, h.stop) {
		h.remove(n)
		return false
	}
	return true
}

func (h *held) fits(n int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.n > 0 && h.n+n > maxHeld {
		return false
	}
	h.n += n
	return true
}

// sub is the opposite of add.
func (h *held) sub(n int64) {
	if n > smallPayload {
		h.server.give(n)
	}
	h.remove(n)
}

func (h *held) remove(n int64) {
	h.mu.Lock()
	h.n -= n
	h.mu.Unlock()
	select {
	case h.room <- struct{}{}:
	default:
	}
}

// A budget is a number of bytes that is shared out in the order in which it was asked for, so that long
// payloads are not overtaken for ever by shorter ones.
type budget struct {
	mu      sync.Mutex
	free    int64
	waiting []*share
}

// A share is asked for by take.
type share struct {
	n     int64
	given chan struct{}
}

// take waits for n bytes. It reports false, and has none, when stop closes first.
func (b *budget) take(n int64, stop <-chan struct{}) bool {
	b.mu.Lock()
	if len(b.waiting) == 0 && n <= b.free {
		b.free -= n
		b.mu.Unlock()
		return true
	}
	s := &share{n, make(chan struct{})}
	b.waiting = append(b.waiting, s)
	b.mu.Unlock()
	select {
	case <-s.given:
		return true
	case <-stop:
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, w := range b.waiting {
		if w == s {
			b.waiting = append(b.waiting[:i], b.waiting[i+1:]...)
			b.share() // those behind may fit
			return false
		}
	}
	b.free += n // given at the last moment
	b.share()
	return false
}

// give returns n bytes.
func (b *budget) give(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += n
	b.share()
}

// share serves those who wait, as long as the first one fits. mu is held.
func (b *budget) share() {
	for len(b.waiting) > 0 && b.waiting[0].n <= b.free {
		b.free -= b.waiting[0].n
		close(b.waiting[0].given)
		b.waiting = b.waiting[1:]
	}
}
