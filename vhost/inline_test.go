package vhost_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/inline"
)

// gated is a device whose reads of the first block wait while it is closed.
type gated struct {
	*block.Memory
	closed  atomic.Bool
	waiting chan struct{} // gets a value when a read waits
	open    chan struct{}
}

func (g *gated) ReadAt(p []byte, off int64) (int, error) {
	if off == 0 && g.closed.Load() {
		g.waiting <- struct{}{}
		<-g.open
	}
	return g.Memory.ReadAt(p, off)
}

// TestOverdueInlineRequest: requests that have been quick are executed by the goroutine that fetches; when one then does not end,
// others are served, and the ring can be stopped after it has ended.
func TestOverdueInlineRequest(t *testing.T) {
	g := &gated{Memory: block.NewMemory(1 << 20), waiting: make(chan struct{}, 1), open: make(chan struct{})}
	if _, err := g.Memory.WriteAt(blocktest.Pattern(1<<20, 1), 0); err != nil {
		t.Fatal(err)
	}
	_, path := serve(t, g, nil)
	c := connect(t, path)
	b := make([]byte, 4096)
	for range 2 {
		for range 3 * inline.TrialLength {
			c.want(0, 0, 8, b, false)
			c.want(0, 1, 16, b, true)
		}
		g.closed.Store(true)
		late := make(chan error, 1)
		go func() {
			p := make([]byte, 4096)
			late <- c.ok(c.do(0, 0, p, false))
		}()
		<-g.waiting
		for range 3 * inline.TrialLength {
			c.want(0, 0, 8, b, false)
		}
		c.want(0, 4, 0, nil, false)
		g.closed.Store(false)
		g.open <- struct{}{}
		select {
		case err := <-late:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(time.Minute):
			t.Fatal("the late request was not completed")
		}
	}
}
