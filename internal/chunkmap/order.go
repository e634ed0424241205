package chunkmap

import (
	"slices"
	"sync"
	"sync/atomic"
)

// leafSize bounds how many numbers a leaf of an order has.
const leafSize = 512

// An order finds the next page after a gap: the numbers of a Map's pages, ascending, in leaves of at most 512. It is
// built when it is first needed, since loading a store needs none; from then on each new page is added. Numbers of pages
// that became empty stay until a search finds them so. 8 to 16 bytes a page.
//
// The race considered: a page that is made while the order is built. Pages are made under the lock of their shard, and
// so is looked whether there is an order to add them to; the numbers are collected under the same locks, after every
// shard can see that there is one.
type order struct {
	building sync.Mutex  // held while it is built
	wanted   atomic.Bool // new pages are added
	built    atomic.Bool // it has all pages
	builds   int         // under building

	mu     sync.RWMutex
	leaves [][]uint64 // none is empty
}

// find returns the leaf and the place in it of the first number that is not below number; the leaf is len(o.leaves)
// when there is none. mu is held.
func (o *order) find(number uint64) (leaf, at int) {
	leaf, _ = slices.BinarySearchFunc(o.leaves, number, func(l []uint64, number uint64) int {
		if l[len(l)-1] < number {
			return -1
		}
		return 1
	})
	if leaf < len(o.leaves) {
		at, _ = slices.BinarySearch(o.leaves[leaf], number)
	}
	return leaf, at
}

// next returns the first number that is not below number.
func (o *order) next(number uint64) (uint64, bool) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	leaf, at := o.find(number)
	if leaf == len(o.leaves) {
		return 0, false
	}
	return o.leaves[leaf][at], true
}

// add adds a number, unless it is there.
func (o *order) add(number uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	leaf, at := o.find(number)
	if leaf == len(o.leaves) {
		if leaf == 0 {
			o.leaves = append(o.leaves, nil)
		}
		leaf = len(o.leaves) - 1
		at = len(o.leaves[leaf])
	}
	l := o.leaves[leaf]
	if at < len(l) && l[at] == number {
		return
	}
	l = slices.Insert(l, at, number)
	o.leaves[leaf] = l
	if len(l) > leafSize {
		half := len(l) / 2
		o.leaves[leaf] = slices.Clone(l[:half])
		o.leaves = slices.Insert(o.leaves, leaf+1, slices.Clone(l[half:]))
	}
}

// remove removes a number, if it is there.
func (o *order) remove(number uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	leaf, at := o.find(number)
	if leaf == len(o.leaves) || o.leaves[leaf][at] != number {
		return
	}
	if len(o.leaves[leaf]) == 1 {
		o.leaves = slices.Delete(o.leaves, leaf, leaf+1)
		return
	}
	o.leaves[leaf] = slices.Delete(o.leaves[leaf], at, at+1)
}

// buildOrder makes the order have all pages.
func (m *Map) buildOrder() {
	o := &m.order
	o.building.Lock()
	defer o.building.Unlock()
	if o.built.Load() {
		return
	}
	o.builds++
	o.wanted.Store(true)
	numbers := m.pageNumbers()
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, l := range o.leaves { // pages that were made meanwhile
		numbers = append(numbers, l...)
	}
	slices.Sort(numbers)
	numbers = slices.Compact(numbers)
	o.leaves = nil
	for l := range slices.Chunk(numbers, leafSize*3/4) {
		o.leaves = append(o.leaves, slices.Clone(l))
	}
	o.built.Store(true)
}

// nextPage returns the first page from number on that holds something, or last+1.
func (m *Map) nextPage(number, last uint64) uint64 {
	if !m.order.built.Load() {
		for range 64 { // most gaps are short
			if number > last {
				return last + 1
			}
			if m.hasPage(number) {
				return number
			}
			number++
		}
		m.buildOrder()
	}
	for {
		next, ok := m.order.next(number)
		if !ok || next > last {
			return last + 1
		}
		if m.hasPage(next) {
			return next
		}
		m.forgetPage(next)
	}
}

func (m *Map) hasPage(number uint64) bool {
	h := hash(number)
	s := m.shardOf(h)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.dir.find(h, number) != nil
}

// forgetPage removes a page from the order, unless it has been made again.
func (m *Map) forgetPage(number uint64) {
	h := hash(number)
	s := m.shardOf(h)
	s.mu.RLock() // so that it is not made again meanwhile
	defer s.mu.RUnlock()
	if s.dir.find(h, number) == nil {
		m.order.remove(number)
	}
}
