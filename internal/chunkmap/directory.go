package chunkmap

import (
	"math/bits"
	"math/rand/v2"

	"github.com/dmsnap/dmsnap/ondisk"
)

// A directory finds the pages of a shard by number: a hash table with linear probing, whose slots are
// the pages themselves. A pointer to a page is valid until the next add or remove.
type directory struct {
	slots []page
	used  int
}

// The seeds differ from process to process, so that no disk can be made whose pages collide.
var seed, multiplier = rand.Uint64(), rand.Uint64() | 1

// hash mixes the number of a page. Its low bits choose the shard, all of them the slot.
func hash(number uint64) uint64 {
	high, low := bits.Mul64(number^seed, multiplier)
	return high ^ low
}

// home is where the search for a hash begins: it spreads them evenly over any number of slots.
func (d *directory) home(hash uint64) int {
	i, _ := bits.Mul64(hash, uint64(len(d.slots)))
	return int(i)
}

func (d *directory) next(i int) int {
	if i++; i < len(d.slots) {
		return i
	}
	return 0
}

// find returns the page of that number, whose hash is h, or nil.
func (d *directory) find(h, number uint64) *page {
	if d.used == 0 {
		return nil
	}
	for i := d.home(h); ; i = d.next(i) {
		p := &d.slots[i]
		if p.form() == free {
			return nil
		}
		if p.number() == number {
			return p
		}
	}
}

// insert adds chunk at of the page, or returns false when it is there.
func (d *directory) insert(h, number uint64, at int, new ondisk.COWChunk) bool {
	if new >= 1<<56 {
		panic("chunkmap: COW chunk of more than 56 bits")
	}
	p := d.find(h, number)
	if p == nil {
		p = d.add(h, number)
	}
	return p.insert(at, uint64(new))
}

// add makes a page that isn't there.
func (d *directory) add(h, number uint64) *page {
	if d.used*4 >= len(d.slots)*3 {
		old := d.slots
		d.slots = make([]page, max(4, len(old)+len(old)/2))
		for i := range old {
			if p := &old[i]; p.form() != free {
				*d.vacant(hash(p.number())) = *p
			}
		}
	}
	d.used++
	p := d.vacant(h)
	*p = newPage(number)
	return p
}

func (d *directory) vacant(h uint64) *page {
	i := d.home(h)
	for d.slots[i].form() != free {
		i = d.next(i)
	}
	return &d.slots[i]
}

// remove frees the slot of a page that find returned. Pages behind it, up to the next free slot, move
// up where the search for them passes the slot.
func (d *directory) remove(p *page) {
	d.used--
	if d.used == 0 {
		d.slots = nil
		return
	}
	hole := d.home(hash(p.number()))
	for &d.slots[hole] != p {
		hole = d.next(hole)
	}
	for i := d.next(hole); d.slots[i].form() != free; i = d.next(i) {
		home := d.home(hash(d.slots[i].number()))
		passes := home <= hole || home > i
		if i < hole { // the search went round the end
			passes = home <= hole && home > i
		}
		if passes {
			d.slots[hole] = d.slots[i]
			hole = i
		}
	}
	d.slots[hole] = page{}
}

// numbers yields the numbers of the pages, in no order.
func (d *directory) numbers(yield func(uint64) bool) {
	for i := range d.slots {
		if p := &d.slots[i]; p.form() != free && !yield(p.number()) {
			return
		}
	}
}
