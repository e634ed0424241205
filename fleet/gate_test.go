package fleet

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// While a gate is locked no change is in flight, from several goroutines.
func TestGateExcludes(t *testing.T) {
	var gates [2]changeGate
	var inside, locked atomic.Int64
	var all sync.WaitGroup
	for i := range 8 {
		g := &gates[i%2]
		all.Go(func() {
			for range 5000 {
				g.RLock()
				inside.Add(1)
				if locked.Load() != 0 {
					t.Error("a change while the gates are locked")
				}
				inside.Add(-1)
				g.RUnlock()
			}
		})
	}
	for range 3 {
		all.Go(func() {
			for range 50 {
				lockGates([]*changeGate{&gates[0], &gates[1]})
				if locked.Add(1) != 1 || inside.Load() != 0 {
					t.Error("locked twice, or with a change in flight")
				}
				locked.Add(-1)
				gates[0].Unlock()
				gates[1].Unlock()
			}
		})
	}
	all.Wait()
	for i := range gates {
		if n := gates[i].state.Load(); n != 0 {
			t.Errorf("state %d in the end", n)
		}
	}
}

// A change that takes long delays others for no longer than a grace, until locking has been tried for long enough; then it
// is waited for.
func TestGateGrace(t *testing.T) {
	for _, slow := range []time.Duration{0, 500 * time.Millisecond, 10 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			var g changeGate
			g.RLock()
			time.AfterFunc(slow, g.RUnlock)
			stop := make(chan struct{})
			var longest atomic.Int64
			var others sync.WaitGroup
			others.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(100 * time.Microsecond):
					}
					begin := time.Now()
					g.RLock()
					longest.Store(max(longest.Load(), int64(time.Since(begin))))
					g.RUnlock()
				}
			})
			begin := time.Now()
			closed, waited := lockGates([]*changeGate{&g})
			took := time.Since(begin)
			g.Unlock()
			synctest.Wait()
			close(stop)
			others.Wait()
			if took < slow || took > slow+2*longGrace || waited > longGrace {
				t.Errorf("a change of %v: locked after %v, others waited %v in tries", slow, took, waited)
			}
			most := longGrace
			if slow > graceInsist {
				most = slow - graceInsist + 2*longGrace
			}
			if n := time.Duration(longest.Load()); n > most {
				t.Errorf("a change of %v: others waited %v (closed for %v)", slow, n, time.Since(closed))
			}
		})
	}
}
