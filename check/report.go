package check

import (
	"fmt"

	"github.com/dmsnap/dmsnap/ondisk"
)

// A Finding is one problem at one place.
type Finding struct {
	Code   Code
	Place  string // "area 3 slot 17, byte 0x1a10"
	Detail string // a sentence about what was found there
	Count  uint64 // how many slots, chunks or bytes are concerned, as Detail says; at least 1
}

// Problem is the table's row.
func (f Finding) Problem() Problem { return f.Code.Problem() }

// String is the finding on a line: "DS015 error: area 0 slot 2, byte 0x1020: origin chunk …".
func (f Finding) String() string {
	return fmt.Sprintf("%v %v: %s: %s", f.Code, f.Problem().Severity, f.Place, f.Detail)
}

// A Report is the result of [Run].
type Report struct {
	Size   int64         // bytes of the device
	Header ondisk.Header // as found
	Layout ondisk.Layout // zero where it is unknown: then no area was checked
	// Findings are in the order of the slots, at most Options.Limit of each code.
	Findings []Finding
	// Found counts the findings of each code, also those left out of Findings.
	Found map[Code]uint64

	Areas      uint64             // that hold exceptions, or the end mark, and were checked
	Slots      uint64             // used: before the end mark
	Exceptions uint64             // of them, those without a problem
	NextFree   ondisk.COWChunk    // the chunk that would be allocated next
	Leaked     uint64             // data chunks below NextFree that no slot names
	Runs       uint64             // ranges of exceptions that are consecutive on both sides
	LastOrigin ondisk.OriginChunk // the largest origin chunk with a sound exception; 0 without any
}

// Worst is the severity of the worst finding; 0 without findings.
func (r *Report) Worst() Severity {
	worst := Severity(0)
	for c := range r.Found {
		worst = max(worst, c.Problem().Severity)
	}
	return worst
}

// Clean reports that nothing was found: the store opens, in dmsnap and in every kernel, and every chunk
// it names is where it should be. The data itself was not read.
func (r *Report) Clean() bool { return len(r.Found) == 0 }

// Has reports whether a problem was found.
func (r *Report) Has(c Code) bool { return r.Found[c] > 0 }

// add adds a finding. The detail is made only below the limit: a disk of garbage has millions.
func (r *Report) add(limit int, c Code, place func() string, count uint64, detail func() string) *Finding {
	r.Found[c]++
	if r.Found[c] > uint64(limit) {
		return nil
	}
	r.Findings = append(r.Findings, Finding{Code: c, Place: place(), Detail: detail(), Count: count})
	return &r.Findings[len(r.Findings)-1]
}
