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

// write puts the table into a directory: results.json, table.md, ratios.svg.
func (r *report) write(dir string) error {
	return errors.Join(os.MkdirAll(dir, 0o755), writeAll(dir, map[string]func(io.Writer) error{
		"results.json": r.printJSON, "table.md": r.printTable, "ratios.svg": r.plotRatios}))
}

// writeAll writes each file of a directory.
func writeAll(dir string, files map[string]func(io.Writer) error) error {
	var errs []error
	for name, print := range files {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		errs = append(errs, print(f), f.Close())
	}
	return errors.Join(errs...)
}

// printTable prints the table, in Markdown that reads well as it is.
func (r *report) printTable(w io.Writer) error {
	servers := r.servers()
	header := []string{"workload", "unit"}
	for _, s := range servers {
		header = append(header, titled(s))
	}
	header = append(header, "to best COW peer", "to nbdkit file", "to pread/pwrite", "bar: reached (least–greatest in one round)")
	table := [][]string{header}
	for _, row := range r.Rows {
		line := []string{row.Name, row.Unit}
		for _, s := range servers {
			line = append(line, row.cell(s))
		}
		table = append(table, append(line, row.against(cowPeers), row.against([]string{file}), row.against([]string{direct}), row.verdicts()))
	}
	if err := printMarkdown(w, table); err != nil {
		return err
	}
	if err := r.printCosts(w); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\n%s\nMedians of %d rounds, least and greatest in brackets; ratios are of medians, above 1 dmsnap is ahead. What is measured by time took %g s.\n\n%s\n",
		legend, r.Rounds, r.Seconds, r.Machine)
	return err
}

// printCosts prints the CPU time a request, where it was measured, beside the rate, in a table of its own.
func (r *report) printCosts(w io.Writer) error {
	servers := r.servers()
	header := []string{"workload"}
	for _, s := range servers {
		header = append(header, titled(s))
	}
	table := [][]string{header}
	for _, row := range r.Rows {
		line, found := []string{row.Name}, false
		for _, s := range servers {
			cell := row.costs(s)
			line, found = append(line, cell), found || cell != ""
		}
		if found {
			table = append(table, line)
		}
	}
	if len(table) == 1 {
		return nil
	}
	if _, err := io.WriteString(w, "\nµs of CPU time a request, of all the server's threads, and requests a second beside it:\n\n"); err != nil {
		return err
	}
	return printMarkdown(w, table)
}

// costs is the cell of a server in the table of CPU times.
func (r *rowResult) costs(server string) string {
	c := r.of(server)
	if c == nil {
		return ""
	}
	v := c.values(cpuFigure)
	if len(v) == 0 {
		return ""
	}
	text := digits(median(v))
	if len(v) > 1 {
		text += fmt.Sprintf(" [%s–%s]", digits(slices.Min(v)), digits(slices.Max(v)))
	}
	return fmt.Sprintf("%s µs; %s/s", text, digits(median(c.values(rateFigure))))
}

const legend = `- dmsnap raw: its export of a plain file, no snapshot.
- qcow2: qemu-nbd on an overlay with a raw backing file, cache mode writeback, so flushes are honoured; clusters of 64 KiB
  (the default) and of 4 KiB. In the merges it is qemu-img commit.
- nbdkit cow: the cow filter over the file plugin, not durable; blocks of 64 KiB (the default) and of 4 KiB.
- nbdkit file, pread/pwrite: the ceilings, a plain file over NBD and without (fio's psync engine, one request at a time). In
  the merges the latter is a copy of the same bytes with one fsync.
- qemu-nbd reads the same qcow2 image read-only. nbdkit nbd is its nbd plugin; like dmsnap it reads an export of nbdkit's file
  plugin.
`

// against is the ratio of dmsnap to the best of some columns, as text.
func (r *rowResult) against(servers []string) string {
	own, peer := r.of(ours), r.best(servers, "", r.Less)
	if own == nil || peer == nil {
		return ""
	}
	text := fmt.Sprintf("%.2f", ratio(own.Median, peer.Median, r.Less))
	if len(servers) > 1 {
		text += " (" + titled(peer.Server) + ")"
	}
	return text
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
