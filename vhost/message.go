package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// Requests of the front-end (docs/spec/vhost-user-blk.md §2).
const (
	getFeatures         = 1
	setFeatures         = 2
	setOwner            = 3
	resetOwner          = 4
	setMemTable         = 5
	setVringNum         = 8
	setVringAddr        = 9
	setVringBase        = 10
	getVringBase        = 11
	setVringKick        = 12
	setVringCall        = 13
	setVringErr         = 14
	getProtocolFeatures = 15
	setProtocolFeatures = 16
	getQueueNum         = 17
	setVringEnable      = 18
	setBackendReqFD     = 21
	getConfig           = 24
	setConfig           = 25
	getInflightFD       = 31
	setInflightFD       = 32
	getMaxMemSlots      = 36
	addMemReg           = 37
	remMemReg           = 38
)

// configChange is the back-end's own request that announces a changed config space.
const configChange = 2

// Header flags.
const (
	versionMask = 3
	version     = 1
	flagReply   = 4
	flagAck     = 8 // the sender asks for an acknowledgement
)

const (
	headerSize = 12
	maxPayload = 4096 // bytes; no message that is offered is longer
	maxFDs     = 8    // descriptors of one message: those of eight memory regions
)

// A message is one request with its descriptors.
type message struct {
	request, flags uint32
	payload        []byte
	fds            []int // owned; the handler takes out what it keeps
}

// take returns the first descriptor, which the caller owns from now on, or -1.
func (m *message) take() int {
	if len(m.fds) == 0 {
		return -1
	}
	fd := m.fds[0]
	m.fds = m.fds[1:]
	return fd
}

// close closes the descriptors that no message took.
func (m *message) close() {
	for _, fd := range m.fds {
		unix.Close(fd)
	}
	m.fds = nil
}

func (m *message) u32(off int) uint32 { return binary.LittleEndian.Uint32(m.payload[off:]) }
func (m *message) u64(off int) uint64 { return binary.LittleEndian.Uint64(m.payload[off:]) }

// readMessage reads one message. Descriptors are accepted with any byte of the header (§1). At the end of the stream
// between two messages the error is io.EOF.
func readMessage(c *net.UnixConn) (m *message, err error) {
	m = &message{}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	var head [headerSize]byte
	for got := 0; got < headerSize; {
		var oob [256]byte // more than maxFDs take; unix.CmsgSpace is no constant
		room := unix.CmsgSpace(4 * maxFDs)
		n, oobn, flags, _, err := c.ReadMsgUnix(head[got:], oob[:room])
		fds, ferr := descriptors(oob[:oobn])
		m.fds = append(m.fds, fds...)
		switch {
		case err != nil && !errors.Is(err, io.EOF):
			return m, err
		case n == 0 && got == 0:
			return m, io.EOF
		case n <= 0:
			return m, io.ErrUnexpectedEOF
		case ferr != nil:
			return m, ferr
		case flags&unix.MSG_CTRUNC != 0 || len(m.fds) > maxFDs:
			return m, fmt.Errorf("a message has more than %d file descriptors", maxFDs)
		}
		got += n
	}
	m.request = binary.LittleEndian.Uint32(head[0:])
	m.flags = binary.LittleEndian.Uint32(head[4:])
	size := binary.LittleEndian.Uint32(head[8:])
	switch {
	case m.flags&versionMask != version:
		return m, fmt.Errorf("request %d: protocol version %d is not supported", m.request, m.flags&versionMask)
	case m.flags&flagReply != 0:
		return m, fmt.Errorf("request %d has the reply flag", m.request)
	case size > maxPayload:
		return m, fmt.Errorf("request %d: payload of %d bytes, maximum is %d", m.request, size, maxPayload)
	}
	m.payload = make([]byte, size)
	if _, err := io.ReadFull(c, m.payload); err != nil {
		return m, io.ErrUnexpectedEOF
	}
	return m, nil
}

// descriptors returns the file descriptors of a control message.
func descriptors(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	list, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for i := range list {
		if got, err := unix.ParseUnixRights(&list[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds, nil
}

// appendHeader appends a header.
func appendHeader(b []byte, request, flags uint32, size int) []byte {
	b = binary.LittleEndian.AppendUint32(b, request)
	b = binary.LittleEndian.AppendUint32(b, flags)
	return binary.LittleEndian.AppendUint32(b, uint32(size))
}

// writeReply answers a request, with a descriptor unless fd is -1, which stays the caller's.
func writeReply(c *net.UnixConn, request uint32, payload []byte, fd int) error {
	b := append(appendHeader(nil, request, version|flagReply, len(payload)), payload...)
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	n, _, err := c.WriteMsgUnix(b, oob, nil)
	if err == nil && n < len(b) {
		_, err = c.Write(b[n:])
	}
	return err
}

// u64Payload is a payload of one number.
func u64Payload(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }
