package kernel_test

import (
	"fmt"
	"strings"

	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// theirs is the kernel doing a script: disk is the origin device, origin the snapshot-origin on it.
type theirs struct {
	k        *kernel
	s        script
	attached []bool
}

func newTheirs(k *kernel, s script, b *images) *theirs {
	th := &theirs{k: k, s: s, attached: make([]bool, len(s.snaps))}
	k.disk("disk", s.originSectors)
	for i, c := range s.snaps {
		k.disk(cowName(i), c.cowSectors)
		if b != nil {
			k.put(cowName(i), 0, b.cows[i])
		}
	}
	if b != nil {
		k.put("disk", 0, b.disk)
	} else {
		k.must(job.Op{Do: job.Write, Dev: "dm:disk", N: s.originSectors * 512, Seed: originSeed})
	}
	k.create("origin", fmt.Sprintf("0 %d snapshot-origin dm:disk", s.originSectors))
	for i := range s.snaps {
		th.attach(i)
	}
	return th
}

// images takes the devices' content, with no target above them.
func (th *theirs) images() images {
	for i, there := range th.attached {
		if there {
			th.k.remove(snapName(i))
			th.attached[i] = false
		}
	}
	b := images{disk: th.k.get("disk", 0, 0)}
	for i := range th.s.snaps {
		b.cows = append(b.cows, th.k.get(cowName(i), 0, 0))
	}
	return b
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

// write does steps that are writes, all at once, without looking.
func (th *theirs) write(steps []step) {
	var ops []job.Op
	for _, st := range steps {
		ops = append(ops, th.request(st))
	}
	if len(ops) > 0 {
		th.k.do(ops...)
	}
}

// request is a step as it is sent to the guest.
func (th *theirs) request(st step) job.Op {
	op := job.Op{Do: job.Flush, Dev: "dm:origin", Off: st.off, N: st.n, Seed: st.seed}
	if st.target != origin {
		op.Dev = "dm:" + snapName(st.target)
	}
	switch st.kind {
	case doWrite:
		op.Do = job.Write
	case doDiscard:
		op.Do = job.Drop
	}
	return op
}

// step does one step that fit has let through, and looks at everything.
func (th *theirs) step(st step) observation {
	var ops []job.Op
	outcome := "ok"
	switch st.kind {
	case doWrite, doDiscard, doFlush:
		ops = append(ops, th.request(st))
	case doDetach:
		th.detach(st.target)
	case doAttach:
		th.attach(st.target)
	case doGrow:
		c := &th.s.snaps[st.target]
		c.cowSectors = grown(*c, st.n)
		th.k.grow(cowName(st.target), c.cowSectors)
	case doMerge:
		outcome = th.merge(st.target)
	}
	return th.look(outcome, ops...)
}

// look does operations, of which the first decides the outcome, and looks at everything.
func (th *theirs) look(outcome string, ops ...job.Op) observation {
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

// mergeFor loads a snapshot-merge table for the devices disk and cow0 afresh, with every write to the origin waiting
// for a moment, and takes it away again after the given number of milliseconds: the step under way is completed, the
// rest stays. It returns the last status.
func (k *kernel) mergeFor(ms, originSectors int64, c snapConf) string {
	k.t.Helper()
	const slow = 2 // milliseconds a write
	k.create("slow", fmt.Sprintf("0 %d delay dm:disk 0 0 dm:disk 0 %d", originSectors, slow))
	k.create("merge", fmt.Sprintf("0 %d snapshot-merge dm:slow dm:cow0 %s %d", originSectors, c.store, c.chunk))
	k.must(job.Op{Do: job.Sleep, N: ms}, job.Op{Do: job.Suspend, Dev: "dm:merge"})
	status := k.status("merge")
	k.remove("merge")
	k.remove("slow")
	return status
}
