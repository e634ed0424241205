package ondemand

import (
	"context"
	"sync"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/layer"
	"github.com/dmsnap/dmsnap/source/cache"
	"github.com/dmsnap/dmsnap/source/remote"
)

// An index is that of a disk. Pages that are used often stay in memory.
type index struct {
	d      *Disk
	tree   *layer.Tree
	remote *remote.Blob
	cache  *cache.Blob
	leaves int64
	first  int64 // number of the first page that is received with the root

	mu     sync.RWMutex
	pages  map[int64][]byte // verified
	start  map[int64][]byte // pages that lead to the start of the disk, not verified
	top    []byte           // pages from first on, not verified
	ahead  []byte           // leaves that were received and are not verified
	from   int64            // number of the first of them
	last   int64            // leaf that was received last
	streak int64            // leaves that were received in order
}

const (
	mostPages  = 4096 // 16 MiB
	aheadPages = 32
	mostAhead  = 256 // for who reads all of it
	smallIndex = 8   // pages; it is received as a whole
)

func (d *Disk) openIndex(x layer.Index, layers []layer.Layer, c *cache.Cache) (*index, error) {
	tree, err := layer.NewTree(x, d.size, layers)
	if err != nil {
		return nil, block.WithPath(d.name, err)
	}
	kept, err := c.Blob(cache.Index, x.Digest, d.name)
	if err != nil {
		return nil, err
	}
	i := &index{d: d, tree: tree, remote: d.repo.Blob(x.Blob), cache: kept, leaves: tree.Leaves(), pages: map[int64][]byte{},
		start: map[int64][]byte{}}
	if i.root() >= smallIndex {
		i.first = i.root() - 1 // which leads to the end of the disk: programs that look for signatures read that, too
	}
	return i, nil
}

// root is the number of the last page.
func (x *index) root() int64 { return x.remote.Size()/layer.PageBytes - 1 }

// load returns a page of the disk's index.
func (r *request) load(id layer.PageID) ([]byte, error) { return r.d.index.load(r, id) }

func (x *index) load(r *request, id layer.PageID) ([]byte, error) {
	x.mu.RLock()
	b := x.pages[id.Number]
	x.mu.RUnlock()
	if b != nil {
		return b, nil
	}
	b = make([]byte, layer.PageBytes)
	if !x.cached(id, b) {
		var err error
		if b, err = x.fetch(r.context(), id); err != nil {
			return nil, err
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for n := range x.pages {
		if len(x.pages) < mostPages {
			break
		}
		delete(x.pages, n) // any of them
	}
	x.pages[id.Number] = b
	return b, nil
}

// cached reads a page from the cache.
func (x *index) cached(id layer.PageID, b []byte) bool {
	return x.cache.Read(b, id.Number, 0, len(b), id.Digest) && id.Check(b) == nil
}

// receiveStart begins to receive the pages below the root that lead to the start of the disk, which is read first as a rule: they follow each
// other in the tree, but can be requested side by side. A failure is that of the request that needs the page.
func (x *index) receiveStart(ctx context.Context) (wait func()) {
	var running sync.WaitGroup
	for _, number := range x.tree.FirstPages() {
		if number >= x.first {
			break // it comes with the root
		}
		running.Go(func() {
			b := make([]byte, layer.PageBytes)
			if x.receive(ctx, b, number) != nil {
				return
			}
			x.mu.Lock()
			defer x.mu.Unlock()
			x.start[number] = b
		})
	}
	return running.Wait
}

// receive makes one request for pages from a number on.
func (x *index) receive(ctx context.Context, pages []byte, number int64) error {
	if err := x.remote.ReadRange(ctx, pages, number*layer.PageBytes); err != nil {
		return err
	}
	x.d.requests.Add(1)
	x.d.received.Add(int64(len(pages)))
	return nil
}

// fetch receives a page: with the root those that lead to the start and to the end of the disk, and with leaves in order some that follow.
func (x *index) fetch(ctx context.Context, id layer.PageID) ([]byte, error) {
	release, err := claim(ctx, x.cache, id.Number, 1)
	if err != nil {
		return nil, err
	}
	defer release()
	b := make([]byte, layer.PageBytes)
	if x.cached(id, b) {
		return b, nil
	}
	if x.received(id, b) {
		x.cache.Put(id.Number, b, id.Digest)
		return b, nil
	}
	for n := 1; ; n++ {
		from, count := id.Number, x.together(id.Number)
		wait := func() {}
		if id.Number == x.root() {
			from, count = x.first, x.root()-x.first+1
			wait = x.receiveStart(ctx)
		}
		pages := make([]byte, count*layer.PageBytes)
		err := x.receive(ctx, pages, from)
		if wait(); err != nil {
			return nil, err
		}
		copy(b, pages[(id.Number-from)*layer.PageBytes:])
		if err = id.Check(b); err == nil {
			x.keep(id.Number, pages)
			x.cache.Put(id.Number, b, id.Digest)
			return b, nil
		}
		if n == verifyAttempts {
			return nil, err
		}
	}
}

// received copies a page that was received with an earlier one.
func (x *index) received(id layer.PageID, b []byte) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	from, pages := x.from, x.ahead
	if id.Number >= x.first && x.top != nil {
		from, pages = x.first, x.top
	} else if x.start[id.Number] != nil {
		from, pages = id.Number, x.start[id.Number]
	}
	at := (id.Number - from) * layer.PageBytes
	if at < 0 || at >= int64(len(pages)) {
		return false
	}
	copy(b, pages[at:])
	return id.Check(b) == nil
}

// together is how many pages to receive at once.
func (x *index) together(number int64) int64 {
	x.mu.RLock()
	defer x.mu.RUnlock()
	if number >= x.leaves || number != x.last+1 || x.streak < 1 {
		return 1
	}
	if x.streak < 3 {
		return min(aheadPages, x.leaves-number)
	}
	return min(mostAhead, x.leaves-number)
}

// keep remembers which pages were received.
func (x *index) keep(number int64, pages []byte) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if number == x.root() {
		x.top = pages
	}
	if number >= x.leaves {
		return
	}
	n := int64(len(pages) / layer.PageBytes)
	if number == x.last+1 {
		x.streak++
	} else {
		x.streak = 0
	}
	x.last = number + n - 1
	if n > 1 {
		x.ahead, x.from = pages, number
	}
}
