package block

import (
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A queue executes several reads of files by one system call, io_submit of Linux's asynchronous I/O (io_submit(2)). A read
// of cached bytes is complete when io_submit returns, and its result is taken from the ring that the kernel shares with
// the process, so that there is no second call.
//
// Queues are few, since their number is limited on a machine (/proc/sys/fs/aio-max-nr), and are kept until the process ends.
type queue struct {
	id     uintptr // the kernel's, and the address of the ring
	ring   *aioRing
	n      int // requests in blocks
	blocks [queueLength]aioBlock
	list   [queueLength]*aioBlock
	events [queueLength]aioEvent
}

// queueLength is how many requests a queue executes at once.
const queueLength = 64

// aioBlock is a struct iocb of a machine with 64 bits and the low byte first.
type aioBlock struct {
	data   uint64 // comes back in the event
	_      uint32 // a key that the kernel writes
	flags  int32
	opcode uint16
	_      int16 // priority
	fd     uint32
	buffer unsafe.Pointer // keeps the memory in place until the kernel has filled it
	length uint64
	offset int64
	_      uint64
	_      [2]uint32
}

const aioPread = 0 // IOCB_CMD_PREAD

// aioEvent is a struct io_event.
type aioEvent struct {
	data, block uint64
	result      int64
	result2     int64
}

// aioRing is the head of the ring of events: the process takes events from head on and moves it.
type aioRing struct {
	id, length                            uint32
	head, tail                            uint32
	magic, compatible, incompatible, size uint32
}

const aioMagic = 0xa10a10a1

var queues struct {
	mu     sync.Mutex
	unused []*queue
	made   int
	failed atomic.Bool // the kernel refuses queues
}

var lowByteFirst = func() bool { x := uint16(1); return *(*byte)(unsafe.Pointer(&x)) == 1 }()

// canQueue reports whether there may be queues at all.
func canQueue() bool { return unsafe.Sizeof(uintptr(0)) == 8 && lowByteFirst && !queues.failed.Load() }

// getQueue returns a queue that nobody else uses until put, or nil.
func getQueue() *queue {
	if !canQueue() {
		return nil
	}
	queues.mu.Lock()
	defer queues.mu.Unlock()
	if last := len(queues.unused) - 1; last >= 0 {
		q := queues.unused[last]
		queues.unused = queues.unused[:last]
		return q
	}
	if queues.made >= 2*runtime.GOMAXPROCS(0) {
		return nil
	}
	q := new(queue)
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, 2*queueLength, uintptr(unsafe.Pointer(&q.id)), 0); errno != 0 {
		queues.failed.Store(queues.made == 0)
		return nil
	}
	queues.made++
	ring := *(**aioRing)(unsafe.Pointer(&q.id))
	if ring.magic == aioMagic && ring.incompatible == 0 {
		q.ring = ring
	}
	return q
}

func (q *queue) put() {
	queues.mu.Lock()
	queues.unused = append(queues.unused, q)
	queues.mu.Unlock()
}

// read adds a read of p, which is not empty, at off, as number i.
func (q *queue) read(fd int, p []byte, off int64, i int) {
	b := &q.blocks[q.n]
	*b = aioBlock{data: uint64(i), opcode: aioPread, flags: unix.RWF_NOWAIT, fd: uint32(fd),
		buffer: unsafe.Pointer(unsafe.SliceData(p)), length: uint64(len(p)), offset: off}
	q.list[q.n] = b
	q.n++
}

// run executes what was added and calls done for each request that was executed, with the number of bytes or an error. When it
// returns the kernel uses none of the memory any more.
func (q *queue) run(done func(i int, n int64, err error)) {
	defer func() { clear(q.blocks[:q.n]) }() // the memory of buffers
	for at := 0; at < q.n; {
		k, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, q.id, uintptr(q.n-at), uintptr(unsafe.Pointer(&q.list[at])))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 || k == 0 {
			return // the first of them can't be executed: the caller finds out why
		}
		at += int(k)
		q.take(int(k), done)
	}
}

// take waits for the results of n requests.
func (q *queue) take(n int, done func(i int, n int64, err error)) {
	for n > 0 {
		k := q.fromRing(n)
		if k == 0 {
			r, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, q.id, uintptr(n), uintptr(n), uintptr(unsafe.Pointer(&q.events[0])), 0, 0)
			if errno == unix.EINTR {
				continue
			}
			if errno != 0 {
				// The kernel may still write into the caller's memory.
				panic("block: io_getevents: " + errno.Error())
			}
			k = int(r)
		}
		for _, e := range q.events[:k] {
			if e.result < 0 {
				done(int(e.data), 0, unix.Errno(-e.result))
			} else {
				done(int(e.data), e.result, nil)
			}
		}
		n -= k
	}
}

// fromRing takes up to n results that are in the ring, and returns how many.
func (q *queue) fromRing(n int) (k int) {
	if q.ring == nil {
		return 0
	}
	events := unsafe.Slice((*aioEvent)(unsafe.Add(unsafe.Pointer(q.ring), q.ring.size)), q.ring.length)
	head, tail := q.ring.head, atomic.LoadUint32(&q.ring.tail)
	for ; k < n && head != tail; k++ {
		q.events[k] = events[head]
		head = (head + 1) % q.ring.length
	}
	atomic.StoreUint32(&q.ring.head, head)
	return k
}
