package kernelcase

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
)

// The errors of table lines (docs/spec/dm-snapshot.md §5.1).
var (
	ErrStoreType       = errors.New("exception store type is not P or N")
	ErrArguments       = errors.New("a snapshot table requires 4 or more arguments")
	ErrOriginArguments = errors.New("a snapshot-origin table requires one argument")
	ErrFeatureCount    = errors.New("invalid number of feature arguments")
	ErrFeature         = errors.New("unknown feature")
	ErrChunkSize       = errors.New("invalid chunk size")
)

// ParseTable reads one table line.
func ParseTable(line string) (snapshot.Table, error) {
	w := strings.Fields(line)
	if len(w) < 3 {
		return snapshot.Table{}, errors.New("table line has no start, length and target")
	}
	var t snapshot.Table
	var err error
	if t.Start, err = strconv.ParseUint(w[0], 10, 64); err != nil {
		return snapshot.Table{}, fmt.Errorf("start %q: not a number of sectors", w[0])
	}
	if t.Length, err = strconv.ParseUint(w[1], 10, 64); err != nil {
		return snapshot.Table{}, fmt.Errorf("length %q: not a number of sectors", w[1])
	}
	if t.Start != 0 {
		return snapshot.Table{}, fmt.Errorf("start %d: snapshot targets begin at sector 0", t.Start)
	}
	t.Target = w[2]
	args := w[3:]
	switch t.Target {
	case snapshot.TargetOrigin:
		if len(args) != 1 {
			return snapshot.Table{}, ErrOriginArguments
		}
		t.Origin = args[0]
		return t, nil
	case snapshot.TargetSnapshot, snapshot.TargetMerge:
	default:
		return snapshot.Table{}, fmt.Errorf("target %q is none of %s, %s, %s", t.Target, snapshot.TargetSnapshot, snapshot.TargetOrigin, snapshot.TargetMerge)
	}
	if len(args) < 4 {
		return snapshot.Table{}, ErrArguments
	}
	t.Origin, t.COW = args[0], args[1]
	if t.Features, err = parseFeatures(args[4:]); err != nil {
		return snapshot.Table{}, err
	}
	if t.Origin == t.COW {
		return snapshot.Table{}, snapshot.ErrSameDevice
	}
	if t.Store, err = ParseStoreType(args[2]); err != nil {
		return snapshot.Table{}, err
	}
	if t.ChunkSectors, err = ParseChunkArgument(args[3]); err != nil {
		return snapshot.Table{}, err
	}
	return t, nil
}

// parseFeatures reads the words after the chunk size: a count, then as many features; more words are
// ignored.
func parseFeatures(w []string) (f snapshot.Features, err error) {
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

// ParseStoreType reads the third argument of a snapshot table: the first letter decides, in either case; after P an O
// may follow, and the rest is ignored (docs/spec/dm-snapshot.md §5.1).
func ParseStoreType(s string) (snapshot.StoreType, error) {
	u := strings.ToUpper(s)
	switch {
	case strings.HasPrefix(u, "N"):
		return snapshot.Transient, nil
	case strings.HasPrefix(u, "PO"):
		return snapshot.PersistentOverflow, nil
	case u == "P":
		return snapshot.Persistent, nil
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
