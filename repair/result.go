package repair

import (
	"bufio"
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/text"
)

// A Result says what was kept and lost, as JSON and as text.
type Result struct {
	Path      string                `json:"path"` // of the sound store
	Changed   bool                  `json:"changed"`
	Found     map[check.Code]uint64 `json:"found"` // what was wrong
	KeptBytes int64                 `json:"kept_bytes"`
	LostBytes int64                 `json:"lost_bytes"`
	Kept      []block.Range         `json:"kept"` // of the origin, ascending
	Lost      []Lost                `json:"lost"`
	Missing   []string              `json:"missing"` // places of slots of which nothing is known
}

// Result returns what the plan keeps and loses; changed says that the store at path was not sound before.
func (p *Plan) Result(path string, changed bool) Result {
	res := Result{Path: path, Changed: changed, Found: p.Report.Found, KeptBytes: p.Bytes(),
		Kept: append([]block.Range{}, p.Kept()...), Lost: append([]Lost{}, p.Lost()...), Missing: []string{}}
	for _, l := range res.Lost {
		res.LostBytes += l.Length
	}
	for _, f := range p.Missing() {
		res.Missing = append(res.Missing, f.Place+": "+f.Detail)
	}
	return res
}

// maxLines is how many ranges of a kind are printed; JSON has all.
const maxLines = 20

// WriteText writes what was kept and lost.
func (res Result) WriteText(out io.Writer) error {
	w := bufio.NewWriter(out) // keeps the first error for Flush
	state := "sound now"
	if len(res.Found) == 0 && len(res.Lost) == 0 {
		state = "nothing was wrong"
	}
	fmt.Fprintf(w, "%s: %s: kept %s in %s\n", res.Path, state, bytesize.Text(res.KeptBytes), text.Count(uint64(len(res.Kept)), "range"))
	for i, r := range res.Kept {
		if i == maxLines {
			fmt.Fprintf(w, "  kept  %d more ranges\n", len(res.Kept)-i)
			break
		}
		fmt.Fprintf(w, "  kept  bytes %d to %d of the origin\n", r.Off, r.Off+r.Length-1)
	}
	for i, r := range res.Lost {
		if i == maxLines {
			fmt.Fprintf(w, "  lost  %d more ranges\n", len(res.Lost)-i)
			break
		}
		fmt.Fprintf(w, "  lost  bytes %d to %d of the origin: %v, %s\n", r.Off, r.Off+r.Length-1, r.Code, r.Code.Problem().Name)
	}
	for _, m := range res.Missing {
		fmt.Fprintf(w, "  lost  unknown ranges: %s\n", m)
	}
	return w.Flush()
}
