package kernel_test

import (
	"fmt"
	"slices"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/snapshot"
)

// An observation is all that can be seen of a side after a step. Devices appear as digests, "EIO" where
// reading fails, and are empty where there is no device.
type observation struct {
	outcome string // of the step: "ok" or "EIO"
	origin  string
	snaps   []snapView
}

type snapView struct{ status, table, view, cow string }

// differences lists where two observations differ. Stores are compared only with withCOW.
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
		if withCOW && a.cow != "" && b.cow != "" {
			differ(fmt.Sprintf("COW of snap%d", i), a.cow, b.cow)
		}
	}
	return all
}

// without returns o with nothing said of the stores of invalid snapshots. An engine that waits for
// flushes has not written all exceptions when a snapshot becomes invalid, and need not any more.
func (o observation) without(invalid observation) observation {
	o.snaps = slices.Clone(o.snaps)
	for i := range o.snaps {
		if statusText(invalid.snaps[i].status) == "Invalid" || invalid.snaps[i].status == "" {
			o.snaps[i].cow = ""
		}
	}
	return o
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

// images are what devices hold: a side can begin with what the other left.
type images struct {
	disk []byte
	cows [][]byte
}

// before is what the devices of a script hold before its first step.
func (s script) before() images {
	b := images{disk: streamBytes(originSeed, 0, s.originSectors*512)}
	for _, c := range s.snaps {
		b.cows = append(b.cows, make([]byte, c.cowSectors*512))
	}
	return b
}

func newOurs(s script, b images, sync snapshot.SyncMode, number func(string) string) (*ours, error) {
	disk := block.MemoryFrom(b.disk)
	o := &ours{s: s, disk: disk, origin: snapshot.NewOrigin(disk), sync: sync, number: number,
		snaps: make([]*snapshot.Snapshot, len(s.snaps)), gone: make([]bool, len(s.snaps))}
	for i := range s.snaps {
		o.cows = append(o.cows, block.MemoryFrom(b.cows[i]))
		if err := o.attach(i); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// images returns what the devices hold now.
func (o *ours) images() images {
	b := images{disk: o.disk.Bytes()}
	for _, c := range o.cows {
		b.cows = append(b.cows, c.Bytes())
	}
	return b
}

func (o *ours) attach(i int) error {
	c := o.s.snaps[i]
	kind, err := kernelcase.ParseStoreType(c.store)
	if err != nil {
		return err
	}
	o.snaps[i], err = o.origin.Attach(o.cows[i], snapshot.Options{Store: kind, ChunkSectors: uint32(c.chunk), Size: c.length * 512, Sync: o.sync,
		Features: snapshot.Features{DiscardZeroesCOW: c.discards(), DiscardPassdownOrigin: strings.Contains(c.features, "passdown")}})
	return err
}

// fit cuts a write down to one piece when some store has not space for all of it: of a request that
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
		c.cowSectors = grown(*c, st.n)
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
