package qcow2

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/dmsnap/dmsnap/block"
)

// counts has a number for each cluster of a file, most of which are 0.
type counts struct {
	pages map[int64]*[countsPerPage]uint32
	page  *[countsPerPage]uint32 // the last one that was used, which is
	last  int64
}

func newCounts() *counts { return &counts{pages: map[int64]*[countsPerPage]uint32{}, last: -1} }

// at returns the page of a cluster; nil: there is none.
func (n *counts) at(cluster int64) *[countsPerPage]uint32 {
	if k := cluster / countsPerPage; k != n.last {
		n.last, n.page = k, n.pages[k]
	}
	return n.page
}

// add adds to the number of a cluster. Errors: ErrTooLarge.
func (n *counts) add(cluster int64, times uint32) error {
	page := n.at(cluster)
	if page == nil {
		if len(n.pages) == maxCountPages {
			return ErrTooLarge
		}
		page = new([countsPerPage]uint32)
		n.pages[n.last], n.page = page, page
	}
	at := &page[cluster%countsPerPage]
	*at += min(times, math.MaxUint32-*at)
	return nil
}

func (n *counts) of(cluster int64) uint32 {
	if page := n.at(cluster); page != nil {
		return page[cluster%countsPerPage]
	}
	return 0
}

// each calls do for each number that is not 0, in the order of the clusters.
func (n *counts) each(do func(cluster int64, times uint32) error) error {
	for _, k := range slices.Sorted(maps.Keys(n.pages)) {
		for in, times := range n.pages[k] {
			if times > 0 {
				if err := do(k*countsPerPage+int64(in), times); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// perBlock is how many clusters a block of reference counts is for.
func (c *checker) perBlock() int64 { return c.info.ClusterSize * 8 >> c.info.header.countOrder }

// count returns the reference count of a cluster.
func (c *checker) count(cluster int64) (uint64, error) {
	n := cluster / c.perBlock()
	if n >= int64(len(c.table)) || c.table[n] == 0 {
		return 0, nil
	}
	order := c.info.header.countOrder
	bit := cluster % c.perBlock() << order
	page, err := c.countPage(n, bit/8)
	if err != nil {
		return 0, err
	}
	return countIn(page, bit%(int64(len(page))*8), order), nil
}

// countPage returns the page with byte at of a block of reference counts.
func (c *checker) countPage(block, at int64) ([]byte, error) {
	size := min(pageBytes, c.info.ClusterSize)
	start := int64(c.table[block]) + at&^(size-1)
	return c.blocks.get(start, func() ([]byte, error) {
		p := make([]byte, size)
		return p, c.read(p, start, "a block of reference counts")
	})
}

// countIn returns the number of 2^order bits that begins at a bit of b (docs/spec/qcow2.md §4): numbers of less than a byte are
// packed from the least significant bit up, others are big-endian.
func countIn(b []byte, bit int64, order uint) uint64 {
	at := bit / 8
	switch order {
	case 4:
		return uint64(binary.BigEndian.Uint16(b[at:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(b[at:]))
	case 6:
		return binary.BigEndian.Uint64(b[at:])
	}
	return uint64(b[at]>>(bit%8)) & (1<<(1<<order) - 1)
}

// compare compares the references that were found with the counts.
func (c *checker) compare() error {
	err := c.uses.each(func(cluster int64, times uint32) error {
		n, err := c.count(cluster)
		switch {
		case err != nil:
			return err
		case n < uint64(times):
			c.problem(false, c.clusterPlace(cluster), "the reference count is %d, and there are %d references", n, times)
		case n > uint64(times):
			c.problem(true, c.clusterPlace(cluster), "the reference count is %d, and there are %d references", n, times)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return c.findUnused()
}

func (c *checker) clusterPlace(cluster int64) place {
	if len(c.report.Problems) == maxProblems { // it is not asked for
		return place{}
	}
	return whole(fmt.Sprintf("cluster at byte 0x%x", cluster<<c.bits))
}

// findUnused reports clusters of the file that are counted and not used at all.
func (c *checker) findUnused() error {
	order, size := c.info.header.countOrder, min(pageBytes, c.info.ClusterSize)
	for n, offset := range c.table {
		first := int64(n) * c.perBlock()
		if offset == 0 || first >= c.clusters {
			continue
		}
		for at := int64(0); at < c.info.ClusterSize; at += size {
			cluster := first + at*8>>order
			if cluster >= c.clusters {
				break
			}
			page, err := c.countPage(int64(n), at)
			if err != nil {
				return err
			}
			if block.IsZero(page) {
				continue
			}
			for bit := int64(0); bit < size*8 && cluster < c.clusters; bit, cluster = bit+1<<order, cluster+1 {
				if counted := countIn(page, bit, order); counted > 0 && c.uses.of(cluster) == 0 {
					c.problem(true, c.clusterPlace(cluster), "the reference count is %d, and nothing uses it", counted)
				}
			}
		}
	}
	return nil
}
