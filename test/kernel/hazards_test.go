package kernel_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// The tests TestHazardHn let the kernel do what the specification warns of (its section 8.2) and the
// engine the same, and want the defect there and not here. When a kernel no longer has it, the test says
// so and passes: that is no fault of ours.

func reproduced(t *testing.T, there bool, what string) {
	t.Helper()
	if !there {
		t.Logf("this kernel does not have the defect: %s", what)
		return
	}
	t.Logf("the kernel: %s", what)
	tally.add(func(c *counts) { c.hazards++ })
}

// hazardStore is a P store with chunks of one sector and so many exceptions, in descending runs of one.
func hazardStore(exceptions int64) script {
	s := script{originSectors: 2*exceptions + 10}
	s.snaps = []snapConf{{store: "P", chunk: 1, length: s.originSectors, cowSectors: exceptions + 50}}
	for i := range exceptions {
		s.steps = append(s.steps, step{kind: doWrite, target: 0, off: (2*exceptions - 2*i) * 512, n: 512, seed: uint64(i)})
	}
	return s
}

// cowWithFault is the table of the COW device with one sector replaced by a fault.
func (k *kernel) cowWithFault(sectors, at int64, fault string) string {
	base := k.place["cow0"]
	var lines []string
	if at > 0 {
		lines = append(lines, fmt.Sprintf("0 %d linear 7:0 %d", at, base))
	}
	lines = append(lines, fmt.Sprintf("%d 1 %s", at, fault))
	return strings.Join(append(lines, fmt.Sprintf("%d %d linear 7:0 %d", at+1, sectors-at-1, base+at+1)), "\n")
}

// mergeUntilFailed loads a merge while the COW device is whole, breaks the device, starts the merge and waits for
// "Merge failed". Then it repairs the device and starts the merge again, as a suspend and resume does, until it stands
// still.
func (k *kernel) mergeFailedAndRetried(s script, at int64, fault string) {
	k.t.Helper()
	const dev = "dm:merge"
	c := s.snaps[0]
	k.create("merge", "")
	k.must(job.Op{Do: job.Load, Dev: dev, Stdin: fmt.Sprintf("0 %d snapshot-merge dm:disk dm:cow0 P %d", s.originSectors, c.chunk)})
	k.reload("cow0", k.cowWithFault(c.cowSectors, at, fault))
	k.must(job.Op{Do: job.Resume, Dev: dev})
	k.until("merge", "Merge failed")
	k.reload("cow0", k.diskTable("cow0", c.cowSectors))
	k.must(job.Op{Do: job.Suspend, Dev: dev}, job.Op{Do: job.Resume, Dev: dev}, job.Op{Do: job.Sleep, N: 300},
		job.Op{Do: job.Suspend, Dev: dev}) // waits for the step under way
	k.remove("merge")
}

// until waits until a device's status is text.
func (k *kernel) until(name, text string) {
	k.t.Helper()
	for range 10000 {
		if statusText(k.status(name)) == text {
			return
		}
	}
	k.t.Fatalf("status of %s stays %q, want %q", name, k.status(name), text)
}

// ourMergeFailedAndRetried does the same in the engine: the COW device fails as decide says until the
// merge has failed, and then works again. After a failed flush the devices are opened again, as the error demands.
func ourMergeFailedAndRetried(t *testing.T, b images, decide blocktest.Decide) images {
	t.Helper()
	disk, cow := block.MemoryFrom(b.disk), block.MemoryFrom(b.cows[0])
	open := func() (*snapshot.Merging, *blocktest.Faulty) {
		faulty := blocktest.NewFaulty(cow, nil)
		m, err := snapshot.NewOrigin(disk).LoadMerge(faulty, snapshot.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		return m, faulty
	}
	m, faulty := open()
	var err error
	faulty.Set(decide)
	for err == nil && m.Status().Exceptions > 0 {
		_, err = m.Step(0)
	}
	if !errors.Is(err, snapshot.ErrMergeFailed) || m.Status().Text() != "Merge failed" {
		t.Fatalf("merge on a failing device: %v, status %q", err, m.Status().Text())
	}
	faulty.Set(nil)
	for n := uint64(1); n > 0; {
		n, err = m.Step(0)
		if errors.Is(err, snapshot.ErrReopen) {
			m.Close()
			m, _ = open()
			n, err = m.Step(0)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	m.Close()
	return images{disk: disk.Bytes(), cows: [][]byte{cow.Bytes()}}
}

var errDisk = errors.New("injected")

// failAt fails reads of a sector, or all that changes it.
func failAt(changes bool, sector int64) blocktest.Decide {
	return func(op blocktest.Op) error {
		if op.Kind.Changes() == changes && op.Overlaps(sector*512, 512) {
			return errDisk
		}
		return nil
	}
}

// H1: after a failed write of an area the kernel's retry copies the COW device's header over chunk 0 of
// the origin.
func TestHazardH1FailedAreaWriteWhileMerging(t *testing.T) {
	k := newKernel(t, sharedMachine(t))
	s := hazardStore(20)
	b, want := built(t, s)
	const area = 1
	newTheirs(k, s, &b).images()
	k.mergeFailedAndRetried(s, area, fmt.Sprintf("flakey 7:0 %d 0 3600 1 error_writes", k.place["cow0"]+area))
	theirs := k.get("disk", 0, 512)
	reproduced(t, bytes.HasPrefix(theirs, []byte("SnAp")), "the origin begins with the store's header")
	after := ourMergeFailedAndRetried(t, b, failAt(true, area))
	if !bytes.Equal(after.disk, want) {
		t.Errorf("dmsnap: merged origin differs first at byte %d", firstDifference(after.disk, want))
	}
}

// H2: after a failed read of an area the kernel's retry skips it: its exceptions are never merged.
func TestHazardH2FailedAreaReadWhileMerging(t *testing.T) {
	k := newKernel(t, sharedMachine(t))
	s := hazardStore(70) // areas 0 and 1 full, six in area 2
	b, want := built(t, s)
	const area = 34 // area 1
	newTheirs(k, s, &b).images()
	k.mergeFailedAndRetried(s, area, "error")
	theirs := k.get("disk", 0, 0)
	lost := 0
	for i := range s.originSectors {
		if !bytes.Equal(theirs[i*512:(i+1)*512], want[i*512:(i+1)*512]) {
			lost++
		}
	}
	reproduced(t, lost > 0, fmt.Sprintf("%d chunks were never merged", lost))
	after := ourMergeFailedAndRetried(t, b, failAt(false, area))
	if !bytes.Equal(after.disk, want) {
		t.Errorf("dmsnap: merged origin differs first at byte %d", firstDifference(after.disk, want))
	}
}

// H3: two merges with different stores into one origin at once, and a merge of a transient store, are
// accepted by the kernel when loaded directly; the latter ends it.
func TestHazardH3MergesThatMustBeRefused(t *testing.T) {
	m := boot(t)
	k := newKernelOf(t, m)
	k.disk("disk", 1000)
	k.disk("a", 200)
	k.disk("b", 200)
	accepted := true
	for _, cow := range []string{"a", "b"} {
		r := k.try(job.Op{Do: job.Create, Dev: "dm:merge-" + cow, Stdin: fmt.Sprintf("0 1000 snapshot-merge dm:disk dm:%s P 8", cow)})
		accepted = accepted && r.Err == ""
	}
	reproduced(t, accepted, "two merges run into one origin")
	k.disk("lone", 1000)
	k.disk("c", 200)
	_, err := m.Do(job.Op{Do: job.Create, Dev: "dm:merge-n", Stdin: "0 1000 snapshot-merge dm:lone dm:c N 8"})
	reproduced(t, err != nil || len(m.Complaints()) > 0, "resuming the merge of a transient store ended the kernel")
	m.Kill()

	o := snapshot.NewOrigin(block.NewMemory(1000 * 512))
	cow := block.NewMemory(200 * 512)
	layout := ondisk.Layout{ChunkSectors: 8}
	if _, err := store.Create(cow, layout, false); err != nil {
		t.Fatal(err)
	}
	first, err := o.LoadMerge(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	other := block.NewMemory(200 * 512)
	if _, err := store.Create(other, layout, false); err != nil {
		t.Fatal(err)
	}
	if _, err := o.LoadMerge(other, snapshot.Options{}); !errors.Is(err, snapshot.ErrAlreadyMerging) {
		t.Errorf("a second merge: %v, want %v", err, snapshot.ErrAlreadyMerging)
	}
	lone := snapshot.NewOrigin(block.NewMemory(1000 * 512))
	if _, err := lone.LoadMerge(other, snapshot.Options{Store: snapshot.Transient}); !errors.Is(err, store.ErrNoMerge) {
		t.Errorf("a merge of a transient store: %v, want %v", err, store.ErrNoMerge)
	}
}

// H4: slots after the end of the exceptions become valid when the end is overwritten.
func TestHazardH4SlotsBehindTheEnd(t *testing.T) {
	s := script{originSectors: 160, snaps: []snapConf{{store: "P", chunk: 8, cowSectors: 400, length: 160}}}
	b := s.before()
	cow := b.cows[0]
	copy(cow, "SnAp")
	for i, v := range []uint32{1, 1, 8} {
		binary.LittleEndian.PutUint32(cow[4+4*i:], v)
	}
	for i, e := range [][2]uint64{{5, 2}, {0, 0}, {7, 3}} {
		binary.LittleEndian.PutUint64(cow[4096+16*i:], e[0])
		binary.LittleEndian.PutUint64(cow[4096+16*i+8:], e[1])
	}
	k := newKernel(t, sharedMachine(t))
	th := newTheirs(k, s, &b)
	before := k.get(snapName(0), 7*4096, 4096)
	w := step{kind: doWrite, target: 0, off: 9 * 4096, n: 4096, seed: 9}
	th.step(w)
	th.detach(0)
	th.attach(0)
	after := k.get(snapName(0), 7*4096, 4096)
	reproduced(t, !bytes.Equal(before, after), "chunk 7 changed its content when chunk 9 was written")

	o, err := newOurs(s, b, snapshot.SyncAlways, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	for _, st := range []step{w, {kind: doDetach}, {kind: doAttach}} {
		if _, err := o.do(st); err != nil {
			t.Fatal(err)
		}
	}
	ours := make([]byte, 4096)
	if _, err := o.snaps[0].ReadAt(ours, 7*4096); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(ours, before) {
		t.Error("dmsnap: chunk 7 changed its content when chunk 9 was written")
	}
}

// H7: a snapshot that is activated without suspending its snapshot-origin misses most of larger writes.
func TestHazardH7ActivationWithoutSuspendingTheOrigin(t *testing.T) {
	k := newKernel(t, sharedMachine(t))
	s := script{originSectors: 1024, snaps: []snapConf{{store: "P", chunk: 8, cowSectors: 2000, length: 1024}}}
	k.disk("disk", s.originSectors)
	k.disk("cow0", s.snaps[0].cowSectors)
	k.must(job.Op{Do: job.Write, Dev: "dm:disk", N: s.originSectors * 512, Seed: originSeed})
	k.create("origin", fmt.Sprintf("0 %d snapshot-origin dm:disk", s.originSectors))
	k.create(snapName(0), snapTable(s.snaps[0], "disk", "cow0"))
	before := k.digest(snapName(0))
	k.must(job.Op{Do: job.Write, Dev: "dm:origin", N: 16 << 10, Seed: 5})
	reproduced(t, k.digest(snapName(0)) != before, "the snapshot changed with its origin")

	o, err := newOurs(s, s.before(), snapshot.SyncAlways, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	if _, err := o.do(step{kind: doWrite, target: origin, n: 16 << 10, seed: 5}); err != nil {
		t.Fatal(err)
	}
	if digestOf(o.snaps[0]) != before {
		t.Error("dmsnap: the snapshot changed with its origin")
	}
}
