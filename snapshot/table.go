package snapshot

import (
	"errors"
	"fmt"
	"strings"
)

// StoreType is where exceptions are kept, and what a full COW device means for writes to the snapshot, as in a table
// line (docs/spec/dm-snapshot.md §5.1).
type StoreType uint8

const (
	Persistent         StoreType = iota // P: on disk; a full COW device invalidates
	PersistentOverflow                  // PO: on disk; a full COW device refuses snapshot writes
	Transient                           // N: in memory
)

// String returns "P", "PO" or "N".
func (t StoreType) String() string { return [...]string{"P", "PO", "N"}[t] }

// The errors of options and loading (docs/spec/dm-snapshot.md §5.1).
var (
	ErrPassdown    = errors.New("feature discard_passdown_origin requires discard_zeroes_cow")
	ErrChunkNotSet = errors.New("chunk size is not set")
	ErrSameDevice  = errors.New("the COW device is the origin device")
)

// The three targets' names.
const (
	TargetSnapshot = "snapshot"
	TargetOrigin   = "snapshot-origin"
	TargetMerge    = "snapshot-merge"
)

// A Table is a line as dmsetup prints it (docs/spec/dm-snapshot.md §5.1):
//
//	<start> <length> snapshot        <origin> <COW> <store> <chunk size> [<n> <feature>...]
//	<start> <length> snapshot-merge  <origin> <COW> <store> <chunk size> [<n> <feature>...]
//	<start> <length> snapshot-origin <origin>
type Table struct {
	Start, Length uint64 // sectors
	Target        string
	Origin, COW   string // as written: a path, or major:minor
	Store         StoreType
	ChunkSectors  uint32 // 0: not supplied
	Features
}

// Features are the optional arguments of a table (docs/spec/dm-snapshot.md §5.9).
type Features struct {
	DiscardZeroesCOW      bool // a discarded chunk that is stored in the COW device reads as zeros
	DiscardPassdownOrigin bool // discards also reach the origin device; needs DiscardZeroesCOW
}

// Check returns ErrPassdown for an invalid combination.
func (f Features) Check() error {
	if f.DiscardPassdownOrigin && !f.DiscardZeroesCOW {
		return ErrPassdown
	}
	return nil
}

// String returns t as `dmsetup table` prints it (docs/spec/dm-snapshot.md §6.4).
func (t Table) String() string {
	s := fmt.Sprintf("%d %d %s %s", t.Start, t.Length, t.Target, t.Origin)
	if t.Target == TargetOrigin {
		return s
	}
	s += fmt.Sprintf(" %s %s %d", t.COW, t.Store, t.ChunkSectors)
	var on []string
	if t.DiscardZeroesCOW {
		on = append(on, "discard_zeroes_cow")
	}
	if t.DiscardPassdownOrigin {
		on = append(on, "discard_passdown_origin")
	}
	if len(on) > 0 {
		s += fmt.Sprintf(" %d %s", len(on), strings.Join(on, " "))
	}
	return s
}
