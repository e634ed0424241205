package nbd

import (
	"sync"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// Short READs that are in the buffer one after the other are executed together, which takes fewer system calls
// (block.CacheReader). Only what is in memory is read that way, so that no READ waits for another one's disk; the others are
// executed by a goroutine each.

// A batch is READs that are executed together, and where their data goes.
type batch struct {
	tasks []*task
	reads []block.Read
}

var batches = sync.Pool{New: func() any { return new(batch) }}

func (b *batch) add(t *task) {
	b.tasks = append(b.tasks, t)
	b.reads = append(b.reads, block.Read{P: t.payload.b, Off: int64(t.Offset)})
}

func (b *batch) free() {
	clear(b.tasks)
	clear(b.reads)
	b.tasks, b.reads = b.tasks[:0], b.reads[:0]
	batches.Put(b)
}

// mayReadTogether reports whether a READ is to be executed together with the requests after it.
func (c *conn) mayReadTogether() bool {
	return c.inline.together.May() && c.nextIsShortRead()
}

// nextIsShortRead reports whether the next request is in the buffer, and is a READ that will be executed inline and does not
// wait for memory: those before it wait until it has been read.
func (c *conn) nextIsShortRead() bool {
	if c.r.Buffered() < wire.RequestSize || c.underWay.Load() >= maxInFlight {
		return false
	}
	head, _ := c.r.Peek(wire.RequestSize)
	r := wire.DecodeRequest(head)
	return r.Magic == wire.MagicRequest && r.Command == wire.CmdRead && c.mayInline(r) && c.payload.hasRoom(int64(r.Length))
}

// readTogether executes a short READ and those that follow it in the buffer, while holding reading. It reports whether the
// worker is still the reader, and whether there is more to read.
func (c *conn) readTogether(t *task) (kept, more bool) {
	b, more := batches.Get().(*batch), true
	defer b.free()
	b.add(t)
	for len(b.tasks) < quickBatch && c.nextIsShortRead() {
		if t, _ = c.read(); t == nil { // the connection was abandoned
			more = false
			break
		}
		if t.errno == 0 {
			b.add(t)
		} else {
			t.process()
			c.out.add(t)
			c.inline.waiting++
		}
	}
	mark := c.inline.watchdog.Arm()
	began := time.Now()
	done := block.ReadCached(c.export.Device, b.reads)
	if done > 0 {
		c.inline.reads.Took(time.Since(began) / time.Duration(done))
	}
	if kept = c.inline.watchdog.Disarm(mark); kept {
		c.inline.together.Ended(done == len(b.tasks))
		c.inline.waiting += done
	}
	for i, t := range b.tasks {
		if b.reads[i].Done {
			t.count()
			t.answerRead()
			c.out.add(t)
		} else {
			c.all.Go(func() {
				t.process()
				c.out.send(t, true)
			})
		}
	}
	if !kept {
		c.out.flush()
		return false, false
	}
	if more && c.inline.waiting < quickBatch && c.nextIsHere() {
		return true, true
	}
	c.inline.waiting = 0
	mark = c.inline.watchdog.Arm() // the client may not read the replies
	c.out.flush()
	return c.inline.watchdog.Disarm(mark), more
}
