package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// The floor is the least that a server over NBD can do on a raw image: one recvmsg for all requests that are there, a pread or pwrite
// for each, one sendmsg for all replies. It validates nothing, keeps no limit and ends with its client: it is there to
// be measured.

// serveFloor listens on a unix socket until ctx ends.
func serveFloor(ctx context.Context, socket, image string) error {
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	ln, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	for {
		c, err := ln.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if err := floorConn(c.(*net.UnixConn), int(f.Fd()), info.Size()); err != nil && !errors.Is(err, io.EOF) {
				fmt.Fprintln(os.Stderr, "floor:", err)
			}
		}()
	}
}

// floorConn serves a connection.
func floorConn(c *net.UnixConn, disk int, size int64) error {
	if err := floorHandshake(c, size); err != nil {
		return err
	}
	socket, err := c.File() // blocks, past the runtime's poller
	if err != nil {
		return err
	}
	defer socket.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	t := floorTransmission{socket: int(socket.Fd()), disk: disk, in: make([]byte, floorBuffer)}
	for {
		if err := t.round(); err != nil {
			return err
		}
	}
}

// floorHandshake answers options: GO and EXPORT_NAME begin the transmission, others are unsupported.
func floorHandshake(c io.ReadWriter, size int64) error {
	out := binary.BigEndian.AppendUint64(nil, wire.MagicServer)
	out = binary.BigEndian.AppendUint64(out, wire.MagicOption)
	out = binary.BigEndian.AppendUint16(out, wire.FlagFixedNewstyle|wire.FlagNoZeroes)
	if _, err := c.Write(out); err != nil {
		return err
	}
	b := make([]byte, 8192)
	if _, err := io.ReadFull(c, b[:4]); err != nil {
		return err
	}
	info := wire.ExportInfo{Size: uint64(size), Flags: wire.HasFlags | wire.SendFlush | wire.CanMultiConn}.Append(nil)
	for {
		if _, err := io.ReadFull(c, b[:wire.OptionHeaderSize]); err != nil {
			return err
		}
		o := wire.DecodeOptionHeader(b)
		if o.Length > uint32(len(b)) {
			return errors.New("long option")
		}
		if _, err := io.ReadFull(c, b[:o.Length]); err != nil {
			return err
		}
		reply := func(kind wire.OptionReplyType, data []byte) []byte {
			r := wire.OptionReply{Magic: wire.MagicOptionReply, Option: o.Option, Type: kind, Length: uint32(len(data))}
			return append(r.Append(nil), data...)
		}
		switch o.Option {
		case wire.OptGo:
			_, err := c.Write(append(reply(wire.RepInfo, info), reply(wire.RepAck, nil)...))
			return err
		case wire.OptExportName:
			_, err := c.Write(info[2:])
			return err
		}
		if _, err := c.Write(reply(wire.RepErrUnsup, nil)); err != nil {
			return err
		}
	}
}

// floorBuffer is how much is received, and sent, at once, in bytes, unless a request is longer.
const floorBuffer = 256 << 10

type floorTransmission struct {
	socket, disk int
	in           []byte
	have         int // bytes of in
	out          []byte
}

// round receives requests and answers those that are complete.
func (t *floorTransmission) round() error {
	n, err := unix.Read(t.socket, t.in[t.have:])
	switch {
	case err == unix.EINTR:
		return nil
	case err != nil:
		return err
	case n == 0:
		return io.EOF
	}
	t.have += n
	b := t.in[:t.have]
	t.out = t.out[:0]
	for len(b) >= wire.RequestSize {
		r := wire.DecodeRequest(b)
		need := wire.RequestSize
		if r.Command == wire.CmdWrite {
			need += int(r.Length)
		}
		if need > len(b) {
			if need > len(t.in) {
				t.in = append(make([]byte, 0, 2*need), b...)
				t.have, b = len(b), t.in[:len(b)]
				t.in = t.in[:cap(t.in)]
			}
			break
		}
		if err := t.execute(r, b[wire.RequestSize:need]); err != nil {
			return err
		}
		b = b[need:]
	}
	t.have = copy(t.in, b)
	return t.send()
}

// execute executes a request and adds its reply.
func (t *floorTransmission) execute(r wire.Request, payload []byte) error {
	data := 0
	if r.Command == wire.CmdRead {
		data = int(r.Length)
	}
	if len(t.out) > 0 && len(t.out)+wire.SimpleSize+data > max(floorBuffer, cap(t.out)) {
		if err := t.send(); err != nil {
			return err
		}
	}
	t.out = wire.Simple{Magic: wire.MagicSimple, Cookie: r.Cookie}.Append(t.out)
	switch r.Command {
	case wire.CmdRead:
		at := len(t.out)
		if cap(t.out) < at+data {
			t.out = append(make([]byte, 0, max(floorBuffer, at+data)), t.out...)
		}
		t.out = t.out[:at+data]
		return whole(data)(unix.Pread(t.disk, t.out[at:], int64(r.Offset)))
	case wire.CmdWrite:
		return whole(len(payload))(unix.Pwrite(t.disk, payload, int64(r.Offset)))
	case wire.CmdFlush:
		return unix.Fdatasync(t.disk)
	}
	return io.EOF
}

func whole(want int) func(n int, err error) error {
	return func(n int, err error) error {
		if err == nil && n != want {
			err = io.ErrShortWrite
		}
		return err
	}
}

// send sends all replies.
func (t *floorTransmission) send() error {
	for b := t.out; len(b) > 0; {
		n, err := unix.Write(t.socket, b)
		if err != nil && err != unix.EINTR {
			return err
		}
		b = b[max(n, 0):]
	}
	t.out = t.out[:0]
	return nil
}
