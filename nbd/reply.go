package nbd

import (
	"crypto/tls"
	"net"
	"runtime"
	"sync"
	"time"
)

// A reply is what goes out for one request: a head, data behind it, and perhaps more.
type reply struct {
	head []byte
	data []byte
	more [][]byte
}

// replies is the way out of a connection. Whoever adds a reply while nobody writes becomes the writer,
// and writes until nothing is left; who comes meanwhile only adds. So replies that meet leave in one
// system call, and nobody waits for another's write but the writer.
//
// Every request that is under way has at most one reply here, so the queue is as bounded as they are.
type replies struct {
	nc      net.Conn
	timeout time.Duration // for progress bytes to be taken

	mu      sync.Mutex
	queue   []*task
	writing bool
	err     error // the first write that failed; later replies are dropped

	// The writer's own:
	batch   []*task
	vectors net.Buffers
	part    net.Buffers
	cut     [1][]byte
	joined  []byte // of an encrypted connection, where each Write is a record of its own
}

// add puts the reply of t behind the others, for the next send or flush.
func (o *replies) add(t *task) {
	o.mu.Lock()
	o.queue = append(o.queue, t)
	o.mu.Unlock()
}

// send puts the reply of t on its way. t has ended when the bytes have left, or never will: before send
// returns, or later in another goroutine.
//
// With others, workers that are ready to run go first: where requests came in one piece their replies leave in
// one, too. This is worth a factor of three at depth 32, and costs nothing when nobody else is ready.
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

// flush sends what was added, unless somebody is at it.
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
			o.nc.Close() // the stream is out of step; who reads finds out
		}
	}
	o.writing = false
}

// write sends a batch, in steps for which the peer has some time each.
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
