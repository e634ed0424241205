package nbd

import (
	"crypto/tls"
	"net"
	"runtime"
	"sync"
	"time"
)

// A reply is the bytes sent for one request: a head, data, and possibly more.
type reply struct {
	head []byte
	data []byte
	more [][]byte
}

// replies is the send queue of a connection. A goroutine that adds a reply while none is writing becomes the writer,
// and writes until the queue is empty; others only add meanwhile. So concurrent replies are sent in one system call,
// and only the writer waits for writes.
//
// Every request in flight has at most one reply here, so the queue is bounded like them.
type replies struct {
	nc      net.Conn
	timeout time.Duration // for the peer to read progress bytes

	mu      sync.Mutex
	queue   []*task
	writing bool
	err     error // the first write that failed; later replies are dropped

	// Only the writer uses:
	batch   []*task
	vectors net.Buffers
	part    net.Buffers
	cut     [1][]byte
	joined  []byte // of an encrypted connection, where each Write is one record
}

// add appends the reply of t, for the next send or flush.
func (o *replies) add(t *task) {
	o.mu.Lock()
	o.queue = append(o.queue, t)
	o.mu.Unlock()
}

// send queues the reply of t and writes. t ends when the reply was written or dropped: before send returns, or later in
// another goroutine.
//
// With others, workers that are ready to run go first, so that the replies to requests that arrived together are sent
// together. That is a factor of three at depth 32, and costs nothing when no other worker is ready.
func (o *replies) send(t *task, others bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.queue = append(o.queue, t)
	if o.writing {
		return
	}
	o.writing = true
	if others {
		o.mu.Unlock()
		runtime.Gosched()
		o.mu.Lock()
	}
	o.writeAll()
}

// flush writes the queue, unless another goroutine is writing.
func (o *replies) flush() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.writing {
		o.writing = true
		o.writeAll()
	}
}

// writeAll writes until nothing is left. mu is held, but not while it writes; the caller has set writing.
func (o *replies) writeAll() {
	for len(o.queue) > 0 {
		o.batch, o.queue = o.queue, o.batch[:0]
		err := o.err
		o.mu.Unlock()
		if err == nil {
			err = o.write(o.batch)
		}
		for i, t := range o.batch {
			t.end()
			o.batch[i] = nil
		}
		o.mu.Lock()
		if o.err == nil && err != nil {
			o.err = err
			o.nc.Close() // a reply may have been sent in part; the reader gets an error
		}
	}
	o.writing = false
}

// write sends a batch, in steps with a timeout each.
func (o *replies) write(batch []*task) error {
	v := o.vectors[:0]
	for _, t := range batch {
		v = append(v, t.head)
		if len(t.data) > 0 {
			v = append(v, t.data)
		}
		v = append(v, t.more...)
	}
	o.vectors = v
	defer clear(o.vectors)
	for len(v) > 0 {
		n, k := len(v[0]), 1
		for k < len(v) && n+len(v[k]) <= progress {
			n += len(v[k])
			k++
		}
		if n <= progress {
			o.part, v = v[:k], v[k:]
		} else {
			o.cut[0] = v[0][:progress]
			o.part, v[0] = o.cut[:], v[0][progress:]
		}
		o.nc.SetWriteDeadline(time.Now().Add(o.timeout))
		if err := o.writePart(); err != nil {
			return err
		}
	}
	return nil
}

// writePart writes o.part: in one system call on a socket, in few records with TLS.
func (o *replies) writePart() error {
	if _, encrypted := o.nc.(*tls.Conn); !encrypted || len(o.part) == 1 {
		_, err := o.part.WriteTo(o.nc)
		return err
	}
	o.joined = o.joined[:0]
	for _, b := range o.part {
		o.joined = append(o.joined, b...)
	}
	_, err := o.nc.Write(o.joined)
	return err
}
