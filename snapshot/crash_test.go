package snapshot_test

import (
	"fmt"
	"hash/maphash"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dmsnap/dmsnap/block/blocktest"
)

// depth asks for what takes longer than a commit waits: make deep has 1, larger ones show more images.
var depth, _ = strconv.Atoi(os.Getenv("DMSNAP_DEEP"))

var deep = depth > 0

// TestCrash cuts the power after every operation of every scenario, and after every call, and looks at what
// the disks could then hold: all, nothing, prefixes, single sectors missing or alone, and random subsets of
// what was not flushed; every subset where there are few. Each image is asked everything that check asks.
func TestCrash(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	choices := blocktest.Choices{All: 16, Limit: 6, Random: 4}
	if deep {
		choices = blocktest.Choices{All: 1 << 12, Random: 3500}
	}
	var all atomic.Int64
	for _, sc := range slices.Concat(scenarios, writeBackScenarios, races) {
		t.Run(sc.name, func(t *testing.T) {
			x := explore(t, choices)
			l := newLab(t, sc.size)
			l.watch = x.add
			l.look("the beginning")
			sc.run(t, l)
			x.wait()
			t.Logf("%d moments, %d images, %d different ones, 1 in %d looked at, none wrong", x.moments, x.images.Load(), x.different.Load(), oneIn)
			all.Add(x.different.Load())
		})
	}
	t.Logf("%d different images looked at in all", all.Load()/oneIn)
}

// TestScenariosAreInTheDocuments: docs/durability.md names its evidence by scenario.
func TestScenariosAreInTheDocuments(t *testing.T) {
	b, err := os.ReadFile("../docs/durability.md")
	if err != nil {
		t.Fatal(err)
	}
	page := strings.Join(strings.Fields(string(b)), " ")
	for _, sc := range slices.Concat(scenarios, writeBackScenarios, races) {
		if !strings.Contains(page, `"`+sc.name+`"`) {
			t.Errorf("scenario %q is not named", sc.name)
		}
	}
}

// An explorer checks the images of moments, in goroutines of its own.
type explorer struct {
	t         *testing.T
	choices   blocktest.Choices
	moments   int
	todo      chan *moment
	workers   sync.WaitGroup
	images    atomic.Int64
	different atomic.Int64
	failed    atomic.Bool
	seed      maphash.Seed
	seen      sync.Map // by hash of epoch and disks
}

func explore(t *testing.T, choices blocktest.Choices) *explorer {
	x := &explorer{t: t, choices: choices, todo: make(chan *moment, 16), seed: maphash.MakeSeed()}
	for range runtime.GOMAXPROCS(0) {
		x.workers.Go(func() {
			for m := range x.todo {
				x.look(m)
			}
		})
	}
	t.Cleanup(x.wait) // also when the scenario ends early
	return x
}

func (x *explorer) add(m *moment) {
	x.moments++
	x.todo <- m
}

// wait waits until all moments were looked at.
func (x *explorer) wait() {
	if x.todo != nil {
		close(x.todo)
		x.todo = nil
	}
	x.workers.Wait()
}

// look checks the images of one moment, until one is wrong.
func (x *explorer) look(m *moment) {
	choices := x.choices
	choices.Seed = uint64(m.n)
	if m.n%oneIn == 0 {
		killed := blocktest.Choices{All: 8, Limit: 3, Random: 3 + 20*depth, Seed: uint64(m.n)}
		if err := m.afterKill(killed); err != nil && !x.failed.Swap(true) {
			x.t.Errorf("killed at %d, after %s, and cut later: %v", m.n, m.after, err)
		}
	}
	for img := range m.cut.Images(choices) {
		if x.failed.Load() {
			return
		}
		x.images.Add(1)
		if _, again := x.seen.LoadOrStore(x.hash(m, img), nil); again {
			continue // cuts that follow each other have most images in common
		}
		n := x.different.Add(1)
		if !deep && n%oneIn != 0 {
			continue
		}
		if err := m.check(img, n/oneIn%4 == 0); err != nil {
			x.failed.Store(true)
			x.t.Errorf("cut %d, after %s, %v: %v", m.n, m.after, img, err)
		}
	}
}

// hash differs for images that are to be checked separately.
func (x *explorer) hash(m *moment, img *blocktest.Image) uint64 {
	var h maphash.Hash
	h.SetSeed(x.seed)
	fmt.Fprint(&h, m.epoch)
	h.Write(img.Disk(m.disk))
	for _, p := range m.cows {
		h.Write(img.Disk(p.disk))
	}
	return h.Sum64()
}
