package blocktest

import (
	"fmt"
	"sync"
	"syscall"

	"github.com/dmsnap/dmsnap/block"
)

// quotaBlock is the unit in which a Quota counts space, in bytes: a file system's block.
const quotaBlock = 4096

// A Quota is a sparse file on a file system with little space: what was never written takes none, and a
// write that needs more than there is fails with ENOSPC, having written nothing. Its methods may be
// called concurrently.
type Quota struct {
	block.Forward
	can bool // reserve space

	mu    sync.Mutex
	limit int64 // blocks
	taken map[int64]bool
}

// NewQuota returns dev, which takes no space yet, with so many bytes to take. Without canAllocate it is a
// file system that can't reserve space.
func NewQuota(dev block.Device, limit int64, canAllocate bool) *Quota {
	return &Quota{Forward: block.NewForward(dev), limit: limit / quotaBlock, taken: make(map[int64]bool), can: canAllocate}
}

// SetLimit changes how much there is: somebody deleted a file, or wrote one.
func (q *Quota) SetLimit(limit int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.limit = limit / quotaBlock
}

// Taken returns the bytes in use.
func (q *Quota) Taken() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return int64(len(q.taken)) * quotaBlock
}

// take makes the blocks of a range taken, all or none.
func (q *Quota) take(off, n int64) error {
	var missing []int64
	for b := off / quotaBlock; n > 0 && b <= (off+n-1)/quotaBlock; b++ {
		if !q.taken[b] {
			missing = append(missing, b)
		}
	}
	if int64(len(q.taken)+len(missing)) > max(q.limit, int64(len(q.taken))) {
		return fmt.Errorf("write at byte %d: %w", off, syscall.ENOSPC)
	}
	for _, b := range missing {
		q.taken[b] = true
	}
	return nil
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

// ZeroAt makes holes of whole blocks, or with KeepAllocated takes space.
func (q *Quota) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if flags&block.KeepAllocated != 0 {
		if err := q.take(off, n); err != nil {
			return err
		}
	} else {
		for b := (off + quotaBlock - 1) / quotaBlock; (b+1)*quotaBlock <= off+n; b++ {
			delete(q.taken, b)
		}
	}
	return block.Zero(q.Forward, off, n, flags)
}

// Discard makes holes.
func (q *Quota) Discard(off, n int64) error { return q.ZeroAt(off, n, 0) }

// Allocate takes space.
func (q *Quota) Allocate(off, n int64) error {
	if !q.can {
		return block.ErrNotFast
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.take(off, n)
}
