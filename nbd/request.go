package nbd

import (
	"fmt"
	"sync"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// A task is a request in flight, from its header to the last byte of its reply. Tasks are reused.
type task struct {
	conn *conn
	wire.Request

	errno wire.Errno // of a request that is refused
	why   string

	payload *buffer // of a WRITE, or for the data of a READ; nil for others
	entered bool    // it is counted as a user of the export's device

	reply
	room [wire.ChunkSize + 12]byte // the reply's head, where it is short
}

const goingAway = "the export is going away"

var tasks = sync.Pool{New: func() any { return new(task) }}

// newTask validates the request; if it is refused, errno is set.
func newTask(c *conn, r wire.Request) *task {
	t := tasks.Get().(*task)
	t.conn, t.Request = c, r
	c.underWay.Add(1)
	t.errno, t.why = c.validate(r)
	if t.errno == 0 {
		// Counted until its reply was sent, so that Remove waits for the reply too.
		if t.entered = !c.stopping.Load() && c.export.requests.enter(); !t.entered {
			t.errno, t.why = wire.ESHUTDOWN, goingAway
		}
	}
	return t
}

// hold waits until the task may have a payload buffer, and sets it. When the connection stops meanwhile the request is
// refused.
func (t *task) hold() {
	if !t.conn.payload.add(int64(t.Length), t.Command) {
		t.errno, t.why = wire.ESHUTDOWN, goingAway
		return
	}
	t.payload = getBuffer(t.Length)
}

// end releases the resources of the task.
func (t *task) end() {
	c := t.conn
	if t.payload != nil {
		n := int64(len(t.payload.b))
		t.payload.free()
		c.payload.sub(n, t.Command)
	}
	if t.entered {
		c.export.requests.leave()
	}
	c.underWay.Add(-1)
	*t = task{}
	tasks.Put(t)
}

// validate decides whether a request is legal; 0: it is. After it the range is inside the device and the flags are
// known.
//
// FUA is allowed with every command, as in the protocol, and has no effect on those that change nothing.
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
		return wire.EINVAL, fmt.Sprintf("flags 0x%x don't go with %v", uint16(r.Flags&^known), r.Command)
	}
	if changes && (e.ReadOnly || c.readOnly) {
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
	if r.Length == 0 {
		return wire.EINVAL, "range is empty"
	}
	if (r.Command == wire.CmdRead || r.Command == wire.CmdWrite) && r.Length > wire.MaxPayload {
		if r.Flags&wire.FlagDF != 0 {
			return wire.EOVERFLOW, "too long for one chunk"
		}
		return wire.EINVAL, "longer than the maximum block size"
	}
	if size := uint64(e.Device.Size()); r.Offset > size || uint64(r.Length) > size-r.Offset {
		if r.Command == wire.CmdWrite || r.Command == wire.CmdWriteZeroes {
			return wire.ENOSPC, "range ends behind the export's end"
		}
		return wire.EINVAL, "range ends behind the export's end"
	}
	return 0, ""
}
