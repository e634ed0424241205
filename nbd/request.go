package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"math"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// validate is where it is decided whether a client may ask this. 0: it may. Everything behind it can
// rely on a range inside the device and flags that mean something.
//
// FUA is allowed with every command, as the protocol has it, and means nothing to those that change
// nothing.
func (c *conn) validate(r wire.Request) (wire.Errno, string) {
	e := c.export
	known, changes := wire.FlagFUA, false
	switch r.Command {
	case wire.CmdRead:
		if c.structured {
			known |= wire.FlagDF
		}
	case wire.CmdWrite:
		changes = true
	case wire.CmdWriteZeroes:
		known |= wire.FlagNoHole | wire.FlagFastZero
		changes = true
	case wire.CmdTrim:
		changes = true
	case wire.CmdBlockStatus:
		known |= wire.FlagReqOne
	case wire.CmdFlush, wire.CmdCache:
	default:
		return wire.EINVAL, fmt.Sprintf("unknown command %d", r.Command)
	}
	if r.Flags&^known != 0 {
		return wire.EINVAL, fmt.Sprintf("flags 0x%x don't go with command %d", r.Flags&^known, r.Command)
	}
	if changes && e.ReadOnly {
		return wire.EPERM, "export is read-only"
	}
	if r.Command == wire.CmdTrim && !e.CanTrim {
		return wire.EINVAL, "export has no trim"
	}
	if r.Command == wire.CmdFlush {
		if r.Offset != 0 || r.Length != 0 {
			return wire.EINVAL, "flush has no range"
		}
		return 0, ""
	}
	if r.Command == wire.CmdBlockStatus && len(c.contexts) == 0 {
		return wire.EINVAL, "no meta context was negotiated"
	}
	if (r.Command == wire.CmdRead || r.Command == wire.CmdWrite) && r.Length > wire.MaxPayload {
		return wire.EOVERFLOW, fmt.Sprintf("%d bytes are more than %d", r.Length, wire.MaxPayload)
	}
	if r.Length == 0 {
		return wire.EINVAL, "range is empty"
	}
	if size := uint64(e.Device.Size()); r.Offset > size || uint64(r.Length) > size-r.Offset {
		if r.Command == wire.CmdWrite || r.Command == wire.CmdWriteZeroes {
			return wire.ENOSPC, "range ends behind the export's end"
		}
		return wire.EINVAL, "range ends behind the export's end"
	}
	return 0, ""
}

// carryOut does what a request asks for and sends the reply. It takes p over.
func (c *conn) carryOut(r wire.Request, p *buffer) {
	held := int64(0)
	if r.Command == wire.CmdRead {
		held = min(int64(r.Length), wire.MaxPayload)
	}
	if p != nil {
		held = int64(len(p.b))
	}
	e := c.export
	entered := e.requests.enter()
	// The request counts as under way until its reply has left, so that Remove leaves nobody waiting.
	done := func(b *buffer) func() {
		return func() {
			b.free()
			if held > 0 {
				c.letGo(held)
			}
			if entered {
				e.requests.leave()
			}
		}
	}
	if !entered {
		c.fail(r, wire.ESHUTDOWN, "export is going away", done(p))
		return
	}
	if errno, why := c.validate(r); errno != 0 {
		e.errors.Add(1)
		c.fail(r, errno, why, done(p))
		return
	}
	if r.Command == wire.CmdRead {
		p = getBuffer(r.Length)
	}
	rep, err := c.execute(r, p)
	if err != nil {
		e.errors.Add(1)
		c.fail(r, errnoOf(err), err.Error(), done(p))
		return
	}
	rep.done = done(p)
	c.out.send(rep)
}

// execute carries out a valid request: a case for every command.
func (c *conn) execute(r wire.Request, p *buffer) (reply, error) {
	e, dev := c.export, c.export.Device
	off, n := int64(r.Offset), int64(r.Length)
	fua := r.Flags&wire.FlagFUA != 0
	switch r.Command {
	case wire.CmdRead:
		e.reads.Add(1)
		e.readBytes.Add(n)
		return c.readData(r, p.b)
	case wire.CmdWrite:
		e.writes.Add(1)
		e.writtenBytes.Add(n)
		if fua {
			return c.simple(r), block.WriteDurable(dev, p.b, off)
		}
		_, err := dev.WriteAt(p.b, off)
		return c.simple(r), err
	case wire.CmdWriteZeroes:
		e.writes.Add(1)
		e.writtenBytes.Add(n)
		var flags block.ZeroFlags
		if r.Flags&wire.FlagNoHole != 0 {
			flags |= block.KeepAllocated
		}
		if r.Flags&wire.FlagFastZero != 0 {
			flags |= block.OnlyFast
		}
		return c.simple(r), thenFlush(dev, fua, block.Zero(dev, off, n, flags))
	case wire.CmdTrim:
		e.writes.Add(1)
		return c.simple(r), thenFlush(dev, fua, block.Discard(dev, off, n))
	case wire.CmdFlush:
		e.flushes.Add(1)
		return c.simple(r), dev.Flush()
	case wire.CmdCache:
		return c.simple(r), nil
	case wire.CmdBlockStatus:
		return c.blockStatus(r)
	}
	panic("nbd: a command that was validated has no case")
}

// thenFlush is FUA for changes that no device makes durably by themselves.
func thenFlush(dev block.Device, fua bool, err error) error {
	if err != nil || !fua {
		return err
	}
	return dev.Flush()
}

// simple is the reply to a command that succeeded and has no data.
func (c *conn) simple(r wire.Request) reply {
	return reply{head: wire.Simple{Magic: wire.MagicSimple, Cookie: r.Cookie}.Append(make([]byte, 0, wire.SimpleSize))}
}

// fail sends an error: a chunk with a message where the protocol asks for one, else a simple reply.
func (c *conn) fail(r wire.Request, errno wire.Errno, why string, done func()) {
	var head []byte
	if c.structured && (r.Command == wire.CmdRead || r.Command == wire.CmdBlockStatus) {
		if len(why) > wire.MaxName {
			why = why[:wire.MaxName]
		}
		body := wire.AppendError(nil, errno, why)
		head = append(chunk(nil, r, wire.ChunkDone, wire.ChunkError, len(body)), body...)
	} else {
		head = wire.Simple{Magic: wire.MagicSimple, Error: errno, Cookie: r.Cookie}.Append(nil)
	}
	c.out.send(reply{head: head, done: done})
}

func chunk(b []byte, r wire.Request, flags uint16, t wire.ChunkType, n int) []byte {
	return wire.Chunk{Magic: wire.MagicChunk, Flags: flags, Type: t, Cookie: r.Cookie, Length: uint32(n)}.Append(b)
}

// holesFrom is the length in bytes from which on a READ asks the device for its holes before it reads
// data. A shorter one is read, and looked at for zeros: that costs less than asking.
const holesFrom = 128 << 10

// readData answers a READ into b. In a structured reply, without DF, zeros are sent as holes.
func (c *conn) readData(r wire.Request, b []byte) (reply, error) {
	dev, off := c.export.Device, int64(r.Offset)
	if c.structured && r.Flags&wire.FlagDF == 0 && len(b) >= holesFrom {
		return c.readSparse(r, b)
	}
	if _, err := dev.ReadAt(b, off); err != nil {
		return reply{}, err
	}
	if !c.structured {
		return reply{head: c.simple(r).head, data: b}, nil
	}
	head := make([]byte, 0, wire.ChunkSize+12)
	if r.Flags&wire.FlagDF == 0 && isZero(b) {
		head = chunk(head, r, wire.ChunkDone, wire.ChunkOffsetHole, 12)
		return reply{head: wire.AppendHole(head, r.Offset, r.Length)}, nil
	}
	head = chunk(head, r, wire.ChunkDone, wire.ChunkOffsetData, 8+len(b))
	return reply{head: wire.AppendOffset(head, r.Offset), data: b}, nil
}

func isZero(b []byte) bool {
	return b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}

// minHole is the shortest hole that is worth a chunk of its own, in bytes.
const minHole = 4 << 10

// readSparse answers a long READ: holes as the device knows them, data around them.
func (c *conn) readSparse(r wire.Request, b []byte) (reply, error) {
	holes, err := c.holes(r)
	if err != nil {
		return reply{}, err
	}
	if len(holes) == 0 {
		r.Flags |= wire.FlagDF // nothing to leave out: one chunk
		return c.readData(r, b)
	}
	var parts [][]byte
	at := r.Offset
	data := func(to uint64) error {
		if at == to {
			return nil
		}
		p := b[at-r.Offset : to-r.Offset]
		parts = append(parts, wire.AppendOffset(chunk(nil, r, 0, wire.ChunkOffsetData, 8+len(p)), at), p)
		_, err := c.export.Device.ReadAt(p, int64(at))
		return err
	}
	for _, h := range holes {
		if err := data(h.off); err != nil {
			return reply{}, err
		}
		parts = append(parts, wire.AppendHole(chunk(nil, r, 0, wire.ChunkOffsetHole, 12), h.off, h.n))
		at = h.off + uint64(h.n)
	}
	if err := data(r.Offset + uint64(r.Length)); err != nil {
		return reply{}, err
	}
	return reply{more: append(parts, chunk(nil, r, wire.ChunkDone, wire.ChunkNone, 0))}, nil
}

type hole struct {
	off uint64
	n   uint32
}

// holes lists the stretches of a READ that read as zeros. A device that can't tell is all data.
func (c *conn) holes(r wire.Request) ([]hole, error) {
	var holes []hole
	end := r.Offset + uint64(r.Length)
	for at := r.Offset; at < end; {
		extents, err := block.Extents(c.export.Device, int64(at), int64(end-at))
		if err != nil {
			return nil, err
		}
		for _, x := range extents {
			n := uint32(x.Length)
			if x.Flags&block.ReadsZero != 0 {
				if k := len(holes) - 1; k >= 0 && holes[k].off+uint64(holes[k].n) == at {
					holes[k].n += n
				} else {
					holes = append(holes, hole{at, n})
				}
			}
			at += uint64(n)
		}
	}
	kept := holes[:0]
	for _, h := range holes {
		if h.n >= minHole {
			kept = append(kept, h)
		}
	}
	return kept, nil
}

// maxDescriptors bounds the block status of one context in one reply.
const maxDescriptors = 16 << 10

// blockStatus answers BLOCK_STATUS: a chunk for each context, which may cover less than was asked for.
func (c *conn) blockStatus(r wire.Request) (reply, error) {
	var out []byte
	for i, x := range c.contexts {
		ds, err := describe(c.export.context(x.name), r)
		if err != nil {
			return reply{}, fmt.Errorf("%s: %w", x.name, err)
		}
		flags := uint16(0)
		if i == len(c.contexts)-1 {
			flags = wire.ChunkDone
		}
		out = chunk(out, r, flags, wire.ChunkBlockStatus, 4+8*len(ds))
		out = wire.AppendBlockStatus(out, x.id, ds)
	}
	return reply{head: out}, nil
}

// describe gathers the descriptors of one context: neighbours with the same flags are one, none reaches
// behind the range, and with REQ_ONE there is one.
func describe(of ContextFunc, r wire.Request) ([]wire.Descriptor, error) {
	var ds []wire.Descriptor
	off, left := int64(r.Offset), int64(r.Length)
	for left > 0 && len(ds) < maxDescriptors {
		extents, err := of(off, left)
		if err != nil {
			return nil, err
		}
		if len(extents) == 0 {
			return nil, errors.New("no extent")
		}
		for _, x := range extents {
			n := uint32(min(x.Length, left, math.MaxUint32))
			if k := len(ds) - 1; k >= 0 && ds[k].Flags == uint32(x.Flags) {
				ds[k].Length += n
			} else if k >= 0 && r.Flags&wire.FlagReqOne != 0 {
				return ds, nil
			} else {
				ds = append(ds, wire.Descriptor{Length: n, Flags: uint32(x.Flags)})
			}
			off, left = off+int64(n), left-int64(n)
			if left == 0 {
				break
			}
		}
	}
	return ds, nil
}
