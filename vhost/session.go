package vhost

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
)

// Feature bits (§3.1).
const (
	featSegMax      = 1 << 2
	featReadOnly    = 1 << 5
	featBlkSize     = 1 << 6
	featFlush       = 1 << 9
	featTopology    = 1 << 10
	featConfigWCE   = 1 << 11
	featMQ          = 1 << 12
	featDiscard     = 1 << 13
	featWriteZeroes = 1 << 14
	featIndirect    = 1 << 28
	featEventIdx    = 1 << 29
	featProtocol    = 1 << 30
	featVersion1    = 1 << 32
)

// Protocol feature bits (§3.2).
const (
	protoMQ         = 1 << 0
	protoReplyAck   = 1 << 3
	protoBackendReq = 1 << 5
	protoConfig     = 1 << 9
	protoInflight   = 1 << 12
	protoMemSlots   = 1 << 15

	protoOffered = protoMQ | protoReplyAck | protoBackendReq | protoConfig | protoInflight | protoMemSlots
)

// Config space (§7.1).
const (
	configSize      = 256
	configWriteback = 32 // the only byte that the driver may write
)

// A session is one connection of a front-end. Its control goroutine owns everything that has no other owner below.
type session struct {
	export    *export
	conn      *net.UnixConn
	blockSize int // of the device, as the driver knows it

	features, protocol uint64 // change only while no queue runs
	featuresSet        bool
	rings              []ring
	inflight           *mapping // nil without in-flight tracking
	inflightQueueSize  uint16
	unflushed          unflushed // writes that a killed process would lose

	tableMu sync.Mutex
	table   *table // guest memory now

	executing chan struct{} // a token for each request that uses the device
	errors    *atomic.Int64

	ctx context.Context // ends with the session: what waits is abandoned
	end context.CancelCauseFunc

	drainMu  sync.Mutex
	waits    context.Context // ends with ctx, and with errDrained when requests that wait are to fail
	drainEnd context.CancelCauseFunc

	backendMu sync.Mutex
	backend   *os.File // our channel to the front-end; may be nil
}

func newSession(e *export, c *net.UnixConn) *session {
	s := &session{export: e, conn: c, blockSize: block.BlockSize(e.Device), rings: make([]ring, e.Queues), table: newTable(nil),
		executing: make(chan struct{}, maxExecuting), errors: &e.errors}
	s.ctx, s.end = context.WithCancelCause(context.Background())
	s.waits, s.drainEnd = context.WithCancelCause(s.ctx)
	for i := range s.rings {
		s.rings[i].call, s.rings[i].err = &signal{fd: -1}, &signal{fd: -1}
	}
	return s
}

func (s *session) log(format string, args ...any) { s.export.log(format, args...) }

// fail ends the session. The first cause is kept.
func (s *session) fail(cause error) {
	s.end(cause)
	s.conn.Close()
}

// run serves the connection to its end.
func (s *session) run() error {
	defer s.close()
	watch := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() { s.watchCapacity(watch) })
	defer all.Wait()
	defer close(watch)
	for {
		m, err := readMessage(s.conn)
		if err == nil {
			err = s.serve(m)
			m.close()
		}
		if err != nil {
			s.fail(err)
			if err = context.Cause(s.ctx); err == io.EOF || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
	}
}

// close ends the queues and frees everything.
func (s *session) close() {
	s.fail(net.ErrClosed)
	s.quiesce()
	if s.unflushed.pending() {
		// So that a server which is started again has lost nothing.
		var err error
		fault := guard(s.shared(), func() { err = s.unflushed.flush(s.export.Device.Flush) })
		if err = errors.Join(fault, err); err != nil {
			s.log("flush at the end of a connection: %v", err)
		}
	}
	for i := range s.rings {
		r := &s.rings[i]
		if r.kick != nil {
			r.kick.Close()
		}
		r.call.replace(-1)
		r.err.replace(-1)
	}
	s.table.release()
	if s.inflight != nil {
		s.inflight.release()
	}
	s.setBackend(nil)
}

// setBackend replaces the channel to the front-end.
func (s *session) setBackend(f *os.File) {
	s.backendMu.Lock()
	defer s.backendMu.Unlock()
	if s.backend != nil {
		s.backend.Close()
	}
	s.backend = f
}

// watchCapacity announces a changed size until stop is closed. What the front-end answers is not awaited: it may ask for
// the config space first (§4.2).
func (s *session) watchCapacity(stop chan struct{}) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.announceCapacity()
		case <-stop:
			return
		}
	}
}

// announceCapacity sends a CONFIG_CHANGE if the size is not the one that was sent last, also in an earlier session.
func (s *session) announceCapacity() {
	s.backendMu.Lock()
	defer s.backendMu.Unlock()
	size := s.export.Device.Size()
	if announced := s.export.announced.Load(); s.backend == nil || announced == 0 || announced == size {
		return
	}
	s.backend.SetWriteDeadline(time.Now().Add(time.Second))
	if _, err := s.backend.Write(appendHeader(nil, configChange, version, 0)); err == nil {
		s.export.announced.Store(size)
	}
}

// shared returns what guard needs to know: which addresses are memory of the front-end.
func (s *session) shared(tables ...*table) func(addr uintptr) bool {
	inflight := s.inflight // does not change while a queue runs
	return func(addr uintptr) bool {
		return inflight != nil && inflight.has(addr) ||
			slices.ContainsFunc(tables, func(t *table) bool { return t.has(addr) }) || s.currentHas(addr)
	}
}

func (s *session) currentHas(addr uintptr) bool {
	t := s.currentTable()
	defer t.release()
	return t.has(addr)
}

// currentTable returns a reference to the guest's memory.
func (s *session) currentTable() *table {
	s.tableMu.Lock()
	defer s.tableMu.Unlock()
	return s.table.acquire()
}

// setTable replaces the guest's memory.
func (s *session) setTable(t *table) {
	s.tableMu.Lock()
	old := s.table
	s.table = t
	s.tableMu.Unlock()
	old.release()
}

// waiting ends when requests that wait for space are to be abandoned, or to fail.
func (s *session) waiting() context.Context {
	s.drainMu.Lock()
	defer s.drainMu.Unlock()
	return s.waits
}

// stop stops a ring: what is in flight is completed, and nothing is written to its memory afterwards.
func (s *session) stop(list ...*ring) {
	var queues []*queue
	for _, r := range list {
		if r.running != nil {
			queues = append(queues, r.running)
			r.running.stopFetching()
			r.base = r.running.lastAvail
			r.running = nil
		}
	}
	late := time.AfterFunc(drainTimeout, func() {
		s.drainMu.Lock()
		defer s.drainMu.Unlock()
		s.drainEnd(errDrained)
	})
	for _, q := range queues {
		q.finish()
	}
	if !late.Stop() {
		<-s.waiting().Done()
		s.drainMu.Lock()
		defer s.drainMu.Unlock()
		s.waits, s.drainEnd = context.WithCancelCause(s.ctx)
	}
}

// quiesce stops all rings. update starts them again.
func (s *session) quiesce() {
	var list []*ring
	for i := range s.rings {
		list = append(list, &s.rings[i])
	}
	s.stop(list...)
}

// update starts and stops each ring as its state asks for.
func (s *session) update() error {
	for i := range s.rings {
		r := &s.rings[i]
		enabled := r.enabled || s.featuresSet && s.features&featProtocol == 0
		switch want := enabled && r.started && s.featuresSet; {
		case want && r.running == nil:
			if err := s.startRing(i); err != nil {
				r.started = false
				return fmt.Errorf("ring %d: %w", i, err)
			}
		case !want && r.running != nil:
			s.stop(r)
		}
	}
	return nil
}

func (s *session) startRing(i int) error {
	r := &s.rings[i]
	if r.size == 0 || !r.addressed {
		return errors.New("started without a size and addresses")
	}
	var area []byte
	if s.inflight != nil {
		stride := inflightStride(s.inflightQueueSize)
		if uint64(len(s.inflight.bytes)) < stride*uint64(i+1) {
			return errors.New("the in-flight area has no part for this ring")
		}
		area = s.inflight.bytes[stride*uint64(i):][:stride]
	}
	q, resume, err := newQueue(s, i, r, area)
	if err != nil {
		return err
	}
	r.running = q
	q.start(resume)
	return nil
}

// writeThrough reports whether each write is durable when it completes (§7.3).
func (s *session) writeThrough() bool {
	switch {
	case s.features&featFlush == 0:
		return true
	case s.features&featConfigWCE == 0:
		return false
	}
	return !s.export.writeback.Load()
}

// offered returns the virtio features.
func (s *session) offered() uint64 {
	f := uint64(featSegMax | featBlkSize | featFlush | featTopology | featConfigWCE | featIndirect | featEventIdx | featProtocol | featVersion1)
	if s.export.Queues > 1 {
		f |= featMQ
	}
	if s.export.ReadOnly {
		return f | featReadOnly
	}
	f |= featWriteZeroes
	if s.export.CanTrim {
		f |= featDiscard
	}
	return f
}

// config returns the config space.
func (s *session) config() []byte {
	b := make([]byte, configSize)
	e, bs := s.export, s.blockSize
	le := binary.LittleEndian
	le.PutUint64(b[0:], uint64(e.Device.Size())/block.SectorSize)
	le.PutUint32(b[12:], segMax)
	le.PutUint32(b[20:], uint32(bs))
	for physical := bs; physical < 4096; physical *= 2 {
		b[24]++
	}
	le.PutUint16(b[26:], 1)
	if !s.featuresSet && e.writeback.Load() || s.featuresSet && !s.writeThrough() {
		b[configWriteback] = 1
	}
	le.PutUint16(b[34:], uint16(e.Queues))
	if !e.ReadOnly {
		le.PutUint32(b[36:], maxDiscardSectors)
		le.PutUint32(b[40:], 1)
		le.PutUint32(b[44:], uint32(max(bs, 4096)/block.SectorSize))
		le.PutUint32(b[48:], maxZeroesSectors)
		le.PutUint32(b[52:], 1)
		b[56] = 1
	}
	return b
}
