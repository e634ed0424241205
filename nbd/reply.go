package nbd

import (
	"net"
	"sync"
	"time"
)

// A reply is what goes out for one request: a head, data behind it, and perhaps more.
type reply struct {
	head []byte
	data []byte
	more [][]byte
	done func() // the bytes have left, or never will
}

// replies is the way out of a connection. Whoever adds a reply while nobody writes becomes the writer,
// and writes until nothing is left; who comes meanwhile only adds. So replies that meet leave in one
// system call, and nobody waits for another's write but the writer.
//
// Every request that is under way has at most one reply here, so the queue is as bounded as they are.
type replies struct {
	nc      net.Conn
	timeout time.Duration

	mu      sync.Mutex
	queue   []reply
	writing bool
	err     error // the first write that failed; later replies are dropped

	batch   []reply     // the writer's own
	vectors net.Buffers // the writer's own
}

// send puts r on its way. r.done is called in any case, perhaps by another goroutine.
func (o *replies) send(r reply) {
	o.mu.Lock()
	o.queue = append(o.queue, r)
	if o.writing {
		o.mu.Unlock()
		return
	}
	o.writing = true
	for len(o.queue) > 0 {
		o.batch, o.queue = o.queue, o.batch[:0]
		err := o.err
		o.mu.Unlock()
		if err == nil {
			err = o.write(o.batch)
		}
		for i := range o.batch {
			o.batch[i].done()
			o.batch[i] = reply{}
		}
		o.mu.Lock()
		if o.err == nil && err != nil {
			o.err = err
			o.nc.Close() // the stream is out of step; who reads finds out
		}
	}
	o.writing = false
	o.mu.Unlock()
}

func (o *replies) write(batch []reply) error {
	v := o.vectors[:0]
	for _, r := range batch {
		v = append(v, r.head)
		if len(r.data) > 0 {
			v = append(v, r.data)
		}
		v = append(v, r.more...)
	}
	o.vectors = v[:0] // WriteTo moves v itself on
	o.nc.SetWriteDeadline(time.Now().Add(o.timeout))
	_, err := v.WriteTo(o.nc)
	return err
}
