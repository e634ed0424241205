package snapshot_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
)

// What a lab's user learns of a failure, and what it costs: the rules, one a kind of call.

// callKind is what the user of a lab did.
type callKind uint8

const (
	callAttach callKind = iota
	callWrite
	callDiscard
	callFlush
	callRead
	callClose
	callOriginWrite
	callOriginFlush
	callOriginRead
	callBeginMerge
	callLoadMerge
	callStep
	callCloseMerge
)

var callNames = [...]string{"attach", "write", "discard", "flush", "read", "close", "write to the origin", "flush of the origin",
	"read of the origin", "begin of the merge", "loading of the merge", "merge step", "end of the merge"}

// A call is one thing that the user does.
type call struct {
	kind callKind
	on   *labCOW   // nil: the origin
	full []*labCOW // which have no space for it
	want error     // what it is to be refused with
	fua  bool
}

func (h hit) String() string {
	if h.cow == nil {
		return fmt.Sprintf("ORIGIN %v (%d)", h.op, h.op.N)
	}
	return fmt.Sprintf("%s %v (%d)", h.cow.name, h.op, h.op.N)
}

func (c call) String() string {
	if c.on == nil {
		return callNames[c.kind]
	}
	return c.on.name + " " + callNames[c.kind]
}

// An injection fails an operation of a lab's disks.
type injection struct {
	disk int  // the number of the COW device, -1: the origin's disk
	n    int  // the operation's number on that disk
	all  bool // and all later ones
	odd  bool // and of the later ones every second
	err  error
	keep bool  // the snapshots are protected (FullFail), and err is a lack of space
	hits []hit // of the call under way
	took int   // hits altogether
}

// A hit is an operation that was failed.
type hit struct {
	cow     *labCOW
	op      blocktest.Op
	inPlace bool // it was to change a chunk that had an exception
}

// decide fails what is to be failed. It may be called concurrently.
func (l *lab) decide(c *labCOW, op blocktest.Op) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	in := l.inject
	if in == nil || c.number() != in.disk || op.N < in.n || !in.all && op.N > in.n && !(in.odd && (op.N-in.n)%2 == 0) {
		return nil
	}
	in.took++
	in.hits = append(in.hits, hit{c, op, c != nil && c.used.inPlace(op)})
	return in.err
}

// number is that of the COW device, -1 for nil, the origin.
func (c *labCOW) number() int {
	if c == nil {
		return -1
	}
	return slices.Index(c.cows, c)
}

// use is how much of a COW device was in use when a call began.
type use struct {
	ondisk.Layout
	chunks uint64
}

// inPlace reports whether an operation changes data that were there.
func (u use) inPlace(op blocktest.Op) bool {
	if u.ChunkSectors == 0 || !op.Kind.Changes() {
		return false
	}
	chunk := ondisk.COWChunk(op.Off / u.ChunkBytes())
	return u.IsData(chunk) && uint64(chunk) < u.chunks
}

// status is that of the snapshot, or of the merge that has its store. ok is false when nobody has it.
func (c *labCOW) status() (st snapshot.Status, ok bool) {
	switch {
	case c.snap != nil:
		return c.snap.Status(), true
	case c.lab.merged == c && c.lab.merge != nil:
		return c.lab.merge.Status(), true
	}
	return st, false
}

// call does something, and holds what became of it against the rules.
func (l *lab) call(c call, do func() error) {
	l.t.Helper()
	if l.inject == nil {
		l.withoutFault(c, do())
		l.look(c.String())
		return
	}
	if c.kind == callOriginWrite || c.kind == callStep {
		l.forgetDetached()
	}
	before := make(map[*labCOW]snapshot.Status)
	for _, s := range l.cows {
		s.marked, s.used = nil, use{}
		if st, ok := s.status(); ok {
			before[s] = st
			s.used = use{ondisk.Layout{ChunkSectors: st.ChunkSectors}, st.Allocated / uint64(max(1, st.ChunkSectors))}
		}
		if s.state == live {
			s.set(doubtful)
		}
	}
	l.mu.Lock()
	l.inject.hits = nil
	l.mu.Unlock()
	err := do()
	l.mu.Lock()
	hits := l.inject.hits
	l.mu.Unlock()
	if err := l.withFault(c, err, hits, before); err != nil {
		l.t.Errorf("%v, with %v: %v", c, hits, err)
	}
	l.look(c.String())
}

// forgetDetached: a snapshot that a fault left with too few exceptions, and that was closed, is not kept by
// an origin that changes without it. (Without faults the scenarios see to it that it needs no more.)
func (l *lab) forgetDetached() {
	for _, c := range l.cows {
		if c.snap == nil && c.state == live && c != l.merged && l.sick[c] {
			c.set(unmarked)
		}
	}
}

// withoutFault: everything succeeds, but for what has no space.
func (l *lab) withoutFault(c call, err error) {
	l.t.Helper()
	if !errors.Is(err, c.want) {
		l.t.Fatalf("%v: %v, want %v", c, err, c.want)
	}
	for _, s := range c.full {
		if s.opts.Store == snapshot.PersistentOverflow && c.on == s {
			continue // it keeps what it has
		}
		if st := s.snap.Status().State; st != snapshot.StateInvalid {
			l.t.Fatalf("%v: %s is %s", c, s.name, st)
		}
		s.set(dead)
	}
}

// An outcome is what a call has to come to.
type outcome struct {
	fails bool
	lost  []*labCOW // which become invalid
	one   bool      // one snapshot becomes invalid, of those that had to copy
}

// rule says what a hit means for a call that it happened in.
func (l *lab) rule(c call, h hit) (o outcome) {
	ofMerge := h.cow != nil && h.cow == l.merged
	if l.inject.keep {
		return outcome{fails: true} // a write that needs the space is refused, and nothing is lost
	}
	switch c.kind {
	case callWrite, callFlush:
		// Data that can't be written where they already were are the caller's trouble; a chunk that can't be
		// copied, a slot or a flush that fails cost the snapshot.
		if o.fails = true; !h.inPlace {
			o.lost = []*labCOW{c.on}
		}
	case callOriginWrite, callStep:
		switch {
		case ofMerge:
			o.fails = true
		case h.cow != nil: // a snapshot that fails costs nobody else anything
			o.lost = []*labCOW{h.cow}
		case h.op.Kind == blocktest.Read:
			o.one = true
		default:
			o.fails = true
		}
	default:
		o.fails = true
	}
	return o
}

// withFault holds a call against the rules, when something failed in it or has failed before.
func (l *lab) withFault(c call, err error, hits []hit, before map[*labCOW]snapshot.Status) error {
	var want outcome
	sick := maps.Clone(l.sick)
	for _, h := range hits {
		o := l.rule(c, h)
		want.fails, want.one = want.fails || o.fails, want.one || o.one
		want.lost = append(want.lost, o.lost...)
		l.sick[h.cow] = l.sick[h.cow] || l.inject.keep || h.op.Kind == blocktest.Flush || h.op.Kind == blocktest.WriteDurable || c.kind == callBeginMerge || c.kind == callStep
	}
	if l.caches != nil && l.merged != nil && l.sick[l.merged] {
		// What was written to its chunks and not flushed is gone when the store is loaded past the cache. Every later
		// flush of the origin says so.
		l.unacknowledge(l.raw)
	}
	if l.forgets {
		for _, s := range l.cows {
			if l.sick[s] {
				l.unacknowledge(s.view) // what was written in place and not flushed is gone, or not
			}
		}
	}
	var lost []*labCOW
	for s, st := range before {
		if s.snap == nil {
			continue // closed, or handed over
		}
		now := s.snap.Status().State
		switch {
		case now != snapshot.StateInvalid:
			if s.state == doubtful {
				s.set(live)
			}
		case st.State != snapshot.StateInvalid:
			lost = append(lost, s)
			if s.set(dead); s.marked != nil {
				s.set(unmarked)
			}
		}
	}
	for _, s := range l.cows {
		if s.snap == nil && s.state == doubtful {
			s.set(live)
		}
	}
	if len(hits) > 0 || l.inject.keep {
		for _, s := range c.full {
			// It may have got its error before it was full; or it is kept, and stays full.
			l.sick[s] = true
		}
	}
	if l.inject.keep && len(lost) > 0 {
		return fmt.Errorf("%s was not kept", lost[0].name)
	}
	return l.compare(c, err, want, lost, before, sick)
}

// mayFail: what failed before may fail this call.
func (l *lab) mayFail(c call, sick map[*labCOW]bool) bool {
	ofMerge := l.merged != nil && (sick[nil] || sick[l.merged])
	switch {
	case l.inject.keep && (c.kind == callOriginWrite || c.kind == callStep):
		return len(sick) > 0 || len(c.full) > 0 // one that has no space fails what it would have to keep
	case c.on != nil && c.kind < callBeginMerge:
		return sick[c.on]
	case c.kind == callOriginWrite:
		return sick[nil] && c.fua || l.merged != nil && sick[l.merged]
	}
	return sick[nil] || sick[c.on] || ofMerge
}

// compare says where what happened is not what had to.
func (l *lab) compare(c call, err error, want outcome, lost []*labCOW, before map[*labCOW]snapshot.Status, sick map[*labCOW]bool) error {
	st, loaded := before[c.on]
	if c.on != nil && loaded && st.Target == snapshot.TargetSnapshot && st.State == snapshot.StateInvalid {
		switch c.kind { // it refuses everything, and says why
		case callWrite, callRead, callDiscard:
			if !isInvalid(err) {
				return fmt.Errorf("an invalid snapshot says %v", err)
			}
			return nil
		}
	}
	want.fails = want.fails || c.want != nil && !sick[c.on] // else it may have space left
	if err == nil && want.fails {
		return errors.New("nothing was reported")
	}
	if err != nil && !want.fails && !l.mayFail(c, sick) {
		return fmt.Errorf("failed: %w", err)
	}
	if c.kind == callStep && err != nil {
		now := l.merge.Status()
		if !errors.Is(err, snapshot.ErrMergeFailed) || now.State != snapshot.StateMergeFailed {
			return fmt.Errorf("state %s after %w", now.State, err)
		}
		// A store that failed is loaded again first, and may have got as far as it was asked to.
		if now.Exceptions != st.Exceptions && !(sick[l.merged] && now.Exceptions < st.Exceptions) ||
			now.Exceptions == st.Exceptions && now.Usage != st.Usage {
			return fmt.Errorf("%d exceptions, %v; before the step that failed %d, %v", now.Exceptions, now.Usage, st.Exceptions, st.Usage)
		}
	}
	for _, s := range want.lost {
		if s.state != dead && s.state != unmarked {
			return fmt.Errorf("%s is still valid", s.name)
		}
	}
	if want.one && len(lost) == 0 {
		return errors.New("no snapshot became invalid")
	}
	if want.one {
		return nil
	}
	for _, s := range lost {
		if !slices.Contains(want.lost, s) && !slices.Contains(c.full, s) && !sick[s] {
			return fmt.Errorf("%s became invalid: %v", s.name, s.snap.Flush())
		}
	}
	return nil
}
