package nbd

import (
	"fmt"
	"slices"
	"sync"
)

// keptChanges are the changes that were acknowledged and that no Flush covers, in the order of their acknowledgement.
type keptChanges struct {
	limit int64 // bytes

	mu      sync.Mutex
	list    []keptChange
	bytes   int64
	last    uint64 // number of the newest change
	repeats uint64 // how often the list was sent again
}

type keptChange struct {
	number uint64
	bytes  int64
	do     func(c *Client) error
}

// keptOverhead is what a change counts beside its data, in bytes.
const keptOverhead = 128

// KeepChanges has the device keep the changes that were acknowledged and not flushed, up to limit bytes, and send them again after a
// lost connection, in their order. A change in flight is sent again too. So nothing is lost with a server that is killed and
// started again, with the same disk and with what was flushed. When more is kept than limit, the change that exceeds it waits for a
// Flush. If the new server refuses a change, flushes fail from then on.
//
// The server that was lost must not execute requests any more: one that has merely become unreachable could execute an old
// change after a newer one. KeepChanges is called before the first request.
func (r *Redialer) KeepChanges(limit int64) { r.kept = &keptChanges{limit: limit} }

// sent returns what add has to be called with after a request that is sent now.
func (k *keptChanges) sent() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.repeats
}

// add records an acknowledged change, and reports whether the list is to be flushed. It reports !ok when the list was sent again
// since the change was: then the change has to be, too.
func (k *keptChanges) add(sent uint64, bytes int64, do func(c *Client) error) (full, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.repeats != sent {
		return false, false
	}
	k.last++
	bytes += keptOverhead
	k.list = append(k.list, keptChange{k.last, bytes, do})
	k.bytes += bytes
	return k.bytes > k.limit, true
}

// newest returns the number of the newest change.
func (k *keptChanges) newest() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.last
}

// flushed forgets the changes up to a number.
func (k *keptChanges) flushed(number uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := 0
	for ; n < len(k.list) && k.list[n].number <= number; n++ {
		k.bytes -= k.list[n].bytes
	}
	k.list = slices.Delete(k.list, 0, n)
}

// repeat sends the list to a server that is connected to instead of one that was lost.
func (k *keptChanges) repeat(c *Client) error {
	k.mu.Lock()
	k.repeats++
	list := slices.Clone(k.list)
	k.mu.Unlock()
	for _, change := range list {
		if err := change.do(c); err != nil {
			return fmt.Errorf("a change that the lost server had acknowledged: %w", err)
		}
	}
	return nil
}

// changeKept is change with KeepChanges.
func (r *Redialer) changeKept(do func(c *Client) error, bytes int64, again func() func(c *Client) error) error {
	for {
		full, ok := false, false
		err := r.again(func(c *Client) error {
			sent := r.kept.sent() // before the change is: when the list is sent again, c is closed already
			err := do(c)
			if err == nil {
				full, ok = r.kept.add(sent, bytes, again())
			}
			return err
		})
		switch {
		case err != nil:
			return err
		case !ok:
			r.redialing.Lock() // until the connection is replaced
			r.redialing.Unlock()
		case full:
			return r.Flush()
		default:
			return nil
		}
	}
}
