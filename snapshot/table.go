package snapshot

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/dmsnap/dmsnap/ondisk"
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

// The errors of table lines and loading (docs/spec/dm-snapshot.md §5.1).
var (
	ErrStoreType       = errors.New("exception store type is not P or N")
	ErrArguments       = errors.New("a snapshot table requires 4 or more arguments")
	ErrOriginArguments = errors.New("a snapshot-origin table requires one argument")
	ErrFeatureCount    = errors.New("invalid number of feature arguments")
	ErrFeature         = errors.New("unknown feature")
	ErrPassdown        = errors.New("feature discard_passdown_origin requires discard_zeroes_cow")
	ErrChunkSize       = errors.New("invalid chunk size")
	ErrChunkNotSet     = errors.New("chunk size is not set")
	ErrSameDevice      = errors.New("the COW device is the origin device")
)

// ParseStoreType reads the third argument of a snapshot table: the first letter decides, in either case; after P an O
// may follow, and the rest is ignored (docs/spec/dm-snapshot.md §5.1).
func ParseStoreType(s string) (StoreType, error) {
	u := strings.ToUpper(s)
	switch {
	case strings.HasPrefix(u, "N"):
		return Transient, nil
	case strings.HasPrefix(u, "PO"):
		return PersistentOverflow, nil
	case u == "P":
		return Persistent, nil
	case strings.HasPrefix(u, "P"):
		return 0, fmt.Errorf("unknown option %q of a persistent store", s[1:])
	}
	return 0, ErrStoreType
}

// ParseChunkArgument reads a table's chunk size in sectors: base 10, a leading + or zeros allowed, 0 for "not supplied"
// (docs/spec/dm-snapshot.md §2.3).
func ParseChunkArgument(s string) (uint32, error) {
	n, err := strconv.ParseUint(strings.TrimPrefix(s, "+"), 10, 32)
	if err != nil || strings.HasPrefix(s, "++") {
		return 0, fmt.Errorf("%w: %q", ErrChunkSize, s)
	}
	if n != 0 {
		if err := ondisk.CheckChunkSectors(uint32(n)); err != nil {
			return 0, err
		}
	}
	return uint32(n), nil
}

// The three targets' names.
const (
	TargetSnapshot = "snapshot"
	TargetOrigin   = "snapshot-origin"
	TargetMerge    = "snapshot-merge"
)

// A Table is a line as dmsetup takes it (docs/spec/dm-snapshot.md §5.1):
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

// ParseTable reads one table line.
func ParseTable(line string) (Table, error) {
	w := strings.Fields(line)
	if len(w) < 3 {
		return Table{}, errors.New("table line has no start, length and target")
	}
	var t Table
	var err error
	if t.Start, err = strconv.ParseUint(w[0], 10, 64); err != nil {
		return Table{}, fmt.Errorf("start %q: not a number of sectors", w[0])
	}
	if t.Length, err = strconv.ParseUint(w[1], 10, 64); err != nil {
		return Table{}, fmt.Errorf("length %q: not a number of sectors", w[1])
	}
	if t.Start != 0 {
		return Table{}, fmt.Errorf("start %d: snapshot targets begin at sector 0", t.Start)
	}
	t.Target = w[2]
	args := w[3:]
	switch t.Target {
	case TargetOrigin:
		if len(args) != 1 {
			return Table{}, ErrOriginArguments
		}
		t.Origin = args[0]
		return t, nil
	case TargetSnapshot, TargetMerge:
	default:
		return Table{}, fmt.Errorf("target %q is none of %s, %s, %s", t.Target, TargetSnapshot, TargetOrigin, TargetMerge)
	}
	if len(args) < 4 {
		return Table{}, ErrArguments
	}
	t.Origin, t.COW = args[0], args[1]
	if t.Features, err = parseFeatures(args[4:]); err != nil {
		return Table{}, err
	}
	if t.Origin == t.COW {
		return Table{}, ErrSameDevice
	}
	if t.Store, err = ParseStoreType(args[2]); err != nil {
		return Table{}, err
	}
	if t.ChunkSectors, err = ParseChunkArgument(args[3]); err != nil {
		return Table{}, err
	}
	return t, nil
}

// parseFeatures reads the words after the chunk size: a count, then as many features; more words are
// ignored.
func parseFeatures(w []string) (f Features, err error) {
	if len(w) == 0 {
		return f, nil
	}
	n, err := strconv.ParseUint(w[0], 10, 32)
	if err != nil || n > 2 || int(n) > len(w)-1 {
		return f, ErrFeatureCount
	}
	for _, word := range w[1 : 1+n] {
		switch strings.ToLower(word) {
		case "discard_zeroes_cow":
			f.DiscardZeroesCOW = true
		case "discard_passdown_origin":
			f.DiscardPassdownOrigin = true
		default:
			return f, ErrFeature
		}
	}
	return f, f.Check()
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
