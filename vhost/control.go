package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
)

// noFD is the bit of a kick, call or err message that says that it has no descriptor.
const noFD = 1 << 8

// payloads holds the least size of the payload of each request that is offered. A request that is not in it is refused.
var payloads = map[uint32]int{
	getFeatures: 0, setFeatures: 8, setOwner: 0, resetOwner: 0, setMemTable: 8, setVringNum: 8, setVringAddr: 40,
	setVringBase: 8, getVringBase: 8, setVringKick: 8, setVringCall: 8, setVringErr: 8, getProtocolFeatures: 0,
	setProtocolFeatures: 8, getQueueNum: 0, setVringEnable: 8, setBackendReqFD: 0, getConfig: 12, setConfig: 12,
	getInflightFD: 20, setInflightFD: 20, getMaxMemSlots: 0, addMemReg: 40, remMemReg: 40,
}

// serve handles a message and answers it. An error ends the session.
func (s *session) serve(m *message) error {
	reply, fd, err := s.handle(m)
	if fd >= 0 {
		defer unix.Close(fd)
	}
	s.conn.SetWriteDeadline(time.Now().Add(controlSendTimeout))
	acks := m.flags&flagAck != 0 && s.protocol&protoReplyAck != 0
	switch {
	case err == nil && reply != nil:
		return writeReply(s.conn, m.request, reply, fd)
	case err == nil && !acks:
		return nil
	case err == nil:
		return writeReply(s.conn, m.request, u64Payload(0), -1)
	case m.request == getConfig:
		return writeReply(s.conn, m.request, nil, -1)
	case acks && !hasReply(m.request):
		s.log("request %d refused: %v", m.request, err)
		return writeReply(s.conn, m.request, u64Payload(1), -1)
	}
	return fmt.Errorf("request %d: %w", m.request, err)
}

// hasReply reports whether a request has a reply of its own, so that a failure can't be acknowledged.
func hasReply(request uint32) bool {
	switch request {
	case getFeatures, getProtocolFeatures, getQueueNum, getVringBase, getConfig, getInflightFD, getMaxMemSlots:
		return true
	}
	return false
}

// checkFDs refuses descriptors that a message does not call for, and missing ones.
func checkFDs(m *message) error {
	want := 0
	switch m.request {
	case setMemTable:
		return nil // counted by its handler
	case remMemReg:
		return nil // one may be there; it is closed
	case setVringKick, setVringCall, setVringErr:
		if m.u64(0)&noFD == 0 {
			want = 1
		}
	case setBackendReqFD, setInflightFD, addMemReg:
		want = 1
	}
	if len(m.fds) != want {
		return fmt.Errorf("%d file descriptors in place of %d", len(m.fds), want)
	}
	return nil
}

// handle does what a message asks for. reply is nil where the request has none; fd is -1, or closed by the caller.
func (s *session) handle(m *message) (reply []byte, fd int, err error) {
	fd = -1
	least, known := payloads[m.request]
	if !known {
		return nil, fd, errors.New("not supported")
	}
	if len(m.payload) < least {
		return nil, fd, fmt.Errorf("payload of %d bytes, at least %d required", len(m.payload), least)
	}
	if err := checkFDs(m); err != nil {
		return nil, fd, err
	}
	switch m.request {
	case getFeatures:
		return u64Payload(s.offered()), fd, nil
	case setFeatures:
		f := m.u64(0)
		if f&^s.offered() != 0 {
			return nil, fd, fmt.Errorf("features %#x were not offered", f&^s.offered())
		}
		s.quiesce()
		s.features, s.featuresSet = f, true
		return nil, fd, s.update()
	case setOwner:
		return nil, fd, nil
	case resetOwner:
		for i := range s.rings {
			s.rings[i].enabled = false
		}
		s.quiesce()
		return nil, fd, s.update()
	case getProtocolFeatures:
		return u64Payload(protoOffered), fd, nil
	case setProtocolFeatures:
		f := m.u64(0)
		if f&^protoOffered != 0 {
			return nil, fd, fmt.Errorf("protocol features %#x were not offered", f&^protoOffered)
		}
		s.protocol = f
		return nil, fd, nil
	case getQueueNum:
		return u64Payload(uint64(len(s.rings))), fd, nil
	case getMaxMemSlots:
		return u64Payload(maxSlots), fd, nil
	case setMemTable:
		return nil, fd, s.setMemTable(m)
	case addMemReg:
		return nil, fd, s.addMemReg(m)
	case remMemReg:
		return nil, fd, s.remMemReg(m)
	case getConfig:
		reply, err = s.getConfig(m)
		return reply, fd, err
	case setConfig:
		return nil, fd, s.setConfig(m)
	case setBackendReqFD:
		return nil, fd, s.setBackendFD(m)
	case getInflightFD:
		return s.getInflight(m)
	case setInflightFD:
		return nil, fd, s.setInflight(m)
	}
	reply, err = s.handleRing(m)
	return reply, fd, err
}

// handleRing handles the messages about one ring.
func (s *session) handleRing(m *message) (reply []byte, err error) {
	index, num := uint64(m.u32(0)), m.u32(4)
	vector := m.request == setVringKick || m.request == setVringCall || m.request == setVringErr
	if vector {
		index = m.u64(0) & 0xff
	}
	if index >= uint64(len(s.rings)) {
		return nil, fmt.Errorf("ring %d of %d", index, len(s.rings))
	}
	r := &s.rings[index]
	if r.running != nil {
		switch m.request {
		case setVringNum, setVringAddr, setVringBase:
			return nil, fmt.Errorf("ring %d is running", index)
		}
	}
	switch m.request {
	case setVringNum:
		if !validQueueSize(num) {
			return nil, fmt.Errorf("ring size %d", num)
		}
		r.size = num
	case setVringAddr:
		r.descUA, r.usedUA, r.availUA = m.u64(8), m.u64(16), m.u64(24)
		r.addressed = true
	case setVringBase:
		if num > 0xffff {
			return nil, fmt.Errorf("ring base %#x", num)
		}
		r.base = uint16(num)
	case getVringBase:
		s.stop(r)
		r.started = false
		b := binary.LittleEndian.AppendUint32(nil, uint32(index))
		return binary.LittleEndian.AppendUint32(b, uint32(r.base)), nil
	case setVringEnable:
		r.enabled = num != 0
		return nil, s.update()
	case setVringKick:
		return nil, s.setKick(m, r)
	case setVringCall, setVringErr:
		sig := r.call
		if m.request == setVringErr {
			sig = r.err
		}
		fd := m.take()
		if fd >= 0 {
			if err := checkSignal(fd); err != nil {
				unix.Close(fd)
				return nil, err
			}
		}
		sig.replace(fd)
	}
	return nil, nil
}

// setKick starts a ring.
func (s *session) setKick(m *message, r *ring) error {
	fd := m.take()
	if fd < 0 {
		return errors.New("polling without a kick descriptor is not supported")
	}
	if err := checkSignal(fd); err != nil {
		unix.Close(fd)
		return err
	}
	kick := os.NewFile(uintptr(fd), "kick")
	if err := kick.SetReadDeadline(time.Time{}); err != nil {
		kick.Close()
		return fmt.Errorf("kick: %w", err)
	}
	s.stop(r)
	if r.kick != nil {
		r.kick.Close()
	}
	r.kick, r.started = kick, true
	return s.update()
}

// readRegion reads a region at byte off of the payload.
func readRegion(m *message, off int) (r region, offset uint64) {
	return region{gpa: m.u64(off), size: m.u64(off + 8), ua: m.u64(off + 16)}, m.u64(off + 24)
}

func (s *session) setMemTable(m *message) (err error) {
	n := m.u32(0)
	if n > maxRegions || len(m.payload) < 8+32*int(n) || len(m.fds) != int(n) {
		return fmt.Errorf("%d memory regions with %d file descriptors in %d bytes", n, len(m.fds), len(m.payload))
	}
	var list []region
	defer func() {
		if err != nil {
			newTable(list).release()
		}
	}()
	for i := range int(n) {
		r, offset := readRegion(m, 8+32*i)
		if err := checkRegion(list, r); err != nil {
			return err
		}
		if r.mem, err = newMapping(m.take(), offset, r.size); err != nil {
			return err
		}
		list = append(list, r)
	}
	s.quiesce()
	s.setTable(newTable(list))
	list = nil
	return s.update()
}

// keep returns the regions of the table with a reference each.
func (s *session) keep() []region {
	list := slices.Clone(s.table.regions)
	for _, r := range list {
		r.mem.refs.Add(1)
	}
	return list
}

// addMemReg adds a region. Rings go on: what they use stays where it is.
func (s *session) addMemReg(m *message) (err error) {
	r, offset := readRegion(m, 8)
	if len(s.table.regions) >= maxSlots {
		return fmt.Errorf("more than %d memory regions", maxSlots)
	}
	if err := checkRegion(s.table.regions, r); err != nil {
		return err
	}
	if r.mem, err = newMapping(m.take(), offset, r.size); err != nil {
		return err
	}
	s.setTable(newTable(append(s.keep(), r)))
	return nil
}

// remMemReg removes a region. A ring that was in it stops.
func (s *session) remMemReg(m *message) error {
	want, _ := readRegion(m, 8)
	i := slices.IndexFunc(s.table.regions, func(r region) bool {
		return r.gpa == want.gpa && r.ua == want.ua && r.size == want.size
	})
	if i < 0 {
		return fmt.Errorf("there is no memory region at %#x", want.gpa)
	}
	s.quiesce()
	list := s.keep()
	list[i].mem.release()
	s.setTable(newTable(slices.Delete(list, i, i+1)))
	return s.update()
}

func (s *session) getConfig(m *message) ([]byte, error) {
	off, size := m.u32(0), m.u32(4)
	if off > configSize || size > configSize-off || int(size) != len(m.payload)-12 {
		return nil, fmt.Errorf("config space: %d bytes at %d in a payload of %d", size, off, len(m.payload))
	}
	size64 := s.export.Device.Size()
	b := append(slices.Clone(m.payload[:12]), s.config()[off:off+size]...)
	if off == 0 && size >= 8 {
		s.export.announced.Store(size64)
	}
	return b, nil
}

// setConfig sets the write-back byte, the only one that may be written.
func (s *session) setConfig(m *message) error {
	off, size, flags := m.u32(0), m.u32(4), m.u32(8)
	if off != configWriteback || size != 1 || len(m.payload) != 13 || m.payload[12] > 1 || flags > 1 ||
		flags == 0 && s.features&featConfigWCE == 0 {
		return fmt.Errorf("config space: %d bytes at %d with flags %#x can't be written", size, off, flags)
	}
	back := m.payload[12] == 1
	if s.export.writeback.Swap(back) && !back && !s.export.ReadOnly {
		return s.export.Device.Flush()
	}
	return nil
}

func (s *session) setBackendFD(m *message) error {
	fd := m.take()
	if _, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
		unix.Close(fd)
		return fmt.Errorf("the back-end channel is not a socket: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return err
	}
	s.setBackend(os.NewFile(uintptr(fd), "back-end channel"))
	return nil
}

// getInflight answers with new memory for in-flight tracking.
func (s *session) getInflight(m *message) ([]byte, int, error) {
	queues, queueSize := binary.LittleEndian.Uint16(m.payload[16:]), binary.LittleEndian.Uint16(m.payload[18:])
	if queues == 0 || int(queues) > len(s.rings) || !validQueueSize(uint32(queueSize)) {
		return nil, -1, fmt.Errorf("in-flight area for %d rings of %d", queues, queueSize)
	}
	fd, size, err := newInflight(queues, queueSize)
	if err != nil {
		return nil, -1, err
	}
	b := slices.Clone(m.payload)
	binary.LittleEndian.PutUint64(b[0:], size)
	binary.LittleEndian.PutUint64(b[8:], 0)
	return b, fd, nil
}

func (s *session) setInflight(m *message) error {
	size, offset := m.u64(0), m.u64(8)
	queues, queueSize := binary.LittleEndian.Uint16(m.payload[16:]), binary.LittleEndian.Uint16(m.payload[18:])
	if queues == 0 || int(queues) > len(s.rings) || !validQueueSize(uint32(queueSize)) ||
		size < uint64(queues)*inflightStride(queueSize) || offset%8 != 0 {
		return fmt.Errorf("in-flight area of %d bytes for %d rings of %d", size, queues, queueSize)
	}
	mem, err := newMapping(m.take(), offset, size)
	if err != nil {
		return err
	}
	s.quiesce()
	if s.inflight != nil {
		s.inflight.release()
	}
	s.inflight, s.inflightQueueSize = mem, queueSize
	stride := inflightStride(queueSize)
	if err := guard(s.shared(), func() { s.unflushed.set(mem.bytes, uint64(queues)*stride, stride) }); err != nil {
		return err
	}
	if s.unflushed.lost {
		s.log("%v; flushes fail until the guest's driver starts anew", errLost)
	}
	return s.update()
}

// checkDevice refuses devices that have no whole number of sectors to serve.
func checkDevice(dev block.Device) error {
	if bs := int64(block.BlockSize(dev)); dev.Size()%bs != 0 {
		return fmt.Errorf("a size of %d bytes is not a multiple of the block size, %d", dev.Size(), bs)
	}
	return nil
}
