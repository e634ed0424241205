package kernel_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// The scenarios that LVM's and the device-mapper test suite's snapshot tests have, by their names: each
// is a script of its own for runScript, or a comparison of what both sides accept.

// same runs a script on both sides and wants no difference.
func same(t *testing.T, s script) {
	t.Helper()
	if d := runScript(t, s); d != nil {
		t.Errorf("the two sides part after step %d:\n%s\n%v", d.step, strings.Join(d.what, "\n"), s)
	}
}

// TestBringUp sets all targets up with dmsetup itself and holds what it prints against the engine, and
// against the harness's own way of speaking to device-mapper.
func TestBringUp(t *testing.T) {
	k := newKernel(t, sharedMachine(t))
	k.disk("disk", 2048)
	k.create("origin", "0 2048 snapshot-origin dm:disk")
	o := snapshot.NewOrigin(block.NewMemory(2048 * 512))
	for i, table := range []string{"P 8", "PO 16", "N 32", "P 64 1 discard_zeroes_cow", "p 1", "po 2 2 discard_zeroes_cow discard_passdown_origin", "n 4 0"} {
		cow := fmt.Sprintf("cow%d", i)
		k.disk(cow, 1000)
		line := fmt.Sprintf("0 2048 snapshot %s %s %s", k.number("disk"), k.number(cow), table)
		k.sh(fmt.Sprintf("dmsetup create by-hand --table '%s'", line))
		status := strings.TrimSpace(k.sh("dmsetup status by-hand"))
		shown := strings.TrimSpace(k.sh("dmsetup table by-hand"))
		k.sh("dmsetup remove by-hand")

		parsed, err := kernelcase.ParseTable(line)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		s, err := o.Attach(block.NewMemory(1000*512), snapshot.Options{Store: parsed.Store, ChunkSectors: parsed.ChunkSectors, Features: parsed.Features})
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Status().Line(); got != status {
			t.Errorf("%q: status %q, kernel %q", line, got, status)
		}
		if got := s.Status().Table(parsed.Origin, parsed.COW); got != shown {
			t.Errorf("%q: table %q, kernel %q", line, got, shown)
		}
		k.create("spoken", line)
		if got := k.status("spoken"); parsed.Store != snapshot.Transient && got != status {
			t.Errorf("harness: status %q, dmsetup %q", got, status)
		}
		if got := k.table("spoken"); got != shown {
			t.Errorf("harness: table %q, dmsetup %q", got, shown)
		}
		k.remove("spoken")
		s.Close()
	}
}

// TestManySnapshots has 24 snapshots of one origin, of all chunk sizes and types.
func TestManySnapshots(t *testing.T) {
	need(t)
	s := script{originSectors: 1500}
	for i := range 24 {
		c := int64(1) << (i % 9)
		conf := snapConf{store: []string{"P", "PO", "N"}[i%3], chunk: c, length: s.originSectors}
		conf.cowSectors = c * sound(c, 6+2*s.originSectors/c)
		s.snaps = append(s.snaps, conf)
	}
	for i := range 12 {
		at := int64(i * 97 % 1400)
		s.steps = append(s.steps, step{kind: doWrite, target: origin, off: at * 512, n: int64(1+i*7) * 512, seed: uint64(i)},
			step{kind: doWrite, target: i * 2, off: at * 512, n: 3 * 512, seed: uint64(100 + i)})
	}
	same(t, s)
}

// TestChunkSizes wants both sides to accept and refuse the same chunk arguments, and runs a few steps
// with huge ones: up to 32 MiB, since the kernel takes three chunks of memory for each snapshot and the
// guest has little.
func TestChunkSizes(t *testing.T) {
	t.Run("refused", func(t *testing.T) {
		k := newKernel(t, sharedMachine(t))
		k.disk("disk", 4096)
		k.disk("cow0", 1<<23)
		for _, argument := range []string{"0", "1", "2", "3", "8", "08", "+8", "-8", "0x10", "abc", "24", "1023", "1024", "2048", "32768",
			"2097153", "4194303", "4194304", "4294967295", "4294967296", "8.0", "8k"} {
			k.must(job.Op{Do: job.Write, Dev: "dm:cow0", N: 8192}) // anything with a magic of its own …
			k.put("cow0", 0, make([]byte, 8192))                   // … and then none
			table := fmt.Sprintf("0 4096 snapshot %s %s P %s", k.number("disk"), k.number("cow0"), argument)
			r := k.try(job.Op{Do: job.Create, Dev: "dm:try", Stdin: table})
			if r.Err == "" {
				k.must(job.Op{Do: job.Remove, Dev: "dm:try"})
			}
			err := attachTable(table)
			if (r.Err == "") != (err == nil) {
				t.Errorf("chunk argument %q: kernel %q, dmsnap %v", argument, r.Err, err)
			}
			tally.add(func(c *counts) { c.operations++ })
		}
	})
	for _, c := range []int64{4096, 65536} {
		t.Run(fmt.Sprintf("huge=%d", c), func(t *testing.T) { hugeChunk(t, c) })
	}
}

// attachTable does with a table line what the kernel does with it.
func attachTable(line string) error {
	table, err := kernelcase.ParseTable(line)
	if err != nil {
		return err
	}
	o := snapshot.NewOrigin(block.NewMemory(int64(table.Length) * 512))
	s, err := o.Attach(block.NewMemory(1<<23*512), snapshot.Options{Store: table.Store, ChunkSectors: table.ChunkSectors, Features: table.Features})
	if err == nil {
		s.Close()
	}
	return err
}

// hugeChunk is a serial script over an origin that is shorter than a chunk. What is compared of the COW
// device are the beginnings of its chunks: the rest is as large as it is empty.
func hugeChunk(t *testing.T, c int64) {
	k := newKernel(t, sharedMachine(t))
	s := script{originSectors: 3000, snaps: []snapConf{{store: "P", chunk: c, length: 3000, cowSectors: 4 * c}}}
	k.disk("disk", s.originSectors)
	k.disk("cow0", s.snaps[0].cowSectors)
	k.must(job.Op{Do: job.Write, Dev: "dm:disk", N: s.originSectors * 512, Seed: originSeed})
	k.create("origin", fmt.Sprintf("0 %d snapshot-origin dm:disk", s.originSectors))
	k.create("snap0", snapTable(s.snaps[0], "disk", "cow0"))
	disk, cow := block.MemoryFrom(s.before().disk), block.NewMemory(s.snaps[0].cowSectors*512)
	o := snapshot.NewOrigin(disk)
	snap, err := o.Attach(cow, snapshot.Options{ChunkSectors: uint32(c), Sync: snapshot.SyncAlways})
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	for i, st := range []step{{target: 0, off: 512, n: 1024}, {target: origin, off: 4096, n: 512}, {target: 0, off: 2990 * 512, n: 5120}} {
		st.kind, st.seed = doWrite, uint64(i)
		dev, name := block.Device(snap), "dm:snap0"
		if st.target == origin {
			dev, name = o, "dm:origin"
		}
		k.must(job.Op{Do: job.Write, Dev: name, Off: st.off, N: st.n, Seed: st.seed})
		if _, err := dev.WriteAt(streamBytes(st.seed, st.off, st.n), st.off); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := snap.Status().Line(), k.status("snap0"); got != want {
		t.Errorf("status %q, kernel %q", got, want)
	}
	if got, want := digestOf(snap), k.digest("snap0"); got != want {
		t.Errorf("view differs from the kernel's")
	}
	for chunk := range int64(4) {
		at := chunk * c * 512
		b := make([]byte, 3000*512)
		if _, err := cow.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, k.get("cow0", at, int64(len(b)))) {
			t.Errorf("COW chunk %d differs from the kernel's", chunk)
		}
	}
	tally.add(func(c *counts) { c.operations += 3; c.observations++ })
}

// TestUsage wants the same usage after each exception, over the ends of areas, up to a full device.
func TestUsage(t *testing.T) {
	need(t)
	for _, store := range []string{"P", "PO", "N"} {
		s := script{originSectors: 100, snaps: []snapConf{{store: store, chunk: 1, length: 100, cowSectors: 74}}}
		for i := range int64(76) {
			s.steps = append(s.steps, step{kind: doWrite, target: int(i%5/4) - 1, off: i * 512, n: 512, seed: uint64(i)})
		}
		same(t, s)
	}
}

// TestMergeWhileOthersExist merges one snapshot after the other while those that are left keep theirs.
func TestMergeWhileOthersExist(t *testing.T) {
	need(t)
	s := script{originSectors: 700}
	for i, c := range []int64{16, 4, 32, 1} {
		s.snaps = append(s.snaps, snapConf{store: []string{"P", "PO"}[i%2], chunk: c, length: s.originSectors, cowSectors: c * sound(c, 2+2*s.originSectors/c)})
	}
	for i := range 4 {
		for j := range int64(6) {
			s.steps = append(s.steps, step{kind: doWrite, target: i, off: (37*j + 50*int64(i)) * 512, n: (5 + 9*j) * 512, seed: uint64(10*i) + uint64(j)},
				step{kind: doWrite, target: origin, off: (101*j + int64(i)) * 512, n: 20 * 512, seed: 900 + uint64(10*i) + uint64(j)})
		}
	}
	for _, i := range []int{1, 0, 3, 2} {
		s.steps = append(s.steps, step{kind: doMerge, target: i}, step{kind: doWrite, target: origin, off: 300 * 512, n: 64 * 512, seed: uint64(77 + i)})
	}
	same(t, s)
}

// TestReactivate takes snapshots off and sets them up again between writes.
func TestReactivate(t *testing.T) {
	need(t)
	s := script{originSectors: 333, snaps: []snapConf{{store: "P", chunk: 2, length: 333, cowSectors: 400}, {store: "PO", chunk: 8, length: 333, cowSectors: 500}}}
	for i := range int64(12) {
		for target := range 2 {
			s.steps = append(s.steps, step{kind: doWrite, target: target, off: 25 * i * 512, n: (1 + i) * 512, seed: uint64(i)},
				step{kind: doDetach, target: target}, step{kind: doAttach, target: target},
				step{kind: doWrite, target: origin, off: (26*i + 4) * 512, n: 1024, seed: uint64(50 + i)})
		}
	}
	same(t, s)
}

// TestCowReduce cuts off what a COW device does not use, as lvreduce does, and fills the rest.
func TestCowReduce(t *testing.T) {
	s := script{originSectors: 200, snaps: []snapConf{{store: "PO", chunk: 4, length: 200, cowSectors: 300}}}
	for i := range int64(10) {
		s.steps = append(s.steps, step{kind: doWrite, target: 0, off: 16 * i * 512, n: 512, seed: uint64(i)})
	}
	k := newKernel(t, sharedMachine(t))
	th := newTheirs(k, s, nil)
	th.write(s.steps)
	b := th.images()
	k.clear()
	s.snaps[0].cowSectors = 4*(2+10+3) + 2 // space for three more
	b.cows[0] = b.cows[0][:s.snaps[0].cowSectors*512]
	th = newTheirs(k, s, &b)
	o, err := newOurs(s, b, snapshot.SyncAlways, k.number)
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	for i := range int64(6) {
		st := step{kind: doWrite, target: 0, off: (8 + 16*i) * 512, n: 512, seed: uint64(i)}
		want := th.step(st)
		outcome, err := o.do(st)
		if err != nil {
			t.Fatal(err)
		}
		if d := want.differences(o.observe(outcome), true); d != nil {
			t.Fatalf("write %d: %v", i, d)
		}
	}
	if got := statusText(k.status("snap0")); got != "Overflow" {
		t.Errorf("status %q, want Overflow", got)
	}
}

// TestEndAtAnAreaEdge is a deliberate difference (H10): where a COW device ends exactly where the next
// area would begin, the kernel gives a snapshot up over the exception that fills the last area; dmsnap
// refuses that exception, so that a PO snapshot stays readable.
func TestEndAtAnAreaEdge(t *testing.T) {
	k := newKernel(t, sharedMachine(t))
	s := script{originSectors: 100, snaps: []snapConf{{store: "PO", chunk: 1, length: 100, cowSectors: 34}}}
	th := newTheirs(k, s, nil)
	o, err := newOurs(s, s.before(), snapshot.SyncAlways, k.number)
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	for i := range int64(32) {
		st := step{kind: doWrite, target: 0, off: i * 512, n: 512, seed: uint64(i)}
		want := th.step(st)
		outcome, _ := o.do(st)
		got := o.observe(outcome)
		if d := want.differences(got, true); (i < 31) != (d == nil) {
			t.Errorf("write %d: %v", i, d)
		}
	}
	if theirs, ours := statusText(k.status("snap0")), o.snaps[0].Status().Text(); theirs != "Invalid" || ours != "Overflow" {
		t.Errorf("status %q and %q, want Invalid in the kernel and Overflow here", theirs, ours)
	}
}
