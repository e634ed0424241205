package kernel_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// An observation is all that can be seen of a side after a step. Devices appear as digests, "EIO" where
// reading fails, and are empty where there is no device.
type observation struct {
	outcome string // of the step: "ok" or "EIO"
	origin  string
	snaps   []snapView
}

type snapView struct{ status, table, view, cow string }

// differences tells where two observations part. Stores are compared only where withCOW says so.
func (o observation) differences(p observation, withCOW bool) []string {
	var all []string
	differ := func(what, a, b string) {
		if a != b {
			all = append(all, fmt.Sprintf("%s: kernel %q, dmsnap %q", what, a, b))
		}
	}
	differ("outcome", o.outcome, p.outcome)
	differ("origin", o.origin, p.origin)
	for i := range o.snaps {
		a, b := o.snaps[i], p.snaps[i]
		differ(fmt.Sprintf("status of snap%d", i), a.status, b.status)
		differ(fmt.Sprintf("table of snap%d", i), a.table, b.table)
		differ(fmt.Sprintf("view of snap%d", i), a.view, b.view)
		if withCOW {
			differ(fmt.Sprintf("COW of snap%d", i), a.cow, b.cow)
		}
	}
	return all
}

// originSeed is the stream that every origin holds before the first step.
const originSeed = 77

func streamBytes(seed uint64, off, n int64) []byte { return kernelcase.Stream(seed, off, n) }

// ours is dmsnap's engine doing a script over devices in memory.
type ours struct {
	s      script
	disk   *block.Memory
	origin *snapshot.Origin
	cows   []*block.Memory
	snaps  []*snapshot.Snapshot // nil: detached
	gone   []bool               // merged
	sync   snapshot.SyncMode
	number func(dev string) string // what tables call a device
}

func newOurs(s script, sync snapshot.SyncMode, number func(string) string) (*ours, error) {
	disk := block.MemoryFrom(streamBytes(originSeed, 0, s.originSectors*512))
	o := &ours{s: s, disk: disk, origin: snapshot.NewOrigin(disk), sync: sync, number: number,
		snaps: make([]*snapshot.Snapshot, len(s.snaps)), gone: make([]bool, len(s.snaps))}
	for i, c := range s.snaps {
		o.cows = append(o.cows, block.NewMemory(c.cowSectors*512))
		if err := o.attach(i); err != nil {
			return nil, err
		}
	}
	return o, nil
}

func (o *ours) attach(i int) error {
	c := o.s.snaps[i]
	kind, err := snapshot.ParseStoreType(c.store)
	if err != nil {
		return err
	}
	o.snaps[i], err = o.origin.Attach(o.cows[i], snapshot.Options{Store: kind, ChunkSectors: uint32(c.chunk), Size: c.length * 512, Sync: o.sync,
		Features: snapshot.Features{DiscardZeroesCOW: c.discards(), DiscardPassdownOrigin: strings.Contains(c.features, "passdown")}})
	return err
}

// fit cuts a write down to one piece when some store has not room for all of it: of a request that
// overflows a store the kernel runs the pieces at once, and which of them were recorded is chance.
// It also turns steps aside that make no sense in the state things are in; ok is false for those.
func (o *ours) fit(st step) (_ step, ok bool) {
	there := st.target == origin || o.snaps[st.target] != nil
	switch st.kind {
	case doAttach:
		return st, !there && !o.gone[st.target]
	case doGrow:
		return st, !o.gone[st.target]
	case doMerge:
		return st, there && o.snaps[st.target].Status().State == snapshot.StateOK && o.s.snaps[st.target].store != "N" &&
			o.s.snaps[st.target].length == o.s.originSectors
	}
	if !there || st.kind != doWrite {
		return st, there
	}
	smallest := o.s.originSectors
	tight := false
	for i, s := range o.snaps {
		if s == nil || st.target != origin && st.target != i {
			continue
		}
		smallest = min(smallest, o.s.snaps[i].chunk)
		u := s.Status()
		if chunk := o.s.snaps[i].chunk; int64(u.Total-min(u.Allocated, u.Total))/chunk < st.n/512/chunk+4 {
			tight = true
		}
	}
	if tight {
		bytes := smallest * 512
		st.n = min(st.n, (st.off/bytes+1)*bytes-st.off)
	}
	return st, true
}

// do does one step. An error it returns is none the kernel could share.
func (o *ours) do(st step) (outcome string, err error) {
	switch st.kind {
	case doWrite, doDiscard, doFlush:
		return word(o.request(st)), nil
	case doDetach:
		err := o.snaps[st.target].Close()
		o.snaps[st.target] = nil
		return "ok", err
	case doAttach:
		return "ok", o.attach(st.target)
	case doGrow:
		c := &o.s.snaps[st.target]
		c.cowSectors = sound(c.chunk, (c.cowSectors+st.n)/c.chunk) * c.chunk
		return "ok", o.cows[st.target].Grow(c.cowSectors * 512)
	}
	m, err := o.snaps[st.target].BeginMerge()
	if err != nil {
		return "", err
	}
	for n := uint64(1); n > 0 && err == nil; {
		n, err = m.Step(0)
	}
	o.snaps[st.target].Close()
	o.snaps[st.target], o.gone[st.target] = nil, true
	if err != nil {
		return "", err
	}
	return m.Status().Line(), m.Close()
}

func (o *ours) request(st step) error {
	dev := block.Device(o.origin)
	if st.target != origin {
		dev = o.snaps[st.target]
	}
	switch st.kind {
	case doFlush:
		return dev.Flush()
	case doDiscard:
		return block.Discard(dev, st.off, st.n)
	}
	_, err := dev.WriteAt(streamBytes(st.seed, st.off, st.n), st.off)
	return err
}

func word(err error) string {
	if err != nil {
		return "EIO"
	}
	return "ok"
}

func (o *ours) observe(outcome string) observation {
	v := observation{outcome: outcome, origin: digestOf(o.disk)}
	for i, s := range o.snaps {
		view := snapView{cow: digestOf(o.cows[i])}
		if s != nil {
			view.status, view.view = s.Status().Line(), digestOf(s)
			view.table = s.Status().Table(o.number("disk"), o.number(cowName(i)))
		}
		v.snaps = append(v.snaps, view)
	}
	return v
}

// flush makes what every store holds appear on its device.
func (o *ours) flush() {
	for _, s := range o.snaps {
		if s != nil {
			s.Flush()
		}
	}
}

func (o *ours) close() {
	for _, s := range o.snaps {
		if s != nil {
			s.Close()
		}
	}
}

func digestOf(dev block.Device) string {
	b := make([]byte, dev.Size())
	if _, err := dev.ReadAt(b, 0); err != nil {
		return "EIO"
	}
	return kernelcase.Digest(b)
}

func cowName(i int) string  { return fmt.Sprintf("cow%d", i) }
func snapName(i int) string { return fmt.Sprintf("snap%d", i) }

// theirs is the kernel doing a script: disk is the origin device, origin the snapshot-origin on it.
type theirs struct {
	k        *kernel
	s        script
	attached []bool
}

func newTheirs(t testing.TB, k *kernel, s script) *theirs {
	th := &theirs{k: k, s: s, attached: make([]bool, len(s.snaps))}
	k.disk("disk", s.originSectors)
	k.must(job.Op{Do: job.Write, Dev: "dm:disk", N: s.originSectors * 512, Seed: originSeed})
	for i, c := range s.snaps {
		k.disk(cowName(i), c.cowSectors)
	}
	k.create("origin", fmt.Sprintf("0 %d snapshot-origin dm:disk", s.originSectors))
	for i := range s.snaps {
		th.attach(i)
	}
	return th
}

func snapTable(c snapConf, disk, cow string) string {
	return strings.TrimSpace(fmt.Sprintf("0 %d snapshot dm:%s dm:%s %s %d %s", c.length, disk, cow, c.store, c.chunk, c.features))
}

// attach sets a snapshot up with the origin suspended: without that the kernel would go on cutting
// origin writes as before (H7).
func (th *theirs) attach(i int) {
	c := th.s.snaps[i]
	th.k.must(job.Op{Do: job.Suspend, Dev: "dm:origin"})
	th.k.create(snapName(i), snapTable(c, "disk", cowName(i)))
	th.k.must(job.Op{Do: job.Resume, Dev: "dm:origin"})
	th.attached[i] = true
}

func (th *theirs) detach(i int) {
	th.k.must(job.Op{Do: job.Suspend, Dev: "dm:origin"})
	th.k.remove(snapName(i))
	th.k.must(job.Op{Do: job.Resume, Dev: "dm:origin"})
	th.attached[i] = false
}

// step does one step that fit has let through, and looks at everything.
func (th *theirs) step(st step) observation {
	var ops []job.Op
	outcome := "ok"
	switch st.kind {
	case doWrite, doDiscard, doFlush:
		op := job.Op{Do: job.Flush, Dev: "dm:origin", Off: st.off, N: st.n, Seed: st.seed}
		if st.target != origin {
			op.Dev = "dm:" + snapName(st.target)
		}
		if st.kind == doWrite {
			op.Do = job.Write
		} else if st.kind == doDiscard {
			op.Do = job.Drop
		}
		ops = append(ops, op)
	case doDetach:
		th.detach(st.target)
	case doAttach:
		th.attach(st.target)
	case doGrow:
		c := &th.s.snaps[st.target]
		c.cowSectors = sound(c.chunk, (c.cowSectors+st.n)/c.chunk) * c.chunk
		th.k.grow(cowName(st.target), c.cowSectors)
	case doMerge:
		outcome = th.merge(st.target)
	}
	first := len(ops)
	ops = append(ops, job.Op{Do: job.Read, Dev: "dm:disk"})
	for i := range th.s.snaps {
		ops = append(ops, job.Op{Do: job.Read, Dev: "dm:" + cowName(i)})
		if th.attached[i] {
			dev := "dm:" + snapName(i)
			ops = append(ops, job.Op{Do: job.Status, Dev: dev}, job.Op{Do: job.Table, Dev: dev}, job.Op{Do: job.Read, Dev: dev})
		}
	}
	r := th.k.do(ops...)
	if first > 0 && r[0].Err != "" {
		outcome = r[0].Err
	}
	r = r[first:]
	next := func() string {
		x := r[0]
		r = r[1:]
		if x.Err != "" {
			return x.Err
		}
		return x.Out
	}
	v := observation{outcome: outcome, origin: next()}
	for i := range th.s.snaps {
		view := snapView{cow: next()}
		if th.attached[i] {
			view.status, view.table, view.view = next(), next(), next()
		}
		v.snaps = append(v.snaps, view)
	}
	return v
}

// merge merges a snapshot to the end the way LVM does: the origin's device gets a snapshot-merge table,
// takes the store over from the suspended snapshot, and becomes an origin again when all is done.
func (th *theirs) merge(i int) string {
	c, name := th.s.snaps[i], "dm:"+snapName(i)
	th.k.must(
		job.Op{Do: job.Load, Dev: "dm:origin", Stdin: fmt.Sprintf("0 %d snapshot-merge dm:disk dm:%s %s %d", th.s.originSectors, cowName(i), c.store, c.chunk)},
		job.Op{Do: job.Suspend, Dev: "dm:origin"}, job.Op{Do: job.Suspend, Dev: name}, job.Op{Do: job.Resume, Dev: "dm:origin"})
	status := th.k.merged("origin")
	th.k.must(job.Op{Do: job.Resume, Dev: name})
	th.k.must(job.Op{Do: job.Load, Dev: "dm:origin", Stdin: fmt.Sprintf("0 %d snapshot-origin dm:disk", th.s.originSectors)}, job.Op{Do: job.Suspend, Dev: "dm:origin"})
	th.k.remove(snapName(i))
	th.k.must(job.Op{Do: job.Resume, Dev: "dm:origin"})
	th.attached[i] = false
	return status
}

// merged waits until a merge is complete and returns its last status.
func (k *kernel) merged(name string) string {
	k.t.Helper()
	for range 20000 {
		r := k.must(job.Op{Do: job.Status, Dev: "dm:" + name})[0].Out
		var used, total, metadata int64
		if _, err := fmt.Sscanf(statusText(r), "%d/%d %d", &used, &total, &metadata); err != nil {
			k.t.Fatalf("status of merge: %q\n%s", r, k.lastWords())
		}
		if used == metadata {
			return r
		}
	}
	k.t.Fatalf("merge does not end: %s", k.status(name))
	return ""
}
