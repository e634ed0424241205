package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// receiveSize is how much is received at once, in bytes.
const receiveSize = 1 << 20

// NBD executes a job on an export of the server that listens on a unix socket.
func NBD(ctx context.Context, socket, export string, j Job) (Result, error) {
	if err := j.check(); err != nil {
		return Result{}, err
	}
	c, err := net.Dial("unix", socket)
	if err != nil {
		return Result{}, err
	}
	defer c.Close()
	size, err := handshake(c, export)
	if err != nil {
		return Result{}, fmt.Errorf("load: handshake with %s: %w", socket, err)
	}
	if j.Size > size {
		return Result{}, fmt.Errorf("load: the export has %d bytes", size)
	}
	// A descriptor that blocks: the runtime's poller would cost more than the requests do.
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		return Result{}, err
	}
	defer f.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	n := &nbdClient{fd: int(f.Fd()), payload: make([]byte, j.Block), in: make([]byte, receiveSize)}
	fill(n.payload)
	return n.run(begin(ctx, j))
}

// fill makes data that is nowhere zero.
func fill(b []byte) {
	for i := range b {
		b[i] = byte(i%251) + 1
	}
}

// handshake chooses an export and returns its size in bytes. No option is negotiated: replies are simple.
func handshake(c io.ReadWriter, export string) (int64, error) {
	var b [64]byte
	if _, err := io.ReadFull(c, b[:18]); err != nil {
		return 0, err
	}
	if binary.BigEndian.Uint64(b[:]) != wire.MagicServer || binary.BigEndian.Uint64(b[8:]) != wire.MagicOption {
		return 0, errors.New("not a server of the newstyle protocol")
	}
	data := wire.InfoRequest{Name: export}.Append(nil)
	out := binary.BigEndian.AppendUint32(nil, uint32(binary.BigEndian.Uint16(b[16:])&(wire.FlagFixedNewstyle|wire.FlagNoZeroes)))
	out = wire.OptionHeader{Magic: wire.MagicOption, Option: wire.OptGo, Length: uint32(len(data))}.Append(out)
	if _, err := c.Write(append(out, data...)); err != nil {
		return 0, err
	}
	size := int64(-1)
	for {
		if _, err := io.ReadFull(c, b[:wire.OptionReplySize]); err != nil {
			return 0, err
		}
		r := wire.DecodeOptionReply(b[:])
		if r.Magic != wire.MagicOptionReply || r.Length > 4096 {
			return 0, errors.New("not a reply to an option")
		}
		data := make([]byte, r.Length)
		if _, err := io.ReadFull(c, data); err != nil {
			return 0, err
		}
		switch {
		case r.Type == wire.RepAck && size >= 0:
			return size, nil
		case r.Type != wire.RepInfo:
			return 0, fmt.Errorf("reply 0x%x: %q", uint32(r.Type), data)
		case len(data) >= 2 && wire.InfoType(binary.BigEndian.Uint16(data)) == wire.InfoExport:
			info, err := wire.DecodeExportInfo(data)
			if err != nil {
				return 0, err
			}
			size = int64(info.Size)
		}
	}
}

// nbdClient is a connection in its transmission.
type nbdClient struct {
	fd      int
	payload []byte
	heads   []byte // of requests that are to be sent
	out     [][]byte
	in      []byte

	part []byte // of a reply's head that was received in part
	skip int    // bytes of data that are still to be received
}

func (n *nbdClient) run(s *schedule) (Result, error) {
	inFlight, flushing := 0, false
	n.heads = make([]byte, 0, (s.job.Depth+1)*wire.RequestSize)
	for {
		n.heads, n.out = n.heads[:0], n.out[:0]
		s.round()
		for !flushing && inFlight < s.job.Depth {
			off, ok := s.next()
			if !ok {
				break
			}
			n.request(s.job, off)
			inFlight++
		}
		if flushing {
			n.add(wire.Request{Magic: wire.MagicRequest, Command: wire.CmdFlush})
			inFlight++
		}
		if inFlight == 0 {
			n.add(wire.Request{Magic: wire.MagicRequest, Command: wire.CmdDisconnect})
			return resultAfter(s, n.send())
		}
		if err := n.send(); err != nil {
			return Result{}, err
		}
		data := s.job.Block
		if s.job.Write || flushing {
			data = 0
		}
		done, err := n.receive(data)
		if err != nil {
			return Result{}, err
		}
		inFlight -= done
		flushing = s.job.Flush && done > 0 && !flushing
	}
}

func resultAfter(s *schedule, err error) (Result, error) {
	if err != nil {
		return Result{}, err
	}
	return s.result()
}

// request adds a request of the job.
func (n *nbdClient) request(j Job, off int64) {
	r := wire.Request{Magic: wire.MagicRequest, Command: wire.CmdRead, Cookie: uint64(off), Offset: uint64(off), Length: uint32(j.Block)}
	if j.Write {
		r.Command = wire.CmdWrite
	}
	n.add(r)
	if j.Write {
		n.out = append(n.out, n.payload)
	}
}

// add adds the head of a request. The heads have room for all that can be in flight, so they do not move.
func (n *nbdClient) add(r wire.Request) {
	at := len(n.heads)
	n.heads = r.Append(n.heads)
	if k := len(n.out); r.Command == wire.CmdRead && k > 0 { // heads beside each other are one vector
		n.out[k-1] = n.heads[at-len(n.out[k-1]):]
		return
	}
	n.out = append(n.out, n.heads[at:])
}

// send sends everything that was added.
func (n *nbdClient) send() error {
	v := n.out
	for len(v) > 0 {
		k, err := unix.Writev(n.fd, v[:min(len(v), 1024)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("load: send: %w", err)
		}
		for len(v) > 0 && k >= len(v[0]) {
			k -= len(v[0])
			v = v[1:]
		}
		if k > 0 {
			v[0] = v[0][k:]
		}
	}
	return nil
}

// receive waits for data, once, and returns how many replies are complete with it. Each is followed by data bytes.
func (n *nbdClient) receive(data int) (done int, err error) {
	k, err := unix.Read(n.fd, n.in)
	if err == unix.EINTR {
		return 0, nil
	}
	if err == nil && k == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return 0, fmt.Errorf("load: receive: %w", err)
	}
	for b := n.in[:k]; len(b) > 0; {
		if n.skip > 0 {
			drop := min(n.skip, len(b))
			b = b[drop:]
			if n.skip -= drop; n.skip == 0 {
				done++
			}
			continue
		}
		head := b[:min(len(b), wire.SimpleSize-len(n.part))]
		b = b[len(head):]
		if len(n.part) > 0 || len(head) < wire.SimpleSize {
			n.part = append(n.part, head...)
			head = n.part
		}
		if len(head) < wire.SimpleSize {
			break
		}
		if r := wire.DecodeSimple(head); r.Magic != wire.MagicSimple || r.Error != 0 {
			return 0, fmt.Errorf("load: reply with magic 0x%x and error %d", r.Magic, r.Error)
		}
		n.part = n.part[:0]
		if n.skip = data; data == 0 {
			done++
		}
	}
	return done, nil
}
