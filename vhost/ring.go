package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/internal/inline"
)

// Descriptor flags.
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4
)

const (
	segMax         = 126  // data segments of a request, as the config space says
	maxDescriptors = 1024 // of one chain
)

// fenceWord is what fence changes.
var fenceWord atomic.Uint32

// fence is a full memory barrier: Go's atomic read-modify-write operations are sequentially consistent.
func fence() { fenceWord.Add(1) }

// A ring is what the front-end set up for one virtqueue. The control goroutine alone uses it.
type ring struct {
	size                    uint32
	descUA, usedUA, availUA uint64
	addressed               bool
	base                    uint16 // the next available entry
	kick                    *os.File
	call, err               *signal
	enabled, started        bool

	running *queue // nil while stopped
}

// A signal is a descriptor of the front-end that takes 8 bytes: an eventfd or a socket. Its methods may be called
// concurrently.
type signal struct {
	mu sync.Mutex
	fd int // -1: none
}

// replace takes over fd and closes the one before.
func (s *signal) replace(fd int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd >= 0 {
		unix.Close(s.fd)
	}
	s.fd = fd
}

// send signals without blocking. A signal that is pending already is enough.
func (s *signal) send() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd >= 0 {
		unix.Write(s.fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
}

// checkSignal refuses descriptors that could block, and makes the others non-blocking.
func checkSignal(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case 0, unix.S_IFSOCK, unix.S_IFIFO: // 0: an eventfd
		return unix.SetNonblock(fd, true)
	}
	return errors.New("a notification descriptor is no eventfd, socket or pipe")
}

// eventFD returns the descriptor of an eventfd, nil for others.
func eventFD(f *os.File) syscall.RawConn {
	c, err := f.SyscallConn()
	if err != nil {
		return nil
	}
	var st unix.Stat_t
	c.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) })
	if err != nil || st.Mode&unix.S_IFMT != 0 {
		return nil
	}
	return c
}

// A queue is a running ring. One goroutine at a time fetches requests (a fetcher), and executes those that are quick (inline.go);
// each of the others is executed by its own goroutine.
type queue struct {
	s     *session
	index int
	table *table // of the ring's own parts

	shared func(addr uintptr) bool // whether an address is memory of the front-end: the ring's, the in-flight area, or guest memory now
	n      uint16
	kick   *os.File
	kickFD syscall.RawConn // of kick, when it is an eventfd
	call   *signal
	err    *signal

	eventIdx, indirect bool

	desc, avail, used []byte

	stop     chan struct{}  // closed: fetch no more
	fetching sync.WaitGroup // the goroutine that fetches
	inline   inlineState
	requests sync.WaitGroup // the goroutines that execute requests, those that fetch or did among them
	room     chan struct{}  // a token for each request that has a goroutine of its own, see run

	lastAvail uint16 // of the fetching goroutine while it runs

	mu       sync.Mutex // guards what follows, and the used ring
	usedIdx  uint16
	notified uint16 // used.idx at the last decision to signal
	busy     []bool // by head: in flight
	inflight inflight
	broken   error
}

// newQueue translates the addresses of a ring and reads its state. resume are the heads that were in flight when an
// earlier back-end ended.
func newQueue(s *session, index int, r *ring, area []byte) (q *queue, resume []uint16, err error) {
	n := uint64(r.size)
	q = &queue{s: s, index: index, table: s.table.acquire(), n: uint16(n), kick: r.kick, call: r.call, err: r.err,
		eventIdx: s.features&featEventIdx != 0, indirect: s.features&featIndirect != 0,
		stop: make(chan struct{}), room: make(chan struct{}, min(n, maxInFlight)), busy: make([]bool, n),
		inflight: inflight{area: area}}
	t := q.table
	defer func() {
		if err != nil {
			t.release()
		}
	}()
	for _, part := range []struct {
		mem     *[]byte
		ua, len uint64
		align   uintptr
	}{{&q.desc, r.descUA, 16 * n, 16}, {&q.avail, r.availUA, 6 + 2*n, 2}, {&q.used, r.usedUA, 6 + 8*n, 4}} {
		if *part.mem, err = q.table.ring(part.ua, part.len); err != nil {
			return nil, nil, err
		}
		if !aligned(*part.mem, part.align) {
			return nil, nil, fmt.Errorf("ring part at %#x is not aligned to %d bytes", part.ua, part.align)
		}
	}
	q.inline.watchdog = inline.NewWatchdog(q.overdue)
	q.shared = s.shared(t)
	fault := guard(q.shared, func() {
		q.usedIdx = load16(q.used, 2)
		q.notified = q.usedIdx
		resume, err = q.inflight.recover(q.n, q.usedIdx)
	})
	if err = errors.Join(err, fault); err != nil {
		return nil, nil, err
	}
	q.lastAvail = r.base
	if area != nil {
		// The base that a front-end sends after a crash is the used index, and says nothing of what was fetched (§4.3).
		q.lastAvail = q.usedIdx + uint16(len(resume))
	}
	return q, resume, nil
}

// start begins to serve the queue, at first what was in flight.
func (q *queue) start(resume []uint16) {
	q.kickFD = eventFD(q.kick)
	q.kick.SetReadDeadline(time.Time{})
	q.fetching.Add(1)
	q.requests.Add(1)
	go func() {
		if err := q.resume(resume); err != nil {
			q.failed(err)
			q.fetching.Done()
			q.requests.Done()
			return
		}
		q.serve()
	}()
}

// serve fetches until the queue is stopped, breaks, or another goroutine fetches. The caller has added to requests.
func (q *queue) serve() {
	defer q.requests.Done()
	f := fetcher{q: q}
	defer f.release()
	awake.Add(1)
	kept, err := f.loop()
	if err != nil {
		q.failed(err)
	}
	if kept {
		awake.Add(-1)
		q.fetching.Done()
	}
}

// failed ends what an error ends: the session after a fault, else the queue.
func (q *queue) failed(err error) {
	if err == errFault {
		q.s.fail(err)
	} else {
		q.fail(err)
	}
}

// stopFetching ends the fetching goroutine, and leaves the requests in flight.
func (q *queue) stopFetching() {
	close(q.stop)
	q.kick.SetReadDeadline(time.Unix(1, 0))
	q.fetching.Wait()
}

// finish waits for the requests in flight and gives up the memory.
func (q *queue) finish() {
	q.requests.Wait()
	q.table.release()
}

// fail stops the queue because the driver broke the rules; the session goes on (§9.1).
func (q *queue) fail(err error) {
	q.mu.Lock()
	first := q.broken == nil
	q.broken = err
	q.mu.Unlock()
	if first {
		q.s.log("ring %d stopped: %v", q.index, err)
		q.err.send()
	}
}

// available returns the driver's index.
func (q *queue) available() (idx uint16, err error) {
	err = guard(q.shared, func() { idx = load16(q.avail, 2) })
	if err == nil && idx-q.lastAvail > q.n {
		err = fmt.Errorf("available index %d is more than %d entries after %d", idx, q.n, q.lastAvail)
	}
	return idx, err
}

// armKick asks for a kick at the next request, and returns the driver's index after that (§6.3).
func (q *queue) armKick() (idx uint16, err error) {
	err = guard(q.shared, func() {
		if q.eventIdx {
			store16(q.used, 4+8*int(q.n), q.lastAvail)
		}
		fence()
		idx = load16(q.avail, 2)
	})
	return idx, err
}

// resume starts what was in flight when an earlier back-end ended.
func (q *queue) resume(heads []uint16) error {
	for _, head := range heads {
		if !q.waitRoom() {
			return nil // still marked in the in-flight area
		}
		c := newChain(q.s.currentTable())
		var err error
		fault := guard(q.s.shared(q.table, c.table), func() {
			q.mu.Lock()
			q.busy[head] = true
			q.mu.Unlock()
			err = q.parse(c, head)
		})
		if fault != nil {
			err = fault
		}
		if err != nil {
			c.release()
			return err
		}
		q.run(c)
	}
	return nil
}

// begin marks a head as in flight.
func (q *queue) begin(head uint16) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case head >= q.n:
		return fmt.Errorf("available descriptor %d is outside a ring of %d", head, q.n)
	case q.busy[head]:
		return fmt.Errorf("descriptor %d is made available while it is in flight", head)
	}
	q.busy[head] = true
	q.inflight.begin(head)
	return nil
}

// A chain is a request's buffers, with the memory that they are in. Chains are reused.
type chain struct {
	head    uint16
	out, in segments // device-readable and device-writable

	outBytes, inBytes uint64 // of out and in
	bad               error  // the buffers break a rule that the request can be answered about
	table             *table

	descriptor [16]byte // a copy of the one that is looked at
	indirect   []byte   // a copy of the indirect table
	header     [16]byte // a copy of the request's header
	status     [1]byte
}

var chains = sync.Pool{New: func() any { return new(chain) }}

// newChain returns a chain without buffers, which takes over a reference to the memory that they will be in.
func newChain(t *table) *chain {
	c := chains.Get().(*chain)
	c.table = t
	return c
}

// clear forgets the buffers and keeps the memory.
func (c *chain) clear() { c.out, c.in, c.bad = c.out[:0], c.in[:0], nil }

// release gives up the memory, and the chain.
func (c *chain) release() {
	c.table.release()
	c.clear()
	c.table = nil
	chains.Put(c)
}

// parse reads the descriptors of a head into a chain without buffers. An error means that the driver is broken; what is wrong with
// this request alone is in chain.bad. Each descriptor is copied once, and the copy is checked and used.
func (q *queue) parse(c *chain, head uint16) error {
	c.head = head
	list, count := q.desc, uint32(q.n) // the table that descriptors are taken from
	limit := min(max(uint32(q.n), segMax+2), maxDescriptors)
	d := &c.descriptor
	nested := false
	err := func() error {
		for i, seen := uint32(head), uint32(0); ; {
			if i >= count {
				return fmt.Errorf("descriptor %d is outside a table of %d", i, count)
			}
			if seen++; seen > limit {
				return fmt.Errorf("a chain has more than %d descriptors", limit)
			}
			copy(d[:], list[16*i:])
			addr, size := binary.LittleEndian.Uint64(d[0:]), uint64(binary.LittleEndian.Uint32(d[8:]))
			flags, next := binary.LittleEndian.Uint16(d[12:]), uint32(binary.LittleEndian.Uint16(d[14:]))
			if flags&descIndirect != 0 {
				switch {
				case !q.indirect || nested || flags&descNext != 0:
					return errors.New("an indirect descriptor where none may be")
				case size == 0 || size%16 != 0 || size/16 > uint64(limit):
					return fmt.Errorf("an indirect table of %d bytes", size)
				}
				copied := slices.Grow(c.indirect[:0], int(size))[:size]
				c.indirect = copied
				one := [1]segment{{addr, size}}
				if !segments(one[:]).read(c.table, 0, copied) {
					return fmt.Errorf("an indirect table at %#x is outside of memory", addr)
				}
				list, count, nested, i = copied, uint32(size/16), true, 0
				seen--
				continue
			}
			switch {
			case flags&descWrite != 0:
				c.in = append(c.in, segment{addr, size})
			case len(c.in) > 0:
				c.bad = errors.New("a readable buffer follows a writable one")
			default:
				c.out = append(c.out, segment{addr, size})
			}
			if flags&descNext == 0 {
				return nil
			}
			i = next
		}
	}()
	c.outBytes, c.inBytes = c.out.total(), c.in.total()
	if err == nil && (c.outBytes > 1<<32 || c.inBytes > 1<<32) {
		c.bad = errors.New("a request is longer than 4 GiB")
	}
	return err
}

// waitRoom waits until fewer requests than room has places have goroutines of their own. It reports false when the queue is stopped.
func (q *queue) waitRoom() bool {
	if len(q.room) < cap(q.room) {
		return true
	}
	select {
	case q.room <- struct{}{}:
		<-q.room
		return true
	case <-q.stop:
		return false
	}
}

// run executes a request on its own goroutine. It never waits: the last ones of a batch have no place in room when waitRoom found
// fewer than they are.
func (q *queue) run(c *chain) {
	place := false
	select {
	case q.room <- struct{}{}:
		place = true
	default:
	}
	q.requests.Go(func() {
		defer func() {
			if place {
				<-q.room
			}
		}()
		defer c.release()
		fault := guard(q.s.shared(q.table, c.table), func() {
			began := time.Now()
			written, ok := q.s.execute(c, nil)
			if t := q.inline.trial(c); t != nil {
				t.Took(time.Since(began))
			}
			if ok {
				q.push(c.head, written)
				q.signal()
			}
		})
		if fault != nil {
			q.s.fail(fault)
		}
	})
}

// push writes the used element.
func (q *queue) push(head uint16, written uint32) {
	q.mu.Lock()
	defer q.mu.Unlock() // also after a fault
	if q.broken != nil && q.inflight.area == nil {
		return // the driver is broken; it resets the ring
	}
	q.inflight.completing(head)
	slot := 4 + 8*int(q.usedIdx&(q.n-1))
	store32(q.used, slot, uint32(head))
	store32(q.used, slot+4, written)
	q.busy[head] = false
	q.usedIdx++
	store32(q.used, 0, uint32(q.usedIdx)<<16) // flags are 0
	q.inflight.completed(head, q.usedIdx)
}

// signal signals if the driver wants that for what was pushed since the last decision (§6.3).
func (q *queue) signal() {
	if q.wantsSignal() {
		q.call.send()
	}
}

func (q *queue) wantsSignal() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.notified == q.usedIdx {
		return false
	}
	fence()
	old := q.notified
	q.notified = q.usedIdx
	if !q.eventIdx {
		return load16(q.avail, 0)&1 == 0
	}
	event := load16(q.avail, 4+2*int(q.n))
	return q.usedIdx-event-1 < q.usedIdx-old
}
