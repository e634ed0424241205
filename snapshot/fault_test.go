package snapshot_test

import (
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block/blocktest"
)

// A way is how operations fail.
type way struct {
	name string
	err  error
	all  bool // that operation and all later ones of the disk
}

var ways = []way{
	{"EIO", syscall.EIO, false},
	{"ENOSPC", syscall.ENOSPC, false},
	{"short", &blocktest.ShortError{Done: sector, Err: syscall.EIO}, false},
	{"dead from then on", syscall.EIO, true},
}

// TestFaults fails each operation of each disk of each scenario, and holds what the user is told, and what it
// costs, against the rules in fault_call_test.go. Afterwards the disks are whole again: a merge is finished,
// everything is closed, and what is on the disks then, and what a power cut could have left, is asked all that
// check asks. Each operation fails in one way, in all ways when there is time.
func TestFaults(t *testing.T) {
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			total := 0
			for disk, took := -1, true; took || disk == 0; disk++ {
				took = false
				for n := 1; ; n += stride {
					k := faultsAt(t, sc, disk, n)
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
func faultsAt(t *testing.T, sc scenario, disk, n int) (total int) {
	for i, w := range ways {
		if !deep && i != n%len(ways) {
			continue
		}
		l := newLab(t, sc.size)
		l.inject = &injection{disk: disk, n: n, all: w.all, err: w.err}
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
func TestFaultsWithoutRoom(t *testing.T) {
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			total := 0
			for disk, took := 0, true; took; disk++ {
				took = false
				for n := 1; ; n += stride {
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
	l.inject.all = false
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
	return took
}
