// Package lines writes long lists: items are formatted on all processors and written in their order.
//
//	n, err := lines.Write(ctx, w, items, func(b []byte, i Item) []byte { return append(b, i.Text()...) })
package lines

import (
	"context"
	"io"
	"iter"
	"runtime"
	"sync"
)

// batch is how many items are formatted at once: enough that handing them over costs little, and few in memory.
const batch = 4096

// A part is a batch on its way.
type part[T any] struct {
	items []T
	text  []byte
	done  chan struct{} // gets a value when text is complete
}

// Write appends each item by format to a buffer, and writes the buffers to w. format is called concurrently. It returns how many
// items there were, and ends early with the cause of ctx or an error of w.
func Write[T any](ctx context.Context, w io.Writer, items iter.Seq[T], format func(b []byte, item T) []byte) (n uint64, err error) {
	workers := runtime.GOMAXPROCS(0)
	work := make(chan *part[T], 2*workers)
	order := make(chan *part[T], 2*workers)
	unused := make(chan *part[T], 4*workers)
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for p := range work {
				for _, item := range p.items {
					p.text = format(p.text, item)
				}
				p.done <- struct{}{}
			}
		})
	}
	var failed error
	stopped := make(chan struct{}) // closed when a write failed
	all.Go(func() {
		for p := range order {
			<-p.done
			if failed == nil {
				if _, failed = w.Write(p.text); failed != nil {
					close(stopped)
				}
			}
			p.items, p.text = p.items[:0], p.text[:0]
			select {
			case unused <- p:
			default:
			}
		}
	})
	p := take(unused)
	for item := range items {
		if p.items = append(p.items, item); len(p.items) < batch {
			continue
		}
		n += batch
		work <- p
		order <- p
		p = take(unused)
		if err = context.Cause(ctx); err != nil || isClosed(stopped) {
			break
		}
	}
	n += uint64(len(p.items))
	work <- p
	order <- p
	close(work)
	close(order)
	all.Wait()
	if failed != nil {
		err = failed
	}
	return n, err
}

func take[T any](unused chan *part[T]) *part[T] {
	select {
	case p := <-unused:
		return p
	default:
		return &part[T]{done: make(chan struct{}, 1)}
	}
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
