package blocktest

import (
	"fmt"
	"sync"
	"syscall"

	"github.com/dmsnap/dmsnap/block"
)

// quotaBlock is the unit in which a Pool counts space, in bytes: a file system's block.
const quotaBlock = 4096

// A Pool is the space of one file system, which its files share: one that takes the last of it makes the others fail
// with ENOSPC. Its methods may be called concurrently.
type Pool struct {
	mu    sync.Mutex
	size  int64 // blocks
	taken int64 // blocks, by all files; may be more than size
}

// NewPool returns a file system with size bytes of space.
func NewPool(size int64) *Pool { return &Pool{size: size / quotaBlock} }

// SetSize changes how much space there is, as if another file had been deleted or written.
func (p *Pool) SetSize(size int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.size = size / quotaBlock
}

// Free returns how many bytes are left.
func (p *Pool) Free() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return max(0, p.size-p.taken) * quotaBlock
}

// take allocates the blocks, all or none; a negative number frees them.
func (p *Pool) take(blocks int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if blocks > 0 && p.taken+blocks > p.size {
		return false
	}
	p.taken += blocks
	return true
}

// Sparse returns dev as a sparse file of the file system, which takes no space yet. Without canAllocate the file system
// can't reserve space.
func (p *Pool) Sparse(dev block.Device, canAllocate bool) *Quota {
	return &Quota{Forward: block.NewForward(dev), pool: p, taken: make(map[int64]bool), can: canAllocate}
}

// A Quota is a sparse file on a file system with little space: what was never written takes none, a write that needs
// more than there is fails with ENOSPC, having written nothing, and one that replaces what was written needs none.
// Its methods may be called concurrently.
type Quota struct {
	block.Forward
	can  bool // reserve space
	pool *Pool

	mu    sync.Mutex
	taken map[int64]bool
}

// NewQuota returns dev as the only file of a Pool of limit bytes.
func NewQuota(dev block.Device, limit int64, canAllocate bool) *Quota {
	return NewPool(limit).Sparse(dev, canAllocate)
}

// SetLimit is the SetSize of the Pool.
func (q *Quota) SetLimit(limit int64) { q.pool.SetSize(limit) }

// Taken returns the bytes that this file has.
func (q *Quota) Taken() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return int64(len(q.taken)) * quotaBlock
}

// take makes the blocks of a range taken, all or none. mu is held.
func (q *Quota) take(off, n int64) error {
	if err := block.CheckRange("write", off, n, q.Size()); err != nil {
		return err
	}
	var missing []int64
	for b := off / quotaBlock; n > 0 && b <= (off+n-1)/quotaBlock; b++ {
		if !q.taken[b] {
			missing = append(missing, b)
		}
	}
	if !q.pool.take(int64(len(missing))) {
		return fmt.Errorf("write at byte %d: %w", off, syscall.ENOSPC)
	}
	for _, b := range missing {
		q.taken[b] = true
	}
	return nil
}

// giveBack makes the whole blocks of a range holes. mu is held.
func (q *Quota) giveBack(off, n int64) {
	first, end := off/quotaBlock+min(1, off%quotaBlock), (off+n)/quotaBlock
	give := func(b int64) {
		if q.taken[b] {
			delete(q.taken, b)
			q.pool.take(-1)
		}
	}
	if end-first < int64(len(q.taken)) {
		for b := first; b < end; b++ {
			give(b)
		}
		return
	}
	for b := range q.taken {
		if first <= b && b < end {
			give(b)
		}
	}
}

// WriteAt writes where there is space.
func (q *Quota) WriteAt(p []byte, off int64) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err := q.take(off, int64(len(p))); err != nil {
		return 0, err
	}
	return q.Forward.WriteAt(p, off)
}

// WriteDurableAt writes durably where there is space.
func (q *Quota) WriteDurableAt(p []byte, off int64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err := q.take(off, int64(len(p))); err != nil {
		return err
	}
	return block.WriteDurable(q.Forward, p, off)
}

// WriteLastAt is a last write where there is space; see block.LastWriter.
func (q *Quota) WriteLastAt(p []byte, off int64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err := q.take(off, int64(len(p))); err != nil {
		return err
	}
	return block.WriteLast(q.Forward, p, off)
}

// ZeroAt makes holes of whole blocks, or with KeepAllocated takes space.
func (q *Quota) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	if err := block.CheckRange("zero", off, n, q.Size()); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if flags&block.KeepAllocated != 0 {
		if err := q.take(off, n); err != nil {
			return err
		}
		return block.Zero(q.Forward, off, n, flags)
	}
	if err := block.Zero(q.Forward, off, n, flags); err != nil {
		return err
	}
	q.giveBack(off, n)
	return nil
}

// Discard makes holes.
func (q *Quota) Discard(off, n int64) error {
	if err := block.CheckRange("discard", off, n, q.Size()); err != nil {
		return err
	}
	return q.ZeroAt(off, n, 0)
}

// Allocate takes space.
func (q *Quota) Allocate(off, n int64) error {
	if !q.can {
		return block.ErrNotFast
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.take(off, n)
}
