package nbd

import (
	"bytes"
	"fmt"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// carryOut does what the request asks for and sends the reply. The task ends with it.
func (t *task) carryOut() {
	e := t.conn.export
	if t.errno == 0 {
		if err := t.execute(); err != nil {
			t.errno = errnoOf(err)
			e.failed(t.conn.server, t.Request, err)
		}
	}
	if t.errno != 0 {
		e.errors.Add(1)
		t.fail()
	}
	t.conn.out.send(t)
}

// execute carries out a valid request: a case for every command.
func (t *task) execute() error {
	e, dev := t.conn.export, t.conn.export.Device
	off, n := int64(t.Offset), int64(t.Length)
	fua := t.Flags&wire.FlagFUA != 0
	t.succeed()
	switch t.Command {
	case wire.CmdRead:
		e.reads.Add(1)
		e.readBytes.Add(n)
		return t.read()
	case wire.CmdWrite:
		e.writes.Add(1)
		e.writtenBytes.Add(n)
		if fua {
			return block.WriteDurable(dev, t.payload.b, off)
		}
		_, err := dev.WriteAt(t.payload.b, off)
		return err
	case wire.CmdWriteZeroes:
		e.writes.Add(1)
		e.writtenBytes.Add(n)
		var flags block.ZeroFlags
		if t.Flags&wire.FlagNoHole != 0 {
			flags |= block.KeepAllocated
		}
		if t.Flags&wire.FlagFastZero != 0 {
			flags |= block.OnlyFast
		}
		return thenFlush(dev, fua, block.Zero(dev, off, n, flags))
	case wire.CmdTrim:
		e.writes.Add(1)
		return thenFlush(dev, fua, block.Discard(dev, off, n))
	case wire.CmdFlush:
		e.flushes.Add(1)
		return dev.Flush()
	case wire.CmdCache:
		return nil
	case wire.CmdBlockStatus:
		return t.blockStatus()
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

// succeed makes the reply to a command that succeeded and has no data.
func (t *task) succeed() {
	t.reply = reply{head: wire.Simple{Magic: wire.MagicSimple, Cookie: t.Cookie}.Append(t.room[:0])}
}

// fail makes the reply an error: a chunk with a message where the protocol asks for one, else a simple
// reply.
func (t *task) fail() {
	if t.conn.structured && (t.Command == wire.CmdRead || t.Command == wire.CmdBlockStatus) {
		body := wire.AppendError(nil, t.errno, t.why)
		t.reply = reply{head: append(t.chunk(nil, wire.ChunkDone, wire.ChunkError, len(body)), body...)}
		return
	}
	t.reply = reply{head: wire.Simple{Magic: wire.MagicSimple, Error: t.errno, Cookie: t.Cookie}.Append(t.room[:0])}
}

// chunk adds the header of a chunk to b.
func (t *task) chunk(b []byte, flags uint16, kind wire.ChunkType, n int) []byte {
	return wire.Chunk{Magic: wire.MagicChunk, Flags: flags, Type: kind, Cookie: t.Cookie, Length: uint32(n)}.Append(b)
}

const (
	// holesFrom is the length in bytes from which on a READ asks the device for its holes before it
	// reads data. A shorter one is read, and looked at for zeros: that costs less than asking.
	holesFrom = 128 << 10
	// minHole is the shortest hole that is worth a chunk of its own, in bytes.
	minHole = 4 << 10
)

// read answers a READ. In a structured reply, without DF, zeros are sent as holes.
func (t *task) read() error {
	b, dev, whole := t.payload.b, t.conn.export.Device, t.Flags&wire.FlagDF != 0
	if t.conn.structured && !whole && len(b) >= holesFrom {
		holes, err := t.holes()
		if err != nil {
			return err
		}
		if len(holes) > 0 {
			return t.readAround(holes)
		}
	}
	if _, err := dev.ReadAt(b, int64(t.Offset)); err != nil {
		return err
	}
	switch {
	case !t.conn.structured:
		t.data = b
	case !whole && isZero(b):
		head := t.chunk(t.room[:0], wire.ChunkDone, wire.ChunkOffsetHole, 12)
		t.head = wire.AppendHole(head, t.Offset, t.Length)
	default:
		head := t.chunk(t.room[:0], wire.ChunkDone, wire.ChunkOffsetData, 8+len(b))
		t.head, t.data = wire.AppendOffset(head, t.Offset), b
	}
	return nil
}

func isZero(b []byte) bool {
	return b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}

// readAround reads what is between holes, and makes a reply of both.
func (t *task) readAround(holes []span) error {
	t.reply = reply{}
	at := 0
	data := func(to int) error {
		if at == to {
			return nil
		}
		p, off := t.payload.b[at:to], t.Offset+uint64(at)
		t.more = append(t.more, wire.AppendOffset(t.chunk(nil, 0, wire.ChunkOffsetData, 8+len(p)), off), p)
		_, err := t.conn.export.Device.ReadAt(p, int64(off))
		return err
	}
	for _, h := range holes {
		if err := data(h.off); err != nil {
			return err
		}
		t.more = append(t.more, wire.AppendHole(t.chunk(nil, 0, wire.ChunkOffsetHole, 12), t.Offset+uint64(h.off), uint32(h.end-h.off)))
		at = h.end
	}
	if err := data(len(t.payload.b)); err != nil {
		return err
	}
	end := t.chunk(t.room[:0], wire.ChunkDone, wire.ChunkNone, 0)
	t.head, t.more = t.more[0], append(t.more[1:], end)
	return nil
}

// holes lists the stretches of a READ that read as zeros, counted from its beginning. What the device
// doesn't tell in one answer is data.
func (t *task) holes() ([]span, error) {
	ds, err := t.describe(t.conn.export.allocation)
	if err != nil {
		return nil, err
	}
	var holes []span
	at := 0
	for _, d := range ds {
		if d.Flags&uint32(block.ReadsZero) != 0 && d.Length >= minHole {
			holes = append(holes, span{at, at + int(d.Length)})
		}
		at += int(d.Length)
	}
	return holes, nil
}

// maxDescriptors bounds the block status of one context in one reply.
const maxDescriptors = 8 << 10

// blockStatus answers BLOCK_STATUS: a chunk for each context, which may cover less than was asked for.
func (t *task) blockStatus() error {
	var out []byte
	for i, x := range t.conn.contexts {
		ds, err := t.describe(x.status)
		if err != nil {
			return fmt.Errorf("%s: %w", x.name, err)
		}
		flags := uint16(0)
		if i == len(t.conn.contexts)-1 {
			flags = wire.ChunkDone
		}
		out = t.chunk(out, flags, wire.ChunkBlockStatus, 4+8*len(ds))
		out = wire.AppendBlockStatus(out, x.id, ds)
	}
	t.reply = reply{head: out}
	return nil
}

// describe gathers the descriptors of one context: neighbours with the same flags are one, none reaches
// behind the range, and with REQ_ONE there is one.
func (t *task) describe(of ContextFunc) ([]wire.Descriptor, error) {
	var ds []wire.Descriptor
	off, left := int64(t.Offset), int64(t.Length)
	for left > 0 && len(ds) < maxDescriptors {
		extents, err := of(off, left)
		if err != nil {
			return nil, err
		}
		if len(extents) == 0 {
			return nil, fmt.Errorf("no extents at byte %d", off)
		}
		for _, x := range extents {
			if x.Length <= 0 {
				return nil, fmt.Errorf("extent of %d bytes at byte %d", x.Length, off)
			}
			n := uint32(min(x.Length, left))
			if k := len(ds) - 1; k >= 0 && ds[k].Flags == uint32(x.Flags) {
				ds[k].Length += n
			} else if k >= 0 && (t.Flags&wire.FlagReqOne != 0 || k+1 == maxDescriptors) {
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
