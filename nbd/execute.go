package nbd

import (
	"fmt"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// process executes the request and makes the reply.
func (t *task) process() {
	e := t.conn.export
	if t.errno == 0 {
		start := time.Now()
		t.count()
		err := t.executeWaiting()
		switch {
		case err == errAbandoned:
			t.errno, t.why = wire.ESHUTDOWN, goingAway
		case err != nil:
			t.errno = errnoOf(err)
			e.failed(t.conn.server, t.Request, err)
		}
		if short(t.Request) {
			t.conn.inline.trial(t.Request).Took(time.Since(start))
		}
	}
	if t.errno != 0 {
		e.errors.Add(1)
		t.fail()
	}
}

// count adds the request to the counters of the export.
func (t *task) count() {
	e, n := t.conn.export, int64(t.Length)
	switch t.Command {
	case wire.CmdRead:
		e.reads.Add(1)
		e.readBytes.Add(n)
	case wire.CmdWrite, wire.CmdWriteZeroes:
		e.writes.Add(1)
		e.writtenBytes.Add(n)
	case wire.CmdTrim:
		e.writes.Add(1)
	case wire.CmdFlush:
		e.flushes.Add(1)
	}
}

// executeWaiting executes the request, and repeats it while the error is a block.RetryLater. It holds only the payload
// meanwhile.
func (t *task) executeWaiting() error {
	for {
		err := t.execute()
		changed := block.CanRetry(err)
		if changed == nil {
			return err
		}
		t.conn.waiting.Add(1)
		t.conn.export.waiting.Add(1)
		wanted := t.conn.wait(changed)
		t.conn.export.waiting.Add(-1)
		t.conn.waiting.Add(-1)
		if !wanted {
			return errAbandoned
		}
	}
}

// execute executes a valid request: a case for every command. A change whose error is a block.RetryLater may be
// executed again.
func (t *task) execute() error {
	dev := t.conn.export.Device
	off, n := int64(t.Offset), int64(t.Length)
	fua := t.Flags&wire.FlagFUA != 0
	t.succeed()
	switch t.Command {
	case wire.CmdRead:
		return t.read()
	case wire.CmdWrite:
		if fua {
			return block.WriteDurable(dev, t.payload.b, off)
		}
		_, err := dev.WriteAt(t.payload.b, off)
		return err
	case wire.CmdWriteZeroes:
		var flags block.ZeroFlags
		if t.Flags&wire.FlagNoHole != 0 {
			flags |= block.KeepAllocated
		}
		if t.Flags&wire.FlagFastZero != 0 {
			flags |= block.OnlyFast
		}
		return thenFlush(dev, fua, block.Zero(dev, off, n, flags))
	case wire.CmdTrim:
		return thenFlush(dev, fua, block.Discard(dev, off, n))
	case wire.CmdFlush:
		return dev.Flush()
	case wire.CmdCache:
		return nil
	case wire.CmdBlockStatus:
		return t.blockStatus()
	}
	panic("nbd: a command that was validated has no case")
}

// thenFlush is FUA for changes that devices can't make durable in one step.
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

// fail makes the reply an error: a chunk with a message where the protocol requires one, else a simple reply.
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

// zeroUnit is the length in bytes of the pieces of a READ that are checked for zeros: long enough to be worth a chunk.
// The check ends at the first byte that is not zero, so data costs next to nothing; to ask the file system for holes
// instead visits all pages on some file systems (12 ms a gigabyte were measured).
const zeroUnit = 64 << 10

// read executes a READ and makes its reply.
func (t *task) read() error {
	if _, err := t.conn.export.Device.ReadAt(t.payload.b, int64(t.Offset)); err != nil {
		return err
	}
	t.answerRead()
	return nil
}

// answerRead makes the reply of a READ whose payload has the data.
func (t *task) answerRead() {
	t.succeed()
	if t.data = t.payload.b; t.conn.structured {
		t.structure()
	}
}

// structure makes the reply of a READ, whose payload has the data, a structured one: without DF,
// zeros are sent as holes.
func (t *task) structure() {
	b := t.payload.b
	t.reply = reply{}
	for at := 0; at < len(b); {
		end, hole := t.alike(at)
		flags, room := uint16(0), []byte(nil)
		if end == len(b) {
			flags = wire.ChunkDone
		}
		if at == 0 {
			room = t.room[:0]
		}
		p, off := b[at:end], t.Offset+uint64(at)
		if hole {
			p = nil
			room = wire.AppendHole(t.chunk(room, flags, wire.ChunkOffsetHole, 12), off, uint32(end-at))
		} else {
			room = wire.AppendOffset(t.chunk(room, flags, wire.ChunkOffsetData, 8+len(p)), off)
		}
		if at == 0 {
			t.head, t.data = room, p
		} else {
			t.more = append(t.more, room)
			if !hole {
				t.more = append(t.more, p)
			}
		}
		at = end
	}
}

// alike returns how far the payload, from at on, is data throughout or zeros throughout.
func (t *task) alike(at int) (end int, hole bool) {
	b := t.payload.b
	if t.Flags&wire.FlagDF != 0 {
		return len(b), false
	}
	for end = at; end < len(b); {
		next := min(end+zeroUnit, len(b))
		zero := block.IsZero(b[end:next])
		if end > at && zero != hole {
			break
		}
		end, hole = next, zero
	}
	return end, hole
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

// maxLooks bounds the calls of the device for a BLOCK_STATUS with REQ_ONE, where each answer may add to the same
// extent. Without REQ_ONE the bound is maxDescriptors.
const maxLooks = 8

// describe collects the descriptors of one context: adjacent ones with the same flags are joined, and none extends past
// the range. With REQ_ONE there is one, which may be shorter than the run of equal flags.
func (t *task) describe(of ContextFunc) ([]wire.Descriptor, error) {
	var ds []wire.Descriptor
	one, most := t.Flags&wire.FlagReqOne != 0, maxDescriptors
	if one {
		most = maxLooks
	}
	off, left := int64(t.Offset), int64(t.Length)
	for looks := 0; left > 0 && len(ds) < maxDescriptors && looks < most; looks++ {
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
			} else if k >= 0 && (one || k+1 == maxDescriptors) {
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
