package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/dmsnap/dmsnap/test/e2e/faultfs"
)

// What a world does while its server runs.

// span returns a range: mostly whole sectors, sometimes bytes, sometimes long.
func (w *world) span() (off, n int64) {
	n = int64(1+w.r.IntN(16)) * sectorSize
	switch w.r.IntN(10) {
	case 0:
		n = int64(1 + w.r.IntN(3000))
	case 1:
		n = int64(1+w.r.IntN(256)) * sectorSize
	case 2, 3:
		n = int64(1+w.r.IntN(8)) * 4096
	}
	n = min(n, w.size)
	off = w.r.Int64N(w.size - n + 1)
	switch w.r.IntN(10) {
	case 0:
	case 1, 2, 3:
		off = off / 4096 * 4096
	default:
		off = off / sectorSize * sectorSize
	}
	if w.chance(30) { // where others have been
		off = off / 8 / sectorSize * sectorSize
	}
	return off, n
}

// sectorSpan returns a range of whole sectors.
func (w *world) sectorSpan() (off, n int64) {
	off, n = w.span()
	off = off / sectorSize * sectorSize
	return off, max(n/sectorSize*sectorSize, sectorSize)
}

// read reads a range and compares it.
func (w *world) read(export string, off, n int64) {
	got, err := w.conn(export).read(off, n)
	if err != nil {
		w.failed(export, "read", err)
		return
	}
	if err := w.modelOf(export).observe(off, got); err != nil {
		w.fail("read of %s at %d+%d: %w", export, off, n, err)
	}
}

// change sends a request that makes off read as p, and takes its answer. Where the request may leave
// things as they are, optional is true.
func (w *world) change(export string, cmd, flags uint16, off int64, p []byte, optional bool) {
	c, d := w.conn(export), w.modelOf(export)
	var payload []byte
	if cmd == cmdWrite {
		payload = p
	}
	cookie, err := c.send(cmd, flags, off, int64(len(p)), payload)
	w.must(err, "send")
	a, err := c.receive(300 * time.Millisecond)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if w.policy == "pause" && w.limited && w.anyFull() {
			w.paused(c, export, off, p)
			return
		}
		a, err = c.receive(answerTimeout)
	}
	w.must(err, fmt.Sprintf("command %d of %s", cmd, export))
	if a.cookie != cookie {
		w.fail("an answer to request %d instead of %d", a.cookie, cookie)
	}
	if cmd == cmdWriteZeroes && flags&flagFastZero != 0 && a.err == nbdError(nbdENOTSUP) {
		w.count("not fast")
		w.read(export, off, int64(len(p)))
		return
	}
	if a.err != nil {
		d.attempt(off, p, false)
		w.failed(export, fmt.Sprintf("command %d at %d+%d", cmd, off, len(p)), a.err)
		if v := w.viewOf(export); v == nil || !v.invalid {
			w.read(export, off, int64(len(p)))
		}
		return
	}
	if optional {
		d.attempt(off, p, false)
		w.read(export, off, int64(len(p)))
	} else {
		d.write(off, p)
	}
	if !optional && (flags&flagFUA != 0 || w.sync == "always" && !w.isOrigin(export)) {
		d.durable(off, int64(len(p)))
	}
}

// anyFull reports whether the server says that a COW device is full.
func (w *world) anyFull() bool {
	st, err := w.server.status()
	w.must(err, "status")
	return slices.ContainsFunc(st.Snapshots, func(s snapshotStatus) bool { return s.Full })
}

// paused is about a change that waits for space: one way out of it is taken.
func (w *world) paused(c *conn, export string, off int64, p []byte) {
	way := []string{"grow", "grow", "vanish", "term", "kill"}[w.r.IntN(5)]
	w.logf("the change of %s at %d+%d waits for space: %s", export, off, len(p), way)
	w.count("paused: " + way)
	d := w.modelOf(export)
	switch way {
	case "grow":
		for _, v := range w.views {
			if !v.limited || v.invalid {
				continue
			}
			v.size += 2 << 20
			err := w.server.api("POST", "snapshots/"+v.name+"/grow", map[string]any{"size": v.size}, nil)
			w.must(err, "grow")
		}
		a, err := c.receive(answerTimeout)
		w.must(err, "the change that waited for space, after it was made")
		if a.err != nil {
			w.fail("the change that waited for space, after it was made: %w", a.err)
		}
		d.write(off, p)
	case "vanish":
		d.attempt(off, p, false)
		w.forget(c)
		w.waitFor("the request of the dead connection goes", func() bool { return true })
		time.Sleep(200 * time.Millisecond)
	case "term":
		d.attempt(off, p, false)
		w.stop("term")
		w.start()
	case "kill":
		d.attempt(off, p, false)
		w.stop("kill")
		w.start()
	}
}

func (w *world) opWrite() {
	export := w.some()
	off, n := w.span()
	var flags uint16
	if w.chance(10) {
		flags = flagFUA
	}
	w.logf("write %s %d+%d flags %d", export, off, n, flags)
	w.count("write")
	w.change(export, cmdWrite, flags, off, w.content(n), false)
}

func (w *world) opZero() {
	export := w.some()
	off, n := w.span()
	var flags uint16
	for _, f := range []uint16{flagFUA, flagNoHole, flagFastZero} {
		if w.chance(25) {
			flags |= f
		}
	}
	w.logf("zero %s %d+%d flags %d", export, off, n, flags)
	w.count("zero")
	w.change(export, cmdWriteZeroes, flags, off, make([]byte, n), false)
}

func (w *world) opTrim() {
	export := w.some()
	off, n := w.span()
	c := w.conn(export)
	if c.flags&(1<<5) == 0 {
		return
	}
	w.logf("trim %s %d+%d", export, off, n)
	w.count("trim")
	w.change(export, cmdTrim, 0, off, make([]byte, n), true)
}

func (w *world) opRead() {
	off, n := w.span()
	w.count("read")
	w.read(w.some(), off, n)
}

func (w *world) opFlush() {
	export := w.some()
	w.logf("flush %s", export)
	w.count("flush")
	if err := w.conn(export).flush(); err != nil {
		w.failed(export, "flush", err)
		return
	}
	w.flushed(export)
}

// opStatus compares block status with the content.
func (w *world) opStatus() {
	export := w.some()
	off, n := w.span()
	if w.chance(30) {
		off, n = 0, w.size
	}
	var flags uint16
	if w.chance(20) {
		flags = flagReqOne
	}
	w.count("block status")
	c := w.conn(export)
	a, err := c.call(cmdBlockStatus, flags, off, n, nil)
	if err != nil {
		w.failed(export, "block status", err)
		return
	}
	d := w.modelOf(export)
	for name, list := range a.extents {
		at := off
		for i, e := range list {
			end := min(at+e.n, off+n)
			if e.n <= 0 || at >= off+n || e.n+at > off+n && (i < len(list)-1 || flags&flagReqOne != 0) {
				w.fail("block status of %s at %d+%d: %s has extent %d of %d bytes at %d", export, off, n, name, i, e.n, at)
			}
			if name == "base:allocation" && e.flags&2 != 0 {
				if err := w.zeroThere(d, at, end); err != nil {
					w.fail("block status of %s at %d+%d: %d+%d is zero (flags %d): %w", export, off, n, at, e.n, e.flags, err)
				}
			}
			// What is not in the COW device is the origin's.
			if name == "dmsnap:changed" && e.flags&1 == 0 && !w.isOrigin(export) {
				if err := w.sameAsOrigin(d, at, end); err != nil {
					w.fail("block status of %s at %d+%d: %d+%d is not changed: %w", export, off, n, at, e.n, err)
				}
			}
			at = end
		}
		if flags&flagReqOne != 0 && len(list) != 1 {
			w.fail("%d extents with REQ_ONE", len(list))
		}
	}
	if len(a.extents) != len(c.contexts) {
		w.fail("block status of %s has %d contexts", export, len(a.extents))
	}
}

// zeroThere checks that the model has zeros from at to end, where it is certain.
func (w *world) zeroThere(d *device, at, end int64) (err error) {
	sectors(at, end-at, func(s, from, to int64) {
		if len(d.also[s])+len(d.late[s]) == 0 && len(bytes.Trim(d.sector(s)[from:to], "\x00")) > 0 && err == nil {
			err = fmt.Errorf("sector %d holds %s", s, describe(d.sector(s)[from:to]))
		}
	})
	return err
}

func (w *world) sameAsOrigin(d *device, at, end int64) (err error) {
	if w.merging != nil {
		return nil // what lies beneath is on its way
	}
	o := w.origin
	sectors(at, end-at, func(s, from, to int64) {
		if len(d.also[s])+len(d.late[s])+len(o.also[s])+len(o.late[s]) == 0 && !bytes.Equal(d.sector(s)[from:to], o.sector(s)[from:to]) && err == nil {
			err = fmt.Errorf("sector %d holds %s, the origin %s", s, describe(d.sector(s)[from:to]), describe(o.sector(s)[from:to]))
		}
	})
	return err
}

// opBatch sends several writes to different sectors at once, and takes the answers in any order.
func (w *world) opBatch() {
	if w.limited && w.policy == "pause" {
		return
	}
	export := w.some()
	c, d := w.conn(export), w.modelOf(export)
	type sent struct {
		off int64
		p   []byte
	}
	all := map[uint64]sent{}
	off, _ := w.span()
	off = off / sectorSize * sectorSize
	w.logf("batch %s from %d", export, off)
	w.count("batch")
	for range 2 + w.r.IntN(20) {
		n := int64(1+w.r.IntN(8)) * sectorSize
		if off+n > w.size {
			break
		}
		p := w.content(n)
		cookie, err := c.send(cmdWrite, 0, off, n, p)
		w.must(err, "send")
		all[cookie] = sent{off, p}
		off += n + int64(w.r.IntN(4))*sectorSize
	}
	var failures []error
	for range len(all) {
		a, err := c.receive(answerTimeout)
		w.must(err, "an answer to a batch")
		x := all[a.cookie]
		if a.err != nil {
			d.attempt(x.off, x.p, false)
			failures = append(failures, a.err)
		} else {
			d.write(x.off, x.p)
		}
	}
	for _, err := range failures {
		if v := w.viewOf(export); v != nil && v.invalid {
			return
		}
		w.failed(export, "batch", err)
	}
	if v := w.viewOf(export); v == nil || !v.invalid {
		for _, x := range all {
			w.read(export, x.off, int64(len(x.p)))
		}
	}
}

// opVanish sends requests and closes the connection in the middle of one, or before the answers.
func (w *world) opVanish() {
	export := w.some()
	c, d := w.conn(export), w.modelOf(export)
	w.count("vanish")
	whole := w.r.IntN(4)
	for range whole {
		off, n := w.sectorSpan()
		p := w.content(n)
		_, err := c.send(cmdWrite, 0, off, n, p)
		w.must(err, "send")
		w.logf("vanish %s: whole write %d+%d", export, off, n)
		d.attempt(off, p, true)
	}
	off, n := w.span()
	b := encode(cmdWrite, 0, 1<<40, off, n, w.content(n))
	cut := w.r.IntN(len(b))
	if w.chance(30) {
		cut = w.r.IntN(28)
	}
	w.logf("vanish %s: %d bytes of a write %d+%d", export, cut, off, n)
	if _, err := c.net.Write(b[:cut]); err != nil {
		w.fail("send: %w", err)
	}
	w.forget(c)
	if whole == 0 {
		w.read(export, off, n)
	}
}

// opWrongRequest sends what is not allowed; the connection goes on.
func (w *world) opWrongRequest() {
	export := w.some()
	c := w.conn(export)
	q := []struct {
		cmd, flags uint16
		off, n     int64
		want       []uint32
	}{
		{cmdRead, 0, w.size, 1, []uint32{nbdEINVAL}},
		{cmdRead, 0, w.size - 1, 2, []uint32{nbdEINVAL}},
		{cmdRead, 0, 0, 0, []uint32{nbdEINVAL}},
		{cmdRead, 0, -512, 512, []uint32{nbdEINVAL}},
		{cmdRead, 1 << 9, 0, 512, []uint32{nbdEINVAL}},
		{cmdFlush, flagNoHole, 0, 0, []uint32{nbdEINVAL}},
		{cmdTrim, 0, w.size, 512, []uint32{nbdEINVAL, nbdENOSPC}},
		{cmdWriteZeroes, 0, w.size - 512, 1024, []uint32{nbdEINVAL, nbdENOSPC}},
		{cmdWriteZeroes, flagReqOne, 0, 512, []uint32{nbdEINVAL}},
		{cmdBlockStatus, 0, 0, 0, []uint32{nbdEINVAL}},
		{77, 0, 0, 512, []uint32{nbdEINVAL}},
	}[w.r.IntN(11)]
	w.logf("wrong request %s: %+v", export, q)
	w.count("wrong request")
	_, err := c.call(q.cmd, q.flags, q.off, q.n, nil)
	var n nbdError
	if !errors.As(err, &n) || !slices.Contains(q.want, uint32(n)) {
		w.fail("the wrong request %+v of %s was answered with %v", q, export, err)
	}
	off, length := w.span()
	w.read(export, off, length)
}

// opRefusedVerb runs verbs on files that the server uses: all but status are refused.
func (w *world) opRefusedVerb() {
	if len(w.views) == 0 {
		return
	}
	v := w.views[w.r.IntN(len(w.views))]
	w.count("refused verb")
	switch w.r.IntN(5) {
	case 0:
		w.want(2, run("check", v.cow))
	case 1:
		w.want(2, run("export", w.originPath, v.cow, w.dir+"/no"))
	case 2:
		w.want(2, run("merge", w.originPath, v.cow))
	case 3:
		w.want(2, run("create", "--force", w.originPath, v.cow))
	case 4:
		w.want(0, run("status", v.cow))
	}
}

// answered waits until what is late can't come any more: it sleeps, and takes what it sees then permanently.
func (w *world) answered() {
	time.Sleep(100 * time.Millisecond)
	for _, export := range w.exports() {
		if d := w.modelOf(export); len(d.late) > 0 {
			for s, list := range d.late {
				for _, b := range list {
					d.also[s] = put(d.also[s], b)
				}
			}
			clear(d.late)
			w.read(export, 0, w.size)
		}
	}
}

// late reports whether requests of dead connections may still be under way.
func (w *world) anyLate() bool {
	return slices.ContainsFunc(w.devices(), func(d *device) bool { return len(d.late) > 0 })
}

func (w *world) opAttach() {
	if len(w.views) >= 4 || w.merging != nil && !w.mergeDone {
		return
	}
	if w.anyLate() {
		w.answered()
	}
	if w.mergeDone {
		w.origin = w.merging.d
	}
	w.newView(false)
}

func (w *world) opDrop() {
	if len(w.views) < 2 && !w.chance(10) || len(w.views) == 0 {
		return
	}
	v := w.views[w.r.IntN(len(w.views))]
	w.logf("drop %s", v.name)
	err := w.server.api("DELETE", "snapshots/"+v.name, nil, nil)
	if w.merging == v && err == nil {
		w.mergeDone = true
	}
	if w.merging == v && !w.mergeDone {
		var refused *apiError
		if !errors.As(err, &refused) || refused.Code != "merging" {
			w.fail("drop of a snapshot under merge: %w", err)
		}
		return
	}
	if err != nil && !w.faulty && !v.invalid {
		w.fail("drop of %s: %w", v.name, err)
	}
	w.count("drop")
	w.forgetAll(v.name)
	if w.merging == v {
		w.origin = v.d
		w.merging, w.before, w.mergeDone = nil, nil, false
	}
	w.remove(v)
	if len(w.views) == 0 && !w.chance(20) {
		w.opAttach()
	}
}

func (w *world) opGrow() {
	for _, v := range w.views {
		if v.limited && !v.invalid {
			v.size += int64(w.r.IntN(200)) << 10
			w.logf("grow %s to %d", v.name, v.size)
			err := w.server.api("POST", "snapshots/"+v.name+"/grow", map[string]any{"size": v.size}, nil)
			var refused *apiError
			if errors.As(err, &refused) && refused.Code == "bad_request" {
				continue // --grow has made it longer
			}
			if !w.faulty {
				w.must(err, "grow")
			}
		}
	}
}

// opMerge begins a live merge, or goes on with one: pauses, resumes, waits.
func (w *world) opMerge() {
	if w.merging == nil {
		if len(w.views) == 0 {
			return
		}
		v := w.views[w.r.IntN(len(w.views))]
		if v.invalid {
			return
		}
		if w.anyLate() {
			w.answered()
		}
		w.logf("merge %s", v.name)
		w.count("merge")
		err := w.server.api("POST", "merge", map[string]any{"name": v.name}, nil)
		if err != nil {
			w.logf("refused: %v", err)
			if !w.faulty && !(w.limited && w.policy != "invalidate") && !w.becameInvalid(v) {
				w.fail("merge of %s: %w", v.name, err)
			}
			return
		}
		w.merging, w.before, w.mergeDone = v, w.origin.copyOf(), false
		v.d.merged = map[int64][][]byte{}
		if w.chance(50) {
			w.must(w.server.api("POST", "merge/pause", nil, nil), "pause")
		}
		return
	}
	if w.mergeDone {
		return
	}
	switch w.r.IntN(4) {
	case 0:
		w.must(w.server.api("POST", "merge/pause", nil, nil), "pause")
	case 1:
		w.must(w.server.api("POST", "merge/resume", nil, nil), "resume")
	case 2:
		w.lookAtMerge("merge")
	case 3:
		w.must(w.server.api("POST", "merge/resume", nil, nil), "resume")
		if w.limited && w.policy == "pause" {
			w.lookAtMerge("merge?wait=1")
		} else {
			w.lookAtMerge("merge?wait=30")
		}
	}
}

func (w *world) lookAtMerge(path string) {
	var m mergeStatus
	w.must(w.server.api("GET", path, nil, &m), "merge status")
	w.logf("merge: %+v", m)
	switch m.State {
	case "running", "paused":
		if path != "merge" && !(w.limited && w.policy == "pause") { // it may wait for space in another COW device
			w.fail("the merge does not end: %+v\n%.20000s", m, w.server.log())
		}
	case "failed":
		if !w.faulty && !w.limited { // another snapshot may have no space for what the merge overwrites
			w.fail("the merge failed: %+v", m)
		}
	case "done":
		w.mergeDone = true
		w.origin = w.merging.d
		w.count("merge done")
	default:
		w.fail("the merge is %+v", m)
	}
}

// opInject makes something fail until the server is restarted.
func (w *world) opInject() {
	if w.fs == nil || w.faulty || os.Getenv("DMSNAP_E2E_INJECT") == "0" {
		return
	}
	ops := []faultfs.Op{faultfs.Fsync, faultfs.Fsync, faultfs.Fsync, faultfs.Write, faultfs.Read, faultfs.Allocate, faultfs.Punch}
	r := faultfs.Rule{Op: ops[w.r.IntN(len(ops))], Errno: syscall.EIO, Skip: w.r.IntN(4), Count: []int{0, 1, 1, 2}[w.r.IntN(4)], Every: 1 + w.r.IntN(2)}
	if w.chance(30) && r.Op != faultfs.Read {
		r.Errno = syscall.ENOSPC
	}
	files := []string{"disk.img", "*.cow"}
	for _, v := range w.views {
		files = append(files, v.name+".cow")
	}
	r.File = files[w.r.IntN(len(files))]
	w.logf("inject %+v", r)
	w.count("inject")
	w.faulty, w.again = true, r.Count != 1
	for _, d := range w.devices() {
		d.evicted = r.Op == faultfs.Fsync
	}
	w.must(w.fs.Add(r), "faultfs")
}
