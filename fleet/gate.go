package fleet

import (
	"sync"
	"sync/atomic"
	"time"
)

// A changeGate lets changes to a node through until it is locked, which waits until those in flight are done. It is a
// sync.RWMutex whose Lock does not delay all changes for as long as the slowest one in flight takes, for example one that
// waits for its file system: it opens again after a grace, and tries later.
//
// RLock may not be called again before RUnlock by a goroutine that has it. The zero value is open.
type changeGate struct {
	state   atomic.Int64                  // changes in flight, and gateClosed
	opened  atomic.Pointer[chan struct{}] // closed when the gate is opened
	drained chan struct{}                 // has space for one: the last change in flight is done; guarded by locking
	locking sync.Mutex                    // held from Lock to Unlock
}

const gateClosed = 1 << 62

// The first and the longest grace, and for how long locking is tried before it waits for what is in flight.
const (
	firstGrace  = time.Millisecond
	longGrace   = 4 * time.Millisecond
	graceInsist = time.Second
)

// RLock begins a change, which waits while the gate is closed.
func (g *changeGate) RLock() {
	for g.state.Add(1) > gateClosed {
		opened := *g.opened.Load() // of this closing, or of a later one
		g.RUnlock()
		<-opened
	}
}

// RUnlock ends a change.
func (g *changeGate) RUnlock() {
	if g.state.Add(-1) == gateClosed {
		select {
		case g.drained <- struct{}{}:
		default:
		}
	}
}

// close closes the gate.
func (g *changeGate) close() {
	opened := make(chan struct{})
	g.opened.Store(&opened)
	g.state.Add(gateClosed)
}

func (g *changeGate) open() {
	opened := *g.opened.Load()
	g.state.Add(-gateClosed)
	close(opened)
}

// drain waits until no change is in flight, false: not before the timer fires. The gate is closed.
func (g *changeGate) drain(timer <-chan time.Time) bool {
	for g.state.Load() != gateClosed {
		select {
		case <-g.drained:
		case <-timer:
			return g.state.Load() == gateClosed
		}
	}
	return true
}

// Lock locks the gate: no change is in flight, and none begins until Unlock.
func (g *changeGate) Lock() { lockGates([]*changeGate{g}) }

// Unlock opens the gate.
func (g *changeGate) Unlock() {
	g.open()
	g.locking.Unlock()
}

// lockGates locks all gates, in this order. closed is when the gates were closed last, and waited how long changes waited at
// most before, in tries that failed.
func lockGates(gates []*changeGate) (closed time.Time, waited time.Duration) {
	for _, g := range gates {
		g.locking.Lock()
		if g.drained == nil {
			g.drained = make(chan struct{}, 1)
		}
	}
	begin := time.Now()
	for grace := firstGrace; ; grace = min(2*grace, longGrace) {
		closed = time.Now()
		var timer <-chan time.Time // nil: insist
		if closed.Sub(begin) < graceInsist {
			timer = time.After(grace)
		}
		if tryGates(gates, timer) {
			return closed, waited
		}
		waited = max(waited, time.Since(closed))
		time.Sleep(grace)
	}
}

// tryGates closes gates and waits until no change is in flight. When the timer fires before, it opens them again.
func tryGates(gates []*changeGate, timer <-chan time.Time) bool {
	for _, g := range gates {
		g.close()
	}
	for _, g := range gates {
		if !g.drain(timer) {
			for _, g := range gates {
				g.open()
			}
			return false
		}
	}
	return true
}
