package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// report is everything a run measured; results.json is its JSON.
type report struct {
	Machine machine     `json:"machine"`
	Rounds  int         `json:"rounds"`
	Seconds float64     `json:"seconds"`
	Rows    []rowResult `json:"rows"`
}

func (r *report) printJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(r)
}

// write puts the report into a folder: results.json, table.md and ratios.svg, or curves.* for curves.
func (r *report) write(dir string, curves bool) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if curves {
		return errors.Join(
			writeFile(filepath.Join(dir, "curves.json"), r.printJSON),
			writeFile(filepath.Join(dir, "curves.md"), r.printCurves),
			writeFile(filepath.Join(dir, "curves.svg"), r.plotCurves))
	}
	return errors.Join(
		writeFile(filepath.Join(dir, "results.json"), r.printJSON),
		writeFile(filepath.Join(dir, "table.md"), r.printTable),
		writeFile(filepath.Join(dir, "ratios.svg"), r.plotRatios))
}

func writeFile(path string, print func(io.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(print(f), f.Close())
}

// printTable prints the table, in Markdown that reads well as it is.
func (r *report) printTable(w io.Writer) error {
	servers := r.servers()
	header := []string{"workload", "unit"}
	for _, s := range servers {
		header = append(header, titled(s))
	}
	header = append(header, "bar: reached (least and greatest in one round)")
	table := [][]string{header}
	for _, row := range r.Rows {
		line := []string{row.Name, row.Unit}
		for _, s := range servers {
			line = append(line, row.cell(s))
		}
		table = append(table, append(line, row.verdicts()))
	}
	if err := printMarkdown(w, table); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nMedians of %d rounds, least and greatest in brackets; measurements by time took %g s.\n%s\n", r.Rounds, r.Seconds, r.Machine)
	return err
}

// servers are the columns that any row has, in the order of contenders.
func (r *report) servers() []string {
	var keys []string
	for _, c := range contenders {
		if slices.ContainsFunc(r.Rows, func(row rowResult) bool { return row.of(c.key) != nil }) {
			keys = append(keys, c.key)
		}
	}
	return keys
}

func (r *rowResult) cell(server string) string {
	c := r.of(server)
	if c == nil {
		return ""
	}
	if len(c.Samples) == 1 {
		return digits(c.Median)
	}
	return fmt.Sprintf("%s [%s–%s]", digits(c.Median), digits(c.Min), digits(c.Max))
}

// verdicts is the text of a row's bars.
func (r *rowResult) verdicts() string {
	var texts []string
	for _, v := range r.Bars {
		texts = append(texts, v.String())
	}
	return strings.Join(texts, "; ")
}

func (v verdict) String() string {
	word := "NOT reached"
	if v.Reached {
		word = "reached"
	}
	switch {
	case v.Absent:
		return v.Bar + ": nothing to compare with"
	case v.Peer == "":
		return fmt.Sprintf("%s: %s, %s", v.Bar, digits(v.Value), word)
	}
	return fmt.Sprintf("%s: %.2f (%.2f–%.2f), %s", v.Bar, v.Ratio, v.Low, v.High, word)
}

func (m machine) String() string {
	var versions []string
	for _, p := range peers {
		if v := m.Versions[p.program]; v != "" {
			versions = append(versions, v)
		}
	}
	return fmt.Sprintf("dmsnap %s; %s, %d cores, %d MiB, Linux %s, %s, %s; load before %.2f; %s; %s.", m.Commit, m.CPU, m.Cores, m.MemoryMiB,
		m.Kernel, m.FileSystem, m.Go, m.Load, strings.Join(versions, "; "), m.When.Format("2006-01-02 15:04 UTC"))
}

// printMarkdown prints a table whose first line is its header, with the columns in line.
func printMarkdown(w io.Writer, table [][]string) error {
	width := make([]int, len(table[0]))
	for _, line := range table {
		for i, cell := range line {
			width[i] = max(width[i], len([]rune(cell)), 3)
		}
	}
	var b strings.Builder
	for n, line := range table {
		for i, cell := range line {
			fmt.Fprintf(&b, "| %-*s ", width[i], cell)
		}
		b.WriteString("|\n")
		if n == 0 {
			for _, w := range width {
				b.WriteString("| " + strings.Repeat("-", w) + " ")
			}
			b.WriteString("|\n")
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// printCurves prints each curve as a table.
func (r *report) printCurves(w io.Writer) error { return r.printTable(w) }
