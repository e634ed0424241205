package qcow2

import (
	"container/list"
	"sync"
)

// A cache keeps blocks of bytes that were expensive to get, the most recently used ones, up to a number of bytes.
// Concurrent requests for one missing block get it once. The bytes returned must not be changed.
type cache struct {
	limit int64

	mu    sync.Mutex
	bytes int64
	items map[int64]*list.Element
	order *list.List // of *item, most recently used first
}

type item struct {
	key   int64
	done  chan struct{} // closed when bytes and err are set
	bytes []byte
	err   error
	kept  bool // its bytes count in cache.bytes
}

func newCache(limit int64) *cache {
	return &cache{limit: limit, items: map[int64]*list.Element{}, order: list.New()}
}

// get returns the block of a key, by get where it is not cached. Errors are not cached.
func (c *cache) get(key int64, get func() ([]byte, error)) ([]byte, error) {
	c.mu.Lock()
	if e := c.items[key]; e != nil {
		c.order.MoveToFront(e)
		c.mu.Unlock()
		it := e.Value.(*item)
		<-it.done
		return it.bytes, it.err
	}
	it := &item{key: key, done: make(chan struct{})}
	e := c.order.PushFront(it)
	c.items[key] = e
	c.mu.Unlock()

	it.bytes, it.err = get()
	close(it.done)

	c.mu.Lock()
	defer c.mu.Unlock()
	if it.err != nil {
		c.remove(e)
		return nil, it.err
	}
	c.bytes, it.kept = c.bytes+int64(len(it.bytes)), true
	for back := c.order.Back(); back != nil && c.bytes > c.limit; {
		before := back.Prev()
		if old := back.Value.(*item); old.kept && old != it {
			c.bytes -= int64(len(old.bytes))
			c.remove(back)
		}
		back = before
	}
	return it.bytes, nil
}

func (c *cache) remove(e *list.Element) {
	c.order.Remove(e)
	delete(c.items, e.Value.(*item).key)
}
