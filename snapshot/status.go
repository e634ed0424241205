package snapshot

import (
	"fmt"

	"github.com/dmsnap/dmsnap/store"
)

// State is the state of a snapshot or a merge, in one word. The words are stable: the command line prints them.
type State string

const (
	StateOK          State = "ok"
	StateInvalid     State = "invalid"
	StateFailed      State = "failed" // the store refuses writes until it is loaded again; what was durable is intact
	StateOverflow    State = "overflow"
	StateMerging     State = "merging"
	StateMergeFailed State = "merge-failed"
)

// A Status is the state of a snapshot or a merge at one moment.
type Status struct {
	Target     string // TargetSnapshot or TargetMerge
	State      State
	Overflowed bool   // also set during the merge of an overflowed snapshot (docs/spec/dm-snapshot.md §8.2, H11)
	Full       bool   // there was no space for the last write that needed some, and it failed or waits (OnFull)
	Unmarked   bool   // invalid, but the COW device could not be marked so: see ErrUnmarked
	Err        error  // why the store refuses writes; nil: it accepts them
	Length     uint64 // sectors
	Store      StoreType
	Features
	ChunkSectors uint32 // 0 while a handover is awaited
	Exceptions   uint64
	store.Usage
}

// Text is the kernel's status text (STATUSTYPE_INFO, docs/spec/dm-snapshot.md §6.3): the first that matches of Invalid,
// Merge failed, Overflow, and the usage numbers.
func (st Status) Text() string {
	switch {
	case st.State == StateInvalid:
		return "Invalid"
	case st.State == StateMergeFailed:
		return "Merge failed"
	case st.Overflowed:
		return "Overflow"
	}
	return st.Usage.String()
}

// Line is the whole line of `dmsetup status`: "0 4096 snapshot 24/1024 16".
func (st Status) Line() string {
	return fmt.Sprintf("0 %d %s %s", st.Length, st.Target, st.Text())
}

// Table is the line of `dmsetup table` (docs/spec/dm-snapshot.md §6.4) for an origin and a COW device of these names.
func (st Status) Table(origin, cow string) string {
	return Table{Length: st.Length, Target: st.Target, Origin: origin, COW: cow,
		Store: st.Store, ChunkSectors: st.ChunkSectors, Features: st.Features}.String()
}

// Finished reports whether a merge has nothing left: the documentation's criterion, allocated == metadata sectors
// (docs/spec/dm-snapshot.md §6.7), counted by the exceptions themselves.
func (st Status) Finished() bool {
	return st.Target == TargetMerge && st.State == StateMerging && st.Exceptions == 0
}

// EventKind names what happened to a snapshot.
type EventKind string

const (
	EventInvalid           EventKind = "invalid"
	EventOverflow          EventKind = "overflow" // the kernel raises none (docs/spec/dm-snapshot.md §8.2, H12)
	EventFull              EventKind = "full"     // writes fail or wait, as OnFull says
	EventGrown             EventKind = "grown"
	EventMergeFailed       EventKind = "merge-failed"
	EventHandoverCancelled EventKind = "handover-cancelled"
	EventNotice            EventKind = "notice" // for the log; the state is unchanged
)

// An Event is what Options.Notify is called with.
type Event struct {
	Kind EventKind
	Text string // the kernel's log line where it has one
	Err  error  // the cause, or nil
}
