package kernel_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/test/kernel/job"
	"github.com/dmsnap/dmsnap/test/kernel/machine"
)

// mergeCase is a store worth merging: areas to step back over, short runs and long ones, and the origin
// written too, so that a wrong chunk shows.
func mergeCase(seed uint64) script {
	r := rand.New(rand.NewPCG(seed, 0x6d65726765))
	c := int64(1) << r.IntN(5)
	s := script{seed: seed, originSectors: c*(150+r.Int64N(250)) + r.Int64N(c)}
	s.snaps = []snapConf{{store: "P", chunk: c, length: s.originSectors, cowSectors: 600 * c}}
	for i := range 120 {
		st := step{kind: doWrite, target: i%3 - 1, seed: uint64(i)}
		st.target = max(origin, min(st.target, 0))
		st.off, st.n = extent(r, s.originSectors, c)
		s.steps = append(s.steps, st)
	}
	return s
}

// built runs a script's steps in the engine and returns what it leaves and the content of its first
// snapshot: what any merge of it must make of the origin.
func built(t *testing.T, s script) (images, []byte) {
	t.Helper()
	o, err := newOurs(s, s.before(), snapshot.SyncFlush, func(string) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	for _, st := range s.steps {
		if _, err := o.do(st); err != nil {
			t.Fatal(err)
		}
	}
	o.flush()
	view := make([]byte, s.originSectors*512)
	if _, err := o.snaps[0].ReadAt(view, 0); err != nil {
		t.Fatal(err)
	}
	return o.images(), view
}

// rounds is how often random tests of whole machines go round.
func rounds(t *testing.T) int { return int(environment(t, "DMSNAP_ROUNDS", 3)) }

// TestMergesCutShort lets the kernel and dmsnap merge the same store in turn, each for a while only, and
// wants the snapshot's content from it after each turn, on both sides, and from the origin at the end.
func TestMergesCutShort(t *testing.T) {
	need(t)
	for seed := range rounds(t) {
		s := mergeCase(uint64(seed + 1))
		t.Run(fmt.Sprintf("seed=%d", s.seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(s.seed, 1))
			b, want := built(t, s)
			k := newKernel(t, sharedMachine(t))
			turns := 0
			for finished := false; !finished; turns++ {
				if turns%2 == 0 {
					b = k.mergeTurn(s, b, 5+r.Int64N(120), want)
				} else {
					b = ourMergeTurn(t, s, b, r.IntN(12), want)
				}
				finished = exceptionsLeft(t, b) == 0
			}
			if !bytes.Equal(b.disk, want) {
				t.Errorf("merged origin differs first at byte %d", firstDifference(b.disk, want))
			}
			tally.add(func(c *counts) { c.rounds += turns })
			t.Logf("merged in %d turns", turns)
		})
	}
}

// mergeTurn lets the kernel show the store as a snapshot and then merge it for some milliseconds.
func (k *kernel) mergeTurn(s script, b images, ms int64, want []byte) images {
	k.t.Helper()
	defer k.clear()
	th := newTheirs(k, s, &b)
	if got, want := k.digest(snapName(0)), kernelcase.Digest(want); got != want {
		k.t.Fatalf("the kernel shows %s, want %s", got, want)
	}
	th.images()
	k.mergeFor(ms, s.originSectors, s.snaps[0])
	return th.images()
}

// ourMergeTurn does the same with dmsnap: some steps, of the kernel's size or of windows, after which the
// engine is dropped as it is.
func ourMergeTurn(t *testing.T, s script, b images, steps int, want []byte) images {
	t.Helper()
	o, err := newOurs(s, b, snapshot.SyncFlush, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := digestOf(o.snaps[0]); got != kernelcase.Digest(want) {
		t.Fatalf("dmsnap shows %s, want %s", got, kernelcase.Digest(want))
	}
	o.close()
	m, err := o.origin.LoadMerge(o.cows[0], snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	for i := range steps {
		if _, err := m.Step(uint64(i%3) * 5); err != nil {
			t.Fatal(err)
		}
	}
	return o.images()
}

func exceptionsLeft(t *testing.T, b images) uint64 {
	t.Helper()
	snap, err := snapshot.NewOrigin(block.MemoryFrom(b.disk)).Attach(block.MemoryFrom(b.cows[0]), snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	return snap.Status().Exceptions
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// TestMergePlugPulled kills the whole machine while its kernel merges: what is on the disks is all there
// is. dmsnap shows the snapshot's content from it and finishes, or goes on for a few steps and leaves the
// rest to the next machine.
func TestMergePlugPulled(t *testing.T) {
	need(t)
	dir := t.TempDir()
	disk, cow := filepath.Join(dir, "disk"), filepath.Join(dir, "cow")
	s := mergeCase(4711)
	b, want := built(t, s)
	total := exceptionsLeft(t, b)
	for round := range rounds(t) {
		start := time.Now()
		write(t, disk, b.disk)
		write(t, cow, b.cows[0])
		m := boot(t, disk, cow)
		k := newKernelOf(t, m)
		k.must(job.Op{Do: job.Create, Dev: "dm:slow", Stdin: fmt.Sprintf("0 %d delay %s 0 0 %[2]s 0 3", s.originSectors, m.Disk(0))},
			job.Op{Do: job.Create, Dev: "dm:merge", Stdin: fmt.Sprintf("0 %d snapshot-merge dm:slow %s P %d", s.originSectors, m.Disk(1), s.snaps[0].chunk)})
		time.Sleep(time.Duration(20+rand.IntN(150)) * time.Millisecond)
		m.Kill()
		b.disk, b.cows[0] = read(t, disk, len(b.disk)), read(t, cow, len(b.cows[0]))
		left := exceptionsLeft(t, b)
		t.Logf("round %d: %d of %d exceptions left (booted in %v, %v in all)", round, left, total, m.Booted.Round(time.Millisecond), time.Since(start).Round(time.Millisecond))
		b = ourMergeTurn(t, s, b, 3, want)
		tally.add(func(c *counts) { c.kills++; c.rounds += 2 })
	}
	for exceptionsLeft(t, b) > 0 {
		b = ourMergeTurn(t, s, b, 20, want)
	}
	if !bytes.Equal(b.disk, want) {
		t.Errorf("merged origin differs first at byte %d", firstDifference(b.disk, want))
	}
}

// newKernelOf is newKernel for a machine that is not used again: nothing is put back.
func newKernelOf(t testing.TB, m *machine.Machine) *kernel {
	return &kernel{t: t, m: m, place: map[string]int64{}, numbers: map[string]string{}}
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// read returns the first n bytes of a file; machines may see a disk rounded up.
func read(t *testing.T, path string, n int) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) < n {
		t.Fatalf("%s has %d bytes, want %d", path, len(b), n)
	}
	return b[:n]
}
