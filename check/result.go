package check

import (
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/ondisk"
)

// A Result is a report without the problems below a severity, as JSON and as text.
type Result struct {
	Path         string          `json:"path"`
	Clean        bool            `json:"clean"` // no problem of the requested level or above
	Bytes        int64           `json:"bytes"` // size of the device
	ChunkSectors uint32          `json:"chunk_sectors"`
	Areas        uint64          `json:"areas"`
	Exceptions   uint64          `json:"exceptions"` // sound ones
	Runs         uint64          `json:"runs"`
	Leaked       uint64          `json:"leaked_chunks"`
	Found        map[Code]uint64 `json:"found"`
	Findings     []FindingResult `json:"findings"` // the first ones of each code, Options.Limit at most

	slots uint64
}

// A FindingResult is a finding with what is known of its problem.
type FindingResult struct {
	Code     Code     `json:"code"`
	Name     string   `json:"name"`
	Severity Severity `json:"severity"`
	Place    string   `json:"place"`
	Detail   string   `json:"detail"`
	Count    uint64   `json:"count"`
	Means    string   `json:"means"`
	Kernel   string   `json:"kernel"`
	Repair   string   `json:"repair"`
	Helps    string   `json:"helps"`
}

// Result returns the problems of a severity or above, of the store at path. repairable says in the caller's words what a
// Repairability is.
func (r *Report) Result(path string, level Severity, repairable func(Repairability) string) Result {
	res := Result{Path: path, Bytes: r.Size, ChunkSectors: r.Layout.ChunkSectors, Areas: r.Areas, Exceptions: r.Exceptions,
		Runs: r.Runs, Leaked: r.Leaked, Found: map[Code]uint64{}, Findings: []FindingResult{}, slots: r.Slots}
	for _, f := range r.Findings {
		p := f.Problem()
		if p.Severity < level {
			continue
		}
		res.Found[f.Code] = r.Found[f.Code]
		res.Findings = append(res.Findings, FindingResult{f.Code, p.Name, p.Severity, f.Place, f.Detail, f.Count, p.Means, p.Kernel, repairable(p.Repair), p.Remedy})
	}
	res.Clean = len(res.Findings) == 0
	return res
}

// WriteText writes each problem once, with its places and its remedy.
func (res Result) WriteText(w io.Writer) error {
	if res.Clean {
		_, err := fmt.Fprintf(w, "%s: clean: %s, %s a chunk\n", res.Path, text.Count(res.Exceptions, "exception"), bytesize.Text(int64(res.ChunkSectors)*ondisk.SectorSize))
		return err
	}
	n := uint64(0)
	for _, k := range res.Found {
		n += k
	}
	fmt.Fprintf(w, "%s: %s\n", res.Path, text.Count(n, "problem"))
	for _, p := range Problems() {
		if res.Found[p.Code] == 0 {
			continue
		}
		fmt.Fprintf(w, "\n%v %v: %s\n  %s\n", p.Code, p.Severity, p.Name, p.Means)
		shown, repairable := uint64(0), ""
		for _, f := range res.Findings {
			if f.Code == p.Code {
				fmt.Fprintf(w, "    %s: %s\n", f.Place, f.Detail)
				shown, repairable = shown+1, f.Repair
			}
		}
		if more := res.Found[p.Code] - shown; more > 0 {
			fmt.Fprintf(w, "    and %d more\n", more)
		}
		if _, err := fmt.Fprintf(w, "  Repairable: %s. %s\n", repairable, p.Remedy); err != nil {
			return err
		}
	}
	if res.slots > 0 {
		_, err := fmt.Fprintf(w, "\n%d of %s are sound\n", res.Exceptions, text.Count(res.slots, "exception"))
		return err
	}
	return nil
}
