package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
)

// curveRows are the curves: how cost grows with exceptions, snapshots, connections and the chunk size. Each
// point is a row, and neighbours with one name are one curve.
func curveRows() []row {
	var rows []row
	point := func(name, axis string, x int, unit string, less bool, run func(context.Context, *lab, contender, int) (sample, error), cleanup func(*lab) error) {
		rows = append(rows, row{name: name, axis: axis, x: float64(x), unit: unit, less: less,
			columns: []string{ours}, run: run, cleanup: cleanup})
	}
	for m := 1; m <= 64; m *= 2 {
		point("open a store of scattered exceptions", "M exceptions", m, "M exceptions/s", false, openStore(uint64(m)*million), dropStores)
	}
	for m := 1; m <= 64; m *= 2 {
		point("memory for scattered exceptions", "M exceptions", m, "bytes each", true, memoryOf(uint64(m)*million, true), dropStores)
	}
	for m := 1; m <= 64; m *= 2 {
		point("memory for sequential exceptions", "M exceptions", m, "bytes each", true, memoryOf(uint64(m)*million, false), dropStores)
	}
	for k := 1; k <= 16; k *= 2 {
		r := originRow("", k, 0)
		point("4 KiB random write to the origin, depth 16", "snapshots", k, "IOPS", false, r.run, nil)
	}
	for n := 1; n <= 256; n *= 2 {
		r := fioRow{job: job{rw: "randread", block: 4096, depth: 1, clients: n, timed: true, latency: true}, fill: halfFull}.row()
		point("4 KiB random read, depth 1 each, half the chunks in the COW", "connections", n, "IOPS", false, r.run, nil)
	}
	for _, j := range []struct {
		name, unit string
		job        job
	}{
		{"4 KiB random first write, depth 16", "IOPS", job{rw: "randwrite", block: 4096, depth: 16, limited: true}},
		{"64 KiB sequential first write, depth 8", "MiB/s", job{rw: "write", block: 64 << 10, depth: 8}},
	} {
		for kib := 4; kib <= 1024; kib *= 4 {
			point(j.name, "KiB a chunk", kib, j.unit, false, withChunks(kib, j.job, j.unit == "MiB/s"), nil)
		}
	}
	return rows
}

// withChunks measures a job on an empty store with chunks of another size.
func withChunks(kib int, j job, bytes bool) func(ctx context.Context, l *lab, c contender, round int) (sample, error) {
	r := fioRow{job: j, bytes: bytes}.row()
	return func(ctx context.Context, l *lab, c contender, round int) (sample, error) {
		c.create = func(ctx context.Context, l *lab, base, image string) error {
			return command(ctx, l.binary, "create", base, image, "--chunk-size", strconv.Itoa(kib)+"KiB")
		}
		return r.run(ctx, l, c, round)
	}
}

// curves are the report's rows by curve.
func (r *report) curves() [][]rowResult {
	var all [][]rowResult
	for _, row := range r.Rows {
		if n := len(all); n > 0 && all[n-1][0].Name == row.Name {
			all[n-1] = append(all[n-1], row)
		} else {
			all = append(all, []rowResult{row})
		}
	}
	return all
}

// printCurves prints a table for each curve.
func (r *report) printCurves(w io.Writer) error {
	for _, curve := range r.curves() {
		first := curve[0]
		more := slices.Sorted(maps.Keys(first.Columns[0].Samples[0].More))
		table := [][]string{append([]string{first.Axis, first.Unit}, more...)}
		for _, p := range curve {
			line := []string{strconv.FormatFloat(p.X, 'g', -1, 64), p.cell(ours)}
			for _, figure := range more {
				line = append(line, digits(median(p.of(ours).values(figure))))
			}
			table = append(table, line)
		}
		if _, err := fmt.Fprintf(w, "### %s\n\n", first.Name); err != nil {
			return err
		}
		if err := printMarkdown(w, table); err != nil {
			return err
		}
		if _, err := io.WriteString(w, "\n"); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "Medians of %d rounds, least and greatest in brackets. %s\n", r.Rounds, r.Machine)
	return err
}

// writeCurves puts the curves into a directory: curves.json, curves.md, curves.svg.
func (r *report) writeCurves(dir string) error {
	return errors.Join(os.MkdirAll(dir, 0o755), writeAll(dir, map[string]func(io.Writer) error{
		"curves.json": r.printJSON, "curves.md": r.printCurves, "curves.svg": r.plotCurves}))
}
