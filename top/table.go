package top

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

// Text writes a report as lines of text, of at most width characters each, without colours.
func Text(r monitor.Report, width int) string {
	lines := append([]string{clip(summary(r), width), header(width)}, rowsOf(r, width)...)
	return strings.Join(lines, "\n") + "\n"
}

// summary is the first line.
func summary(r monitor.Report) string {
	count := map[api.Kind]int{}
	var reads, writes float64
	for _, e := range r.Elements {
		count[e.Kind]++
		reads += e.Rates.ReadBytes
		writes += e.Rates.WrittenBytes
	}
	node := "snapshot"
	if r.Server == api.ServerOfFleet {
		node = "node"
	}
	words := []string{text.Count(uint64(count[api.KindDisk]), "disk") + ", " + text.Count(uint64(count[api.KindCheckpoint]), "checkpoint") + ", " + text.Count(uint64(count[api.KindNode]), node),
		"reads " + cmp.Or(rate(reads), "none"), "writes " + cmp.Or(rate(writes), "none")}
	for _, f := range r.FileSystems {
		free := bytesize.Text(f.FreeBytes) + " free on " + printable(f.Path)
		if f.SecondsToFull != nil {
			free += ", full in " + monitor.Duration(*f.SecondsToFull)
		}
		words = append(words, free)
	}
	if r.Error != "" {
		words = append([]string{"CHANGES ARE REFUSED: " + printable(r.Error)}, words...)
	}
	return strings.Join(words, "; ")
}

// The columns behind the name.
const (
	kindWide, fillWide, rateWide, fullWide = 10, 17, 11, 9

	restWide = 1 + kindWide + 1 + fillWide + 1 + rateWide + 1 + rateWide + 1 + fullWide + 1
)

// nameWide is the width of the first column; the last one, the state, has what is left.
func nameWide(width int) int { return min(40, max(10, width-restWide-10)) }

func header(width int) string {
	return clip(fmt.Sprintf("%-*s %-*s %-*s %*s %*s %*s STATE", nameWide(width), "NAME", kindWide, "KIND", fillWide, "FILL", rateWide, "READ", rateWide, "WRITE", fullWide, "FULL IN"), width)
}

// rowsOf returns a line for each element of inOrder.
func rowsOf(r monitor.Report, width int) (lines []string) {
	depth := map[string]int{}
	for _, e := range inOrder(r) {
		if e.Parent != "" {
			depth[e.Name] = depth[e.Parent] + 1
		}
		kind := string(e.Kind)
		if e.Unnamed {
			kind = "unnamed"
		}
		full := ""
		if e.Rates.SecondsToFull != nil {
			full = monitor.Duration(*e.Rates.SecondsToFull)
		}
		name := pad(strings.Repeat(" ", min(2*depth[e.Name], 16))+printable(e.Name), nameWide(width))
		lines = append(lines, clip(fmt.Sprintf("%s %-*s %-*s %*s %*s %*s %s", name, kindWide, kind, fillWide, bar(e), rateWide, rate(e.Rates.ReadBytes),
			rateWide, rate(e.Rates.WrittenBytes), fullWide, full, stateOf(e)), width))
	}
	return lines
}

// inOrder returns the elements of a report, each with its descendants behind it.
func inOrder(r monitor.Report) []*monitor.Element {
	children := map[string][]int{}
	known := map[string]bool{}
	for _, e := range r.Elements {
		known[e.Name] = true
	}
	for i, e := range r.Elements {
		parent := e.Parent
		if !known[parent] || parent == e.Name {
			parent = ""
		}
		children[parent] = append(children[parent], i)
	}
	var list []*monitor.Element
	stack := slices.Clone(children[""])
	slices.Reverse(stack)
	seen := make([]bool, len(r.Elements))
	for len(stack) > 0 {
		i := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if seen[i] {
			continue
		}
		seen[i] = true
		e := &r.Elements[i]
		list = append(list, e)
		if e.Name != "" {
			for _, k := range slices.Backward(children[e.Name]) {
				stack = append(stack, k)
			}
		}
	}
	return list
}

// bar shows a fill level: "[####------]  42%".
func bar(e *monitor.Element) string {
	if e.Figures == nil || e.Figures.TotalSectors == 0 {
		return ""
	}
	const cells = 10
	p := min(max(e.Figures.Percent, 0), 100)
	n := int(p / 100 * cells)
	return fmt.Sprintf("[%s%s] %3.0f%%", strings.Repeat("#", n), strings.Repeat("-", cells-n), p)
}

// stateOf is a word or a few about an element.
func stateOf(e *monitor.Element) string {
	f := e.Figures
	switch m := e.Merge; {
	case f != nil && f.State == api.StateInvalid:
		return "INVALID"
	case f != nil && f.Full:
		return "FULL"
	case e.State == api.ElementFailed:
		return "FAILED: " + printable(e.Error)
	case f != nil && f.State == api.StateOverflow:
		return "OVERFLOW"
	case m != nil && m.State == api.MergeRunning && m.TotalBytes > 0:
		return fmt.Sprintf("merging %d%%", 100*m.CopiedBytes/m.TotalBytes)
	case m != nil && m.State == api.MergeFailed:
		return "MERGE FAILED: " + printable(m.Error)
	case m != nil && m.State == api.MergeDone:
		return "merged"
	case m != nil:
		return "merge " + string(m.State)
	}
	return "ok"
}

func rate(n float64) string {
	if n < 1 {
		return ""
	}
	return strings.Replace(bytesize.Text(int64(n)), " bytes", " B", 1) + "/s"
}

// printable replaces what a terminal would not show as one character.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == utf8.RuneError {
			return '?'
		}
		return r
	}, s)
}

// clip cuts a line at width characters.
func clip(s string, width int) string {
	if width <= 0 || utf8.RuneCountInString(s) <= width {
		return strings.TrimRight(s, " ")
	}
	runes := []rune(s)
	return string(runes[:max(width-1, 0)]) + "…"
}

// pad makes a text exactly n characters wide.
func pad(s string, n int) string {
	s = clip(s, n)
	return s + strings.Repeat(" ", max(0, n-utf8.RuneCountInString(s)))
}
