package blocktest

import (
	"maps"
	"slices"
	"sync"

	"github.com/dmsnap/dmsnap/block"
)

// cachePage is the unit of a PageCache, in bytes.
const cachePage = 4096

// cacheRun is the most that a PageCache writes to its disk at once, in bytes.
const cacheRun = 256 << 10

// A PageCache is a file or block device behind Linux' page cache, which outlives the processes that have it open. What
// it does when the disk fails is what Linux does (fsync(2), and the file systems' documentation):
//
//   - A write changes pages in memory and succeeds. The pages are dirty.
//   - A flush writes the dirty pages to the disk. A page that can't be written becomes clean anyway: reads go on
//     showing it, no later flush writes it, and it is gone when the page is dropped or the power fails.
//   - Each failure is reported once to each open file that was there, by its next flush, and to the next file opened
//     if it was not reported. The flush after that succeeds.
//   - A process that opens the file later reads what is cached, written to the disk or not.
//
// So a flush that succeeds after one that failed says nothing, and what was found on opening may not be on the disk.
// Each opening is a [CachedFile]. All methods may be called concurrently.
type PageCache struct {
	mu     sync.Mutex
	disk   block.Device
	decide Decide
	count  int
	pages  map[int64]*page // by offset / cachePage

	forgets  bool  // see ForgetLost
	failures int   // counted
	failed   error // the last one
	reported bool  // to some open file
}

// page is what memory has of a page. Without one, memory has what the disk has.
type page struct {
	data  [cachePage]byte
	dirty bool
}

// NewPageCache returns a page cache over a disk. decide is asked before each run of dirty pages is written (a Write), and
// before each flush begins (a Flush; WriteDurable for the flush of a durable write). When it fails a flush, none of the
// dirty pages that the flush was to write is written.
func NewPageCache(disk block.Device, decide Decide) *PageCache {
	return &PageCache{disk: disk, decide: decide, pages: make(map[int64]*page)}
}

// Set replaces the function that decides.
func (c *PageCache) Set(decide Decide) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.decide = decide
}

// Open opens the file.
func (c *PageCache) Open() *CachedFile {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := &CachedFile{Forward: block.NewForward(c.disk), cache: c, seen: c.failures}
	if c.failed != nil && !c.reported {
		f.seen--
	}
	return f
}

// ForgetLost has pages that could not be written dropped at once, as the kernel may: then reads show what the disk has.
func (c *PageCache) ForgetLost() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgets = true
}

// lose makes pages clean that were not written. mu is held.
func (c *PageCache) lose(list []int64) {
	for _, k := range list {
		if c.pages[k].dirty = false; c.forgets {
			delete(c.pages, k)
		}
	}
}

// PowerCut forgets all that memory has: what is left is on the disk.
func (c *PageCache) PowerCut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.pages)
}

// WriteBack writes the dirty pages to the disk, as the kernel does when it pleases. A failure is reported by the next
// flush.
func (c *PageCache) WriteBack() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writePages(0, c.disk.Size())
}

// Dirty returns how many bytes wait to be written.
func (c *PageCache) Dirty() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return int64(len(c.dirty(0, c.disk.Size()))) * cachePage
}

// admit counts an operation and returns what was decided. mu is held.
func (c *PageCache) admit(op Op) error {
	c.count++
	op.N = c.count
	if c.decide == nil {
		return nil
	}
	return c.decide(op)
}

// fail notes a failure for those who have the file open. mu is held.
func (c *PageCache) fail(err error) {
	c.failures++
	c.failed, c.reported = err, false
}

// touches reports whether page k has a byte of a range.
func touches(k, off, n int64) bool { return n > 0 && off/cachePage <= k && k <= (off+n-1)/cachePage }

// dirty lists the dirty pages of a range in order. mu is held.
func (c *PageCache) dirty(off, n int64) []int64 {
	var list []int64
	for _, k := range slices.Sorted(maps.Keys(c.pages)) {
		if c.pages[k].dirty && touches(k, off, n) {
			list = append(list, k)
		}
	}
	return list
}

// writePages writes the dirty pages of a range to the disk, adjacent ones together. Afterwards they are clean, written
// or not. mu is held.
func (c *PageCache) writePages(off, n int64) {
	list := c.dirty(off, n)
	for len(list) > 0 {
		k := 1
		for k < len(list) && list[k] == list[0]+int64(k) && k < cacheRun/cachePage {
			k++
		}
		var run []byte
		for _, p := range list[:k] {
			c.pages[p].dirty = false
			run = append(run, c.pages[p].data[:]...)
		}
		at := list[0] * cachePage
		run = run[:min(int64(len(run)), c.disk.Size()-at)]
		err := c.admit(Op{Kind: Write, Off: at, Len: int64(len(run))})
		if err == nil {
			_, err = c.disk.WriteAt(run, at)
		}
		if err != nil {
			c.lose(list[:k])
			c.fail(err)
		}
		list = list[k:]
	}
}

// flush writes the dirty pages of a range and flushes the disk. mu is held.
func (c *PageCache) flush(op Op, off, n int64) {
	if err := c.admit(op); err != nil {
		c.lose(c.dirty(off, n))
		c.fail(err)
		return
	}
	c.writePages(off, n)
	if err := c.disk.Flush(); err != nil {
		c.fail(err)
	}
}

// change lets fill change n > 0 bytes at off, page by page: it gets each page's part, and where in the range that is.
// mu is held.
func (c *PageCache) change(off, n int64, fill func(part []byte, at int64)) error {
	for done := int64(0); done < n; {
		k, in := (off+done)/cachePage, (off+done)%cachePage
		m := min(n-done, cachePage-in)
		p := c.pages[k]
		if p == nil {
			p = new(page)
			if m < cachePage { // the rest of the page is the disk's
				whole := p.data[:min(cachePage, c.disk.Size()-k*cachePage)]
				if _, err := c.disk.ReadAt(whole, k*cachePage); err != nil {
					return err
				}
			}
			c.pages[k] = p
		}
		fill(p.data[in:in+m], done)
		p.dirty = true
		done += m
	}
	return nil
}

// A CachedFile is one opening of the file behind a PageCache: an open file description. It passes on to the disk what
// the cache has no part in. A failure is reported once; block.File keeps it.
type CachedFile struct {
	block.Forward
	cache *PageCache
	seen  int // of the cache's failures, those that were reported to this file or are older than it
}

// report returns the failure that was not reported to f yet. The cache's mu is held.
func (f *CachedFile) report() error {
	c := f.cache
	if f.seen == c.failures {
		return nil
	}
	f.seen, c.reported = c.failures, true
	return c.failed
}

// ReadCached does nothing: every read is one call of ReadAt.
func (f *CachedFile) ReadCached([]block.Read) int { return 0 }

// ReadAt reads what memory has over what the disk has.
func (f *CachedFile) ReadAt(p []byte, off int64) (int, error) {
	c := f.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	n, err := c.disk.ReadAt(p, off)
	if err != nil {
		return n, err
	}
	end := off + int64(len(p))
	for k := off / cachePage; touches(k, off, end-off); k++ {
		if page := c.pages[k]; page != nil {
			start := k * cachePage
			from, to := max(off-start, 0), min(end-start, cachePage)
			copy(p[start+from-off:], page.data[from:to])
		}
	}
	return n, nil
}

// WriteAt changes pages in memory.
func (f *CachedFile) WriteAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange("write", off, int64(len(p)), f.Size()); err != nil {
		return 0, err
	}
	f.cache.mu.Lock()
	defer f.cache.mu.Unlock()
	err := f.cache.change(off, int64(len(p)), func(part []byte, at int64) { copy(part, p[at:]) })
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteDurableAt changes pages in memory, and flushes those.
func (f *CachedFile) WriteDurableAt(p []byte, off int64) error {
	if _, err := f.WriteAt(p, off); err != nil {
		return err
	}
	f.cache.mu.Lock()
	defer f.cache.mu.Unlock()
	n := int64(len(p))
	f.cache.flush(Op{Kind: WriteDurable, Off: off, Len: n}, off, n)
	return f.report()
}

// WriteLastAt writes and flushes, a second time when the first flush fails: it may have reported an older failure; see
// block.LastWriter.
func (f *CachedFile) WriteLastAt(p []byte, off int64) error {
	var err error
	for range 2 {
		if _, err = f.WriteAt(p, off); err != nil {
			return err
		}
		if err = f.Flush(); err == nil {
			return nil
		}
	}
	return err
}

// Flush flushes all pages. It fails when a write failed that was not reported to this file yet.
func (f *CachedFile) Flush() error {
	f.cache.mu.Lock()
	defer f.cache.mu.Unlock()
	f.cache.flush(Op{Kind: Flush}, 0, f.Size())
	return f.report()
}

// BeginFlush writes the dirty pages of a range to the disk, without flushing that.
func (f *CachedFile) BeginFlush(off, n int64) {
	f.cache.mu.Lock()
	defer f.cache.mu.Unlock()
	f.cache.writePages(off, n)
}

// ZeroAt is ErrNotFast: zeros are written.
func (f *CachedFile) ZeroAt(off, n int64, flags block.ZeroFlags) error { return block.ErrNotFast }

// Discard does nothing.
func (f *CachedFile) Discard(off, n int64) error {
	return block.CheckRange("discard", off, n, f.Size())
}

// Extents says that all is data.
func (f *CachedFile) Extents(off, n int64) ([]block.Extent, error) {
	if err := block.CheckRange("extents", off, n, f.Size()); err != nil {
		return nil, err
	}
	return []block.Extent{{Length: n}}, nil
}

// DropCache forgets the clean pages of a range, also those that are not on the disk.
func (f *CachedFile) DropCache(off, n int64) error {
	if err := block.CheckRange("drop cache", off, n, f.Size()); err != nil {
		return err
	}
	f.cache.mu.Lock()
	defer f.cache.mu.Unlock()
	for k, p := range f.cache.pages {
		if !p.dirty && touches(k, off, n) {
			delete(f.cache.pages, k)
		}
	}
	return nil
}
