package block

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// memoryPage is the unit in which a Memory takes and gives back RAM, in bytes. It is small because chunks of 4 KiB
// scattered over a large device are the usual content.
const memoryPage = 4096

// memoryShards is the number of locks over which the pages of a Memory are spread, so that accesses
// to different pages rarely meet.
const memoryShards = 64

// Memory is a device in RAM. Pages that were never written take no space and read as zeros, so that a
// device of 1 TiB costs nothing until it is used.
//
// All methods may be called concurrently. A write is atomic within a page of 4096 bytes and not beyond. Flush has
// nothing to do: the content of a Memory is lost with its process; [blocktest.Crash] is the device that simulates a
// power cut.
//
// [blocktest.Crash]: https://pkg.go.dev/github.com/dmsnap/dmsnap/block/blocktest#Crash
type Memory struct {
	size   atomic.Int64
	shards [memoryShards]memoryShard
}

// memoryShard holds the pages whose number is the shard's index modulo memoryShards.
type memoryShard struct {
	mu    sync.RWMutex
	pages map[int64]*[memoryPage]byte
}

// NewMemory returns a device of size bytes that reads as zeros. A negative size panics.
func NewMemory(size int64) *Memory {
	if size < 0 {
		panic(fmt.Sprintf("block.NewMemory: size %d", size))
	}
	m := &Memory{}
	m.size.Store(size)
	return m
}

// MemoryFrom returns a device of len(content) bytes that holds a copy of content.
func MemoryFrom(content []byte) *Memory {
	m := NewMemory(int64(len(content)))
	if _, err := m.WriteAt(content, 0); err != nil {
		panic(err) // the range is the device's own
	}
	return m
}

// Bytes returns a copy of the whole content.
func (m *Memory) Bytes() []byte {
	p := make([]byte, m.Size())
	if _, err := m.ReadAt(p, 0); err != nil {
		panic(err) // as above, and the size never shrinks
	}
	return p
}

// Allocated returns the number of bytes of RAM taken by pages that were written.
func (m *Memory) Allocated() int64 {
	n := 0
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.RLock()
		n += len(s.pages)
		s.mu.RUnlock()
	}
	return int64(n) * memoryPage
}

// Size returns the size in bytes.
func (m *Memory) Size() int64 { return m.size.Load() }

// Flush does nothing, successfully.
func (m *Memory) Flush() error { return nil }

// ReadAt reads len(p) bytes at off; see [Device].
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	if err := CheckRange("read", off, int64(len(p)), m.Size()); err != nil {
		return 0, err
	}
	for done := 0; done < len(p); {
		s, page, at := m.locate(off + int64(done))
		n := min(len(p)-done, memoryPage-at)
		s.mu.RLock()
		if b := s.pages[page]; b != nil {
			copy(p[done:done+n], b[at:])
		} else {
			clear(p[done : done+n])
		}
		s.mu.RUnlock()
		done += n
	}
	return len(p), nil
}

// WriteAt writes p at off; see [Device].
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	if err := CheckRange("write", off, int64(len(p)), m.Size()); err != nil {
		return 0, err
	}
	for done := 0; done < len(p); {
		s, page, at := m.locate(off + int64(done))
		n := min(len(p)-done, memoryPage-at)
		s.mu.Lock()
		b := s.pages[page]
		if b == nil {
			if s.pages == nil {
				s.pages = make(map[int64]*[memoryPage]byte)
			}
			b = new([memoryPage]byte)
			s.pages[page] = b
		}
		copy(b[at:], p[done:done+n])
		s.mu.Unlock()
		done += n
	}
	return len(p), nil
}

// WriteDurableAt is WriteAt: RAM knows no difference.
func (m *Memory) WriteDurableAt(p []byte, off int64) error {
	_, err := m.WriteAt(p, off)
	return err
}

// ZeroAt drops the pages that lie wholly in the range and clears what it has of the others. With
// KeepAllocated it is [ErrNotFast], since pages that are not there yet must be made.
func (m *Memory) ZeroAt(off, n int64, flags ZeroFlags) error {
	if err := CheckRange("zero", off, n, m.Size()); err != nil {
		return err
	}
	if flags&KeepAllocated != 0 {
		return ErrNotFast
	}
	end := off + n
	if n/memoryPage > memoryShards {
		off = m.dropPages(off, end)
	}
	for off < end {
		s, page, at := m.locate(off)
		n := min(end-off, int64(memoryPage-at))
		s.mu.Lock()
		if n == memoryPage {
			delete(s.pages, page)
		} else if b := s.pages[page]; b != nil {
			clear(b[at : at+int(n)])
		}
		s.mu.Unlock()
		off += n
	}
	return nil
}

// dropPages drops the pages wholly in [off, end) by walking the pages that exist: zeroing most of a
// sparse terabyte must not take as many steps as it has pages. It clears the short piece before the
// first whole page and returns where the rest begins.
func (m *Memory) dropPages(off, end int64) int64 {
	first := off/memoryPage + min(1, off%memoryPage)
	last := end / memoryPage // not included
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.Lock()
		for page := range s.pages {
			if first <= page && page < last {
				delete(s.pages, page)
			}
		}
		s.mu.Unlock()
	}
	if off < first*memoryPage {
		s, page, at := m.locate(off)
		s.mu.Lock()
		if b := s.pages[page]; b != nil {
			clear(b[at:])
		}
		s.mu.Unlock()
	}
	return last * memoryPage
}

// Discard zeroes the range, which gives back its whole pages.
func (m *Memory) Discard(off, n int64) error {
	if err := CheckRange("discard", off, n, m.Size()); err != nil {
		return err
	}
	return m.ZeroAt(off, n, 0)
}

// memoryExtentPages bounds the pages one call of Extents looks at: it stops early in a larger range.
const memoryExtentPages = 1 << 16

// jumpAfter is how many pages of a hole Extents looks at one by one.
const jumpAfter = 256

// Extents reports written pages as data, and pages that were never written or were dropped as holes. A call looks at no
// more than 256 MiB of written pages; a longer hole ends it.
func (m *Memory) Extents(off, n int64) ([]Extent, error) {
	if err := CheckRange("extents", off, n, m.Size()); err != nil {
		return nil, err
	}
	var list []Extent
	end := off + n
	for looked := 0; off < end && looked < memoryExtentPages; looked++ {
		if k := len(list) - 1; k >= 0 && list[k].Flags != 0 && list[k].Length > jumpAfter*memoryPage {
			list[k].Length += m.nextWritten(off, end) - off
			break
		}
		s, page, at := m.locate(off)
		piece := Extent{Length: min(end-off, int64(memoryPage-at))}
		s.mu.RLock()
		if s.pages[page] == nil {
			piece.Flags = Hole | ReadsZero
		}
		s.mu.RUnlock()
		off += piece.Length
		if k := len(list) - 1; k >= 0 && list[k].Flags == piece.Flags {
			list[k].Length += piece.Length
		} else {
			list = append(list, piece)
		}
	}
	return list, nil
}

// nextWritten returns where the first written page begins that is in [off, end), or end; off is where a page begins.
func (m *Memory) nextWritten(off, end int64) int64 {
	next := end
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.RLock()
		for page := range s.pages {
			if at := page * memoryPage; at >= off && at < next {
				next = at
			}
		}
		s.mu.RUnlock()
	}
	return next
}

// Refresh returns the size, which only Grow changes.
func (m *Memory) Refresh() (int64, error) { return m.Size(), nil }

// Grow makes the device at least size bytes long.
func (m *Memory) Grow(size int64) error {
	for {
		old := m.size.Load()
		if size <= old || m.size.CompareAndSwap(old, size) {
			return nil
		}
	}
}

// locate returns the shard and number of the page that holds byte off, and off's place in the page.
func (m *Memory) locate(off int64) (s *memoryShard, page int64, at int) {
	page = off / memoryPage
	return &m.shards[page%memoryShards], page, int(off % memoryPage)
}
