package nbd

import (
	"math/bits"
	"slices"
	"sync"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// A buffer holds a payload in flight. Its capacity is a power of two from minBuffer on, so that buffers of one size can
// be reused.
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
	maxPayloadBytes = 64 << 20 // bytes of payloads of one connection under way, replies included
	// smallPayload is the length up to which a payload does not count against the limit of the whole server: a client
	// that reads and writes in small pieces never waits for others, and has at most maxInFlight of them.
	smallPayload = 64 << 10
)

// payloadBytes counts the bytes of payloads that a connection has in flight.
type payloadBytes struct {
	conn          *conn
	reads, writes account

	mu   sync.Mutex
	n    int64
	room chan struct{} // of one: n went down
}

func (h *payloadBytes) init(c *conn) {
	h.conn, h.room = c, make(chan struct{}, 1)
	h.reads.class, h.writes.class = &c.export.readPayloads, &c.export.writePayloads
}

// account returns the account of the payloads of a command.
func (h *payloadBytes) account(cmd wire.Command) *account {
	if cmd == wire.CmdRead {
		return &h.reads
	}
	return &h.writes
}

// add waits until n more bytes may be under way, of this connection and of all; one payload of the connection always
// is. It reports false when the connection ends meanwhile. One goroutine at a time calls it.
func (h *payloadBytes) add(n int64, cmd wire.Command) bool {
	for !h.fits(n) {
		if !h.conn.wait(h.room) {
			return false
		}
	}
	if n > smallPayload && !h.conn.server.payloads.take(n, h.account(cmd), h.conn.wait) {
		h.remove(n)
		return false
	}
	return true
}

func (h *payloadBytes) fits(n int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.n > 0 && h.n+n > maxPayloadBytes {
		return false
	}
	h.n += n
	return true
}

// hasRoom reports whether add would not wait for n ≤ smallPayload bytes.
func (h *payloadBytes) hasRoom(n int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.n+n <= maxPayloadBytes
}

// sub is the opposite of add.
func (h *payloadBytes) sub(n int64, cmd wire.Command) {
	if n > smallPayload {
		h.conn.server.payloads.give(n, h.account(cmd))
	}
	h.remove(n)
}

func (h *payloadBytes) remove(n int64) {
	h.mu.Lock()
	h.n -= n
	h.mu.Unlock()
	select {
	case h.room <- struct{}{}:
	default:
	}
}

// A budget is a number of bytes that connections share. Payloads of writes that wait for space in a device keep their
// share for hours, so no class may use all of it: a class leaves as much free as it has itself, and an account within
// it leaves as much of that. The less is free the less a new account gets, and something is always left for it: see
// fits.
//
// Waiting requests are served in the order of arrival, except those that do not fit yet.
type budget struct {
	total int64

	mu      sync.Mutex
	used    int64
	waiting []*share
}

// A class is the reads, or the writes, of one export: reads never wait for space in the device.
type class struct{ used int64 } // budget.mu guards it

// An account is what one connection has of a class.
type account struct {
	class *class
	used  int64 // budget.mu guards it
}

// A share is a request for bytes by take.
type share struct {
	n     int64
	who   *account
	given chan struct{}
}

// fits reports whether a may have n more bytes. mu is held.
func (b *budget) fits(n int64, a *account) bool {
	free, class := b.total-b.used-n, a.class.used+n
	return free >= class && (free-class)/2 >= a.used+n
}

// move adds n bytes to what a has. mu is held.
func (b *budget) move(n int64, a *account) {
	b.used += n
	a.class.used += n
	a.used += n
}

// take waits for n bytes. It reports false, and has none, when wait does.
func (b *budget) take(n int64, a *account, wait func(<-chan struct{}) bool) bool {
	b.mu.Lock()
	if b.fits(n, a) {
		b.move(n, a)
		b.mu.Unlock()
		return true
	}
	s := &share{n, a, make(chan struct{})}
	b.waiting = append(b.waiting, s)
	b.mu.Unlock()
	for wait(s.given) {
		select {
		case <-s.given:
			return true
		default:
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if i := slices.Index(b.waiting, s); i >= 0 {
		b.waiting = slices.Delete(b.waiting, i, i+1)
		return false
	}
	b.move(-n, a) // granted in the meantime
	b.share()
	return false
}

// give returns n bytes.
func (b *budget) give(n int64, a *account) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.move(-n, a)
	b.share()
}

// share serves waiting requests. mu is held.
func (b *budget) share() {
	b.waiting = slices.DeleteFunc(b.waiting, func(s *share) bool {
		if !b.fits(s.n, s.who) {
			return false
		}
		b.move(s.n, s.who)
		close(s.given)
		return true
	})
}
