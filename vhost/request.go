package vhost

import (
	"encoding/binary"
	"errors"
	"sync"
	"time"

	"github.com/dmsnap/dmsnap/block"
)

// Request types and statuses (§7.2).
const (
	reqIn          = 0
	reqOut         = 1
	reqFlush       = 4
	reqGetID       = 8
	reqDiscard     = 11
	reqWriteZeroes = 13

	statusOK     = 0
	statusIOErr  = 1
	statusUnsupp = 2
)

const (
	idSize       = 20
	unmapAllowed = 1 // flag of a write-zeroes segment

	pieceSize          = 1 << 20  // bytes that are in private memory at a time
	maxDiscardSectors  = 2 << 20  // 1 GiB
	maxZeroesSectors   = 64 << 10 // 32 MiB: they may have to be written
	maxInFlight        = 1024     // requests of a ring that have goroutines of their own
	maxExecuting       = 16       // of these, of a session, that use the device at a time
	drainTimeout       = 5 * time.Second
	controlSendTimeout = 10 * time.Second
)

var (
	errUnsupported = errors.New("unsupported request")
	errInvalid     = errors.New("invalid request")
	errWaits       = errors.New("there is no space now")
	errAbandoned   = errors.New("the front-end is gone")
	errDrained     = errors.New("the ring is stopped")
)

// Data goes through private memory: a device may look at it twice, and must not fault while it holds a lock.
var (
	smallPieces = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}
	largePieces = sync.Pool{New: func() any { b := make([]byte, pieceSize); return &b }}
)

// withPiece calls do with n bytes of private memory, n ≤ pieceSize.
func withPiece(n uint64, do func(p []byte) error) error {
	pool := &largePieces
	if n <= 64<<10 {
		pool = &smallPieces
	}
	b := pool.Get().(*[]byte)
	defer pool.Put(b)
	return do((*b)[:n])
}

// execute executes a request and writes its status. It returns the number of bytes for the used element, and false when
// the request was abandoned: it stays in flight. It runs under guard.
//
// piece, unless it is nil, is private memory for a quick request's data. Such a request does not wait for space: then the
// result is false and it is to be executed again, without piece.
func (s *session) execute(c *chain, piece []byte) (written uint32, ok bool) {
	in := c.inBytes
	if in == 0 {
		s.errors.Add(1)
		return 0, true // there is nowhere to put a status
	}
	data, err := s.executeHeader(c, in-1, piece)
	if err == errAbandoned || err == errWaits {
		return 0, false
	}
	return s.answer(c, data, err), true
}

// answer writes the status of a request of which data bytes were written, and returns the number of bytes for the used element.
func (s *session) answer(c *chain, data uint64, err error) (written uint32) {
	status, in := byte(statusOK), c.inBytes
	switch {
	case errors.Is(err, errUnsupported):
		status = statusUnsupp
	case err != nil:
		status = statusIOErr
	}
	if err != nil {
		s.errors.Add(1)
		data = 0
	}
	c.status[0] = status
	if c.in.write(c.table, in-1, c.status[:]) && data == in-1 && in <= 1<<31 {
		return uint32(in)
	}
	return 0 // an underestimate is allowed (§6.2)
}

// plainRead returns the place and the length of a request that was found to have the buffers of a read, if it is a legal one.
func (s *session) plainRead(c *chain) (off int64, n int, ok bool) {
	if !c.out.read(c.table, 0, c.header[:]) || binary.LittleEndian.Uint32(c.header[0:]) != reqIn {
		return 0, 0, false
	}
	sector, room := binary.LittleEndian.Uint64(c.header[8:]), c.inBytes-1
	return int64(sector * block.SectorSize), int(room), s.legal(sector, room)
}

// answerRead completes a read whose bytes are p.
func (s *session) answerRead(c *chain, p []byte) (written uint32) {
	if !c.in.write(c.table, 0, p) {
		return s.answer(c, 0, errInvalid)
	}
	return s.answer(c, uint64(len(p)), nil)
}

// executeHeader reads the request's header and executes it. room is the number of writable bytes before the status. It
// returns how many of them were written, from the first on.
func (s *session) executeHeader(c *chain, room uint64, piece []byte) (written uint64, err error) {
	out := c.outBytes
	head := &c.header
	if c.bad != nil || out < uint64(len(head)) || !c.out.read(c.table, 0, head[:]) {
		return 0, errInvalid
	}
	kind, sector := binary.LittleEndian.Uint32(head[0:]), binary.LittleEndian.Uint64(head[8:])
	payload := out - uint64(len(head))
	switch kind {
	case reqIn:
		return room, s.transfer(c, sector, room, false, piece)
	case reqOut:
		return 0, s.transfer(c, sector, payload, true, piece)
	case reqFlush:
		return 0, s.do(func() error { return s.unflushed.flush(s.export.Device.Flush) })
	case reqGetID:
		id := make([]byte, idSize)
		copy(id, s.export.ID)
		id = id[:min(room, idSize)]
		if !c.in.write(c.table, 0, id) {
			return 0, errInvalid
		}
		return uint64(len(id)), nil
	case reqDiscard, reqWriteZeroes:
		return 0, s.ranges(c, kind, payload)
	}
	return 0, errUnsupported
}

// transfer reads or writes n bytes at a sector: at once with piece, see execute, or piece by piece.
func (s *session) transfer(c *chain, sector, n uint64, write bool, piece []byte) error {
	if !s.legal(sector, n) {
		return errInvalid
	}
	if write && s.export.ReadOnly {
		return block.ErrReadOnly
	}
	off := int64(sector * block.SectorSize)
	if n <= uint64(len(piece)) {
		err := s.move(c, off, 0, write, piece[:n])
		if block.CanRetry(err) != nil {
			return errWaits
		}
		return s.logged(err)
	}
	for done := uint64(0); done < n; {
		m := min(n-done, pieceSize)
		err := s.do(func() error {
			return withPiece(m, func(p []byte) error { return s.move(c, off, done, write, p) })
		})
		if err != nil {
			return err
		}
		done += m
	}
	return nil
}

// move reads or writes the part of a request that begins with byte done of its data, through private memory p. The request's data
// begins at byte off of the device.
func (s *session) move(c *chain, off int64, done uint64, write bool, p []byte) error {
	dev, at := s.export.Device, off+int64(done)
	if !write {
		if _, err := dev.ReadAt(p, at); err != nil {
			return err
		}
		if !c.in.write(c.table, done, p) {
			return errInvalid
		}
		return nil
	}
	if !c.out.read(c.table, 16+done, p) {
		return errInvalid
	}
	if s.writeThrough() {
		return block.WriteDurable(dev, p, at)
	}
	_, err := dev.WriteAt(p, at)
	s.wrote()
	return err
}

// logged returns a request's error, and logs what is not the guest's fault.
func (s *session) logged(err error) error {
	if err != nil && err != errInvalid {
		s.log("%v", err)
	}
	return err
}

// wrote records a change that is not durable yet.
func (s *session) wrote() {
	if !s.export.Durable {
		s.unflushed.wrote()
	}
}

// ranges discards or zeroes the range of a request's segment.
func (s *session) ranges(c *chain, kind uint32, payload uint64) error {
	if kind == reqDiscard && s.features&featDiscard == 0 || kind == reqWriteZeroes && s.features&featWriteZeroes == 0 {
		return errUnsupported
	}
	var seg [16]byte // max_discard_seg and max_write_zeroes_seg are 1
	if payload != uint64(len(seg)) || !c.out.read(c.table, 16, seg[:]) {
		return errInvalid
	}
	sector, count, flags := binary.LittleEndian.Uint64(seg[0:]), binary.LittleEndian.Uint32(seg[8:]), binary.LittleEndian.Uint32(seg[12:])
	limit, known := uint32(maxDiscardSectors), uint32(0)
	if kind == reqWriteZeroes {
		limit, known = maxZeroesSectors, unmapAllowed
	}
	perBlock := uint64(s.blockSize / block.SectorSize)
	switch {
	case flags&^known != 0:
		return errUnsupported
	case s.export.ReadOnly:
		return block.ErrReadOnly
	case count > limit || !s.inside(sector, uint64(count)) || sector%perBlock != 0 || uint64(count)%perBlock != 0:
		return errInvalid
	}
	dev := s.export.Device
	off, n := int64(sector)*block.SectorSize, int64(count)*block.SectorSize
	return s.do(func() error {
		var err error
		if kind == reqDiscard {
			err = block.Discard(dev, off, n)
		} else {
			var f block.ZeroFlags
			if flags&unmapAllowed == 0 {
				f = block.KeepAllocated
			}
			err = block.Zero(dev, off, n, f)
		}
		if !s.writeThrough() {
			s.wrote()
		} else if err == nil {
			err = dev.Flush()
		}
		return err
	})
}

// legal reports whether n bytes at a sector can be read, and written unless the device is read-only.
func (s *session) legal(sector, n uint64) bool {
	return n > 0 && n <= 1<<32 && n%uint64(s.blockSize) == 0 && s.inside(sector, n/block.SectorSize)
}

// inside reports whether count sectors from sector on are in the device.
func (s *session) inside(sector, count uint64) bool {
	size := uint64(s.export.Device.Size()) / block.SectorSize
	return count <= size && sector <= size-count
}

// do uses the device, as one of maxExecuting, and again as long as it says that the change may be possible later
// (block.RetryLater). While it waits it holds neither memory nor one of the places. A request that waits is abandoned
// with its session, so that it can't follow later writes of the same guest; it fails when its ring is being stopped for longer
// than drainTimeout.
func (s *session) do(change func() error) error {
	err := block.Retry(s.waiting(), func() error {
		select {
		case s.executing <- struct{}{}:
		default: // slower
			select {
			case s.executing <- struct{}{}:
			case <-s.ctx.Done():
				return errAbandoned
			}
		}
		defer func() { <-s.executing }()
		return change()
	})
	switch {
	case err == errAbandoned:
		return err
	case block.CanRetry(err) == nil:
		return s.logged(err)
	case s.ctx.Err() != nil:
		return errAbandoned
	}
	return err // errDrained among others
}
