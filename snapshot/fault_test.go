package snapshot_test

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A way is how operations fail.
type way struct {
	name string
	err  error
	all  bool // that operation and all later ones of the disk
	odd  bool // that operation and every second of the later ones
}

var ways = []way{
	{name: "EIO", err: syscall.EIO},
	{name: "ENOSPC", err: syscall.ENOSPC},
	{name: "short", err: &blocktest.ShortError{Done: sector, Err: syscall.EIO}},
	{name: "dead from then on", err: syscall.EIO, all: true},
	{name: "every second from then on", err: syscall.EIO, odd: true},
}

// TestFaults fails each operation of each disk of each scenario, and holds what is reported to the user, and what it
// costs, against the rules in fault_call_test.go. Afterwards the disks are whole again: a merge is finished,
// everything is closed, and what is on the disks then, and what a power cut could have left, is asked all that
// check asks. Each operation fails in one way, in all ways when there is time.
func TestFaults(t *testing.T) { testFaults(t, newLab, 0) }

// TestFaultsBehindAPageCache is TestFaults where a failed flush leaves what was written readable, clean and not on the
// disk, and the next flush of the disk succeeds.
func TestFaultsBehindAPageCache(t *testing.T) { testFaults(t, newCachedLab, 1) }

// leftOut reports whether operation n does not fail in this test: with -short each fails in one of two tests, those with the
// numbers 0 and 1. The first one fails in both, which says whether a disk has any.
func leftOut(n, test int) bool { return testing.Short() && n > 1 && n%2 != test }

func testFaults(t *testing.T, newLab func(t *testing.T, sectors int) *lab, test int) {
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			total := 0
			for disk, took := -1, true; took || disk == 0; disk++ {
				took = false
				for n := 1; ; n += stride {
					if leftOut(n, test) {
						continue
					}
					k := faultsAt(t, newLab, sc, disk, n)
					if k == 0 {
						break
					}
					took, total = true, total+k
				}
			}
			t.Logf("%d faults", total)
		})
	}
}

// faultsAt fails operation n of one disk, and returns in how many runs it came to that.
func faultsAt(t *testing.T, newLab func(t *testing.T, sectors int) *lab, sc scenario, disk, n int) (total int) {
	for i, w := range ways {
		if !deep && i != n%len(ways) {
			continue
		}
		l := newLab(t, sc.size)
		l.inject = &injection{disk: disk, n: n, all: w.all, odd: w.odd, err: w.err}
		if l.faulted(t, sc) > 0 {
			total++
		}
		if t.Failed() {
			t.Fatalf("scenario %q, disk %d, operation %d, %s", sc.name, disk, n, w.name)
		}
	}
	return total
}

// TestFaultsWithoutRoom has each operation of each COW device find no space, once, where the policy is to
// protect the snapshots: what needs the space fails, on both sides, and no snapshot is lost by it. The rest
// is as in TestFaults.
func TestFaultsWithoutRoom(t *testing.T) { testFaultsWithoutRoom(t, newLab, 0) }

// TestFlushesWithoutRoom is TestFaultsWithoutRoom where flushes fail, and what they could not write is gone at once: the
// snapshots stay valid, and show nothing that is not their past.
func TestFlushesWithoutRoom(t *testing.T) { testFaultsWithoutRoom(t, newForgetfulLab, 1) }

func testFaultsWithoutRoom(t *testing.T, newLab func(t *testing.T, sectors int) *lab, test int) {
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			total := 0
			for disk, took := 0, true; took; disk++ {
				took = false
				for n := 1; ; n += stride {
					if leftOut(n, test) {
						continue
					}
					l := newLab(t, sc.size)
					l.inject = &injection{disk: disk, n: n, err: syscall.ENOSPC, keep: true}
					if l.faulted(t, sc) == 0 {
						break
					}
					if took, total = true, total+1; t.Failed() {
						t.Fatalf("scenario %q, disk %d, operation %d", sc.name, disk, n)
					}
				}
			}
			t.Logf("%d faults", total)
		})
	}
}

// faulted runs a scenario with its fault and then looks at what it came to. It returns how many operations
// failed.
func (l *lab) faulted(t *testing.T, sc scenario) int {
	sc.run(t, l)
	took := l.inject.took
	l.inject.all, l.inject.odd = false, false
	l.inject.n = -1 // the disks are whole again, but for what a failed flush spoilt
	if l.merge != nil {
		l.finish(0)
	}
	l.closeMerge()
	for _, c := range l.cows {
		c.close()
	}
	l.mu.Lock()
	m := l.freeze()
	m.cut = l.power.Cut()
	l.mu.Unlock()
	choices, most := blocktest.Choices{All: 16, Limit: 6, Random: 6, Seed: uint64(l.stamps)}, 1000
	if !deep {
		most = 2 // nothing that was not flushed, and everything
	}
	for img := range m.cut.Images(choices) {
		if most--; most < 0 {
			break
		}
		if err := m.check(img, deep); err != nil {
			t.Errorf("at the end, %v: %v", img, err)
			break
		}
	}
	if l.caches != nil && m.merged < 0 {
		if err := l.restart(m); err != nil {
			t.Errorf("started again, and cut: %v", err)
		}
	}
	return took
}

// restart has a new process take over at a moment, which opens the disks as the page caches show them, writes to all of
// the origin, and loses its power. What a snapshot was promised to show it shows afterwards, or it is invalid: what is in
// a cache and not on the disk was not trusted.
func (l *lab) restart(m *moment) error {
	l.inject = nil
	open := func(disk *blocktest.Crash) block.Device {
		l.caches[disk].Open().Flush() // a failure that was not reported yet is reported here
		return blocktest.NewFaulty(l.caches[disk].Open(), nil)
	}
	next := *m
	next.cows = nil
	o := snapshot.NewOrigin(open(m.disk))
	for i, p := range m.cows {
		dev := open(p.disk)
		if p.state == live || p.state == doubtful || p.state == dead {
			if _, err := o.Attach(dev, snapshot.Options{}); err != nil && !errors.Is(err, ondisk.ErrNoStore) {
				return fmt.Errorf("COW%d: %w", i, err)
			}
		}
		if p.state == live {
			p.state = doubtful // it may be full by now
		}
		next.cows = append(next.cows, p)
	}
	if _, err := o.WriteAt(make([]byte, o.Size()), 0); err != nil {
		return err
	}
	if err := o.Flush(); err != nil {
		return err
	}
	next.raw = make([][]stamp, len(m.raw))
	for i := range next.raw {
		next.raw[i] = []stamp{0}
	}
	for _, cache := range l.caches {
		cache.PowerCut()
	}
	return next.cutAgain(&l.power, blocktest.Choices{All: 4, Limit: 3, Random: 3})
}
