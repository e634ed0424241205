package e2e_test

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// An NBD client under the control of the test: it can send illegal or incomplete requests, pipeline them, and
// disconnect. It uses structured replies.

const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	flagFUA      = 1 << 0
	flagNoHole   = 1 << 1
	flagDF       = 1 << 2
	flagReqOne   = 1 << 3
	flagFastZero = 1 << 4

	nbdEPERM     = 1
	nbdEIO       = 5
	nbdEINVAL    = 22
	nbdENOSPC    = 28
	nbdENOTSUP   = 95
	nbdESHUTDOWN = 108
)

// answerTimeout is how long an answer may take before the server counts as hanging.
const answerTimeout = 40 * time.Second

// nbdError is an error that the server answered.
type nbdError uint32

func (e nbdError) Error() string { return fmt.Sprintf("NBD error %d", uint32(e)) }

// conn is a connection to an export. Only one goroutine may use it.
type conn struct {
	export   string
	net      net.Conn
	r        *bufio.Reader
	size     int64
	flags    uint16
	contexts map[uint32]string
	cookie   uint64
	pending  map[uint64]request
}

type request struct {
	cmd    uint16
	off, n int64
}

// extent is a descriptor of block status.
type extent struct {
	n     int64
	flags uint32
}

// answer is the reply to a request.
type answer struct {
	cookie  uint64
	err     error // an nbdError or nil
	data    []byte
	extents map[string][]extent
}

var allContexts = []string{"base:allocation", "dmsnap:changed"}

// dial connects to an export and asks for the given contexts of block status.
func dial(socket, export string, contexts []string) (c *conn, err error) {
	n, err := net.DialTimeout("unix", socket, 10*time.Second)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("export %q: %w", export, err), n.Close())
		}
	}()
	c = &conn{export: export, net: n, r: bufio.NewReaderSize(n, 64<<10), contexts: map[uint32]string{}, pending: map[uint64]request{}}
	n.SetDeadline(time.Now().Add(answerTimeout))
	var hello struct {
		Magic, Option uint64
		Flags         uint16
	}
	if err := binary.Read(c.r, binary.BigEndian, &hello); err != nil {
		return nil, err
	}
	if hello.Magic != 0x4e42444d41474943 || hello.Option != 0x49484156454f5054 || hello.Flags&3 != 3 {
		return nil, fmt.Errorf("greeting %x", hello)
	}
	if err := binary.Write(n, binary.BigEndian, uint32(3)); err != nil {
		return nil, err
	}
	if err := c.option(8, nil, nil); err != nil {
		return nil, fmt.Errorf("structured replies: %w", err)
	}
	if len(contexts) > 0 {
		data := append(word(len(export)), export...)
		data = append(data, word(len(contexts))...)
		for _, name := range contexts {
			data = append(append(data, word(len(name))...), name...)
		}
		err := c.option(10, data, func(kind uint32, data []byte) error {
			if kind != 4 || len(data) < 4 {
				return fmt.Errorf("reply %d of %d bytes", kind, len(data))
			}
			c.contexts[binary.BigEndian.Uint32(data)] = string(data[4:])
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("contexts: %w", err)
		}
	}
	err = c.option(7, append(append(word(len(export)), export...), 0, 0), func(kind uint32, data []byte) error {
		if kind == 3 && len(data) == 12 && binary.BigEndian.Uint16(data) == 0 {
			c.size, c.flags = int64(binary.BigEndian.Uint64(data[2:])), binary.BigEndian.Uint16(data[10:])
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("go: %w", err)
	}
	return c, nil
}

func word(n int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(n)) }

// option sends an option and hands its replies to each, up to the last one.
func (c *conn) option(number uint32, data []byte, each func(kind uint32, data []byte) error) error {
	b := binary.BigEndian.AppendUint64(nil, 0x49484156454f5054)
	b = append(append(binary.BigEndian.AppendUint32(b, number), word(len(data))...), data...)
	if _, err := c.net.Write(b); err != nil {
		return err
	}
	for {
		var h struct {
			Magic                uint64
			Option, Kind, Length uint32
		}
		if err := binary.Read(c.r, binary.BigEndian, &h); err != nil {
			return err
		}
		if h.Magic != 0x3e889045565a9 || h.Option != number || h.Length > 1<<20 {
			return fmt.Errorf("reply %x", h)
		}
		data := make([]byte, h.Length)
		if _, err := io.ReadFull(c.r, data); err != nil {
			return err
		}
		switch {
		case h.Kind == 1:
			return nil
		case h.Kind&0x80000000 != 0:
			return fmt.Errorf("refused with %#x %q", h.Kind, data)
		case each == nil:
			return fmt.Errorf("reply of kind %d", h.Kind)
		}
		if err := each(h.Kind, data); err != nil {
			return err
		}
	}
}

// encode makes the bytes of a request.
func encode(cmd, flags uint16, cookie uint64, off, n int64, data []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	return append(b, data...)
}

// send sends a request and does not wait for its answer.
func (c *conn) send(cmd, flags uint16, off, n int64, data []byte) (cookie uint64, err error) {
	c.cookie++
	c.pending[c.cookie] = request{cmd, off, n}
	c.net.SetWriteDeadline(time.Now().Add(answerTimeout))
	_, err = c.net.Write(encode(cmd, flags, c.cookie, off, n, data))
	return c.cookie, err
}

// receive returns the next answer, whichever request it is for. An error means that the connection is of no use any
// more, unless it is os.ErrDeadlineExceeded before anything came.
func (c *conn) receive(timeout time.Duration) (a answer, err error) {
	c.net.SetReadDeadline(time.Now().Add(timeout))
	if _, err := c.r.Peek(1); err != nil {
		return a, err
	}
	c.net.SetReadDeadline(time.Now().Add(answerTimeout))
	var q request
	var covered int64
	for {
		var magic uint32
		if err := binary.Read(c.r, binary.BigEndian, &magic); err != nil {
			return a, err
		}
		if magic == 0x67446698 { // a simple reply
			var h struct {
				Errno  uint32
				Cookie uint64
			}
			if err := binary.Read(c.r, binary.BigEndian, &h); err != nil {
				return a, err
			}
			var known bool
			if q, known = c.pending[h.Cookie]; !known || q.cmd == cmdRead && h.Errno == 0 {
				return a, fmt.Errorf("a simple reply for cookie %d, command %d", h.Cookie, q.cmd)
			}
			a.cookie = h.Cookie
			if h.Errno != 0 {
				a.err = nbdError(h.Errno)
			}
			break
		}
		if magic != 0x668e33ef {
			return a, fmt.Errorf("reply magic %#x", magic)
		}
		var h struct {
			Flags, Kind uint16
			Cookie      uint64
			Length      uint32
		}
		if err := binary.Read(c.r, binary.BigEndian, &h); err != nil {
			return a, err
		}
		var known bool
		if q, known = c.pending[h.Cookie]; !known || a.cookie != 0 && a.cookie != h.Cookie || h.Length > 33<<20 {
			return a, fmt.Errorf("a reply of %d bytes for cookie %d between those for %d", h.Length, h.Cookie, a.cookie)
		}
		a.cookie = h.Cookie
		p := make([]byte, h.Length)
		if _, err := io.ReadFull(c.r, p); err != nil {
			return a, err
		}
		n, err := a.add(c, q, h.Kind, p)
		if err != nil {
			return a, err
		}
		covered += n
		if h.Flags&1 != 0 {
			break
		}
	}
	delete(c.pending, a.cookie)
	if q.cmd == cmdRead && a.err == nil && covered != q.n {
		return a, fmt.Errorf("a read of %d bytes was answered with %d", q.n, covered)
	}
	return a, nil
}

// add takes one chunk of a structured reply. It returns how many bytes of a read it covers.
func (a *answer) add(c *conn, q request, kind uint16, p []byte) (covered int64, err error) {
	switch {
	case kind == 0: // none
	case kind == 1 && q.cmd == cmdRead && len(p) > 8:
		if a.data == nil {
			a.data = make([]byte, q.n)
		}
		off := int64(binary.BigEndian.Uint64(p)) - q.off
		if p = p[8:]; off < 0 || off+int64(len(p)) > q.n {
			return 0, errors.New("data outside what was asked for")
		}
		return int64(copy(a.data[off:], p)), nil
	case kind == 2 && q.cmd == cmdRead && len(p) == 12:
		if a.data == nil {
			a.data = make([]byte, q.n)
		}
		off, n := int64(binary.BigEndian.Uint64(p))-q.off, int64(binary.BigEndian.Uint32(p[8:]))
		if off < 0 || off+n > q.n {
			return 0, errors.New("a hole outside what was asked for")
		}
		return n, nil
	case kind == 5 && q.cmd == cmdBlockStatus && len(p) >= 12 && len(p)%8 == 4:
		name, known := c.contexts[binary.BigEndian.Uint32(p)]
		if !known {
			return 0, errors.New("a context that was not asked for")
		}
		if a.extents == nil {
			a.extents = map[string][]extent{}
		}
		for p = p[4:]; len(p) > 0; p = p[8:] {
			a.extents[name] = append(a.extents[name], extent{int64(binary.BigEndian.Uint32(p)), binary.BigEndian.Uint32(p[4:])})
		}
	case kind&0x8000 != 0 && len(p) >= 4:
		a.err = nbdError(binary.BigEndian.Uint32(p))
	default:
		return 0, fmt.Errorf("a chunk of kind %d and %d bytes for command %d", kind, len(p), q.cmd)
	}
	return 0, nil
}

// call sends a request and waits for its answer, which must be the next one.
func (c *conn) call(cmd, flags uint16, off, n int64, data []byte) (answer, error) {
	cookie, err := c.send(cmd, flags, off, n, data)
	if err != nil {
		return answer{}, err
	}
	a, err := c.receive(answerTimeout)
	if err == nil && a.cookie != cookie {
		err = fmt.Errorf("an answer to request %d instead of %d", a.cookie, cookie)
	}
	if err != nil {
		return a, fmt.Errorf("export %q, command %d at %d+%d: %w", c.export, cmd, off, n, err)
	}
	return a, a.err
}

func (c *conn) read(off, n int64) ([]byte, error) {
	a, err := c.call(cmdRead, 0, off, n, nil)
	return a.data, err
}

func (c *conn) write(off int64, p []byte, flags uint16) error {
	_, err := c.call(cmdWrite, flags, off, int64(len(p)), p)
	return err
}

func (c *conn) flush() error {
	_, err := c.call(cmdFlush, 0, 0, 0, nil)
	return err
}

// kill closes the connection without NBD_CMD_DISC.
func (c *conn) kill() { c.net.Close() }
