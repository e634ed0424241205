package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// A row is a workload, measured on some contenders.
type row struct {
	name string
	x    float64 // of a curve: which point of it, and
	axis string  // what that counts
	unit string
	less bool // less is better
	// columns are the keys of the contenders it is measured on.
	columns []string
	// run measures one contender once.
	run  func(ctx context.Context, l *lab, c contender, round int) (sample, error)
	bars []bar
	own  string // the column that the bars are about, "" for dmsnap
	// cleanup, where there is one, removes what the row left in the scratch directory.
	cleanup func(l *lab) error
}

// point names the point of a curve.
func (r row) point() string {
	if r.axis == "" {
		return ""
	}
	return fmt.Sprintf(", %g %s", r.x, r.axis)
}

// A sample is one measurement: the row's figure, and others worth keeping, by their names.
type sample struct {
	Value float64            `json:"value"`
	More  map[string]float64 `json:"more,omitempty"`
}

// cost is the CPU time a request as text, where it was measured.
func (s sample) cost() string {
	if v, ok := s.More[cpuFigure]; ok {
		return ", " + digits(v) + " µs CPU a request"
	}
	return ""
}

// A bar is what a row has to reach.
type bar struct {
	text  string
	least float64  // the ratio to the best of peers, or, without peers, nothing
	peers []string // columns
	// figure is the name of the sample's other figure that is meant; less of it is better. "" is the row's own.
	figure string
	// most is the largest share of the best peer's figure that reaches the bar, instead of least.
	most float64
	// limit is an absolute bar, where there are no peers.
	limit float64
	more  bool // of another figure: more is better
}

// title is the bar's text, in which %g stands for its number.
func (b bar) title() string {
	if !strings.Contains(b.text, "%g") {
		return b.text
	}
	return fmt.Sprintf(b.text, cmp.Or(b.most, b.least, b.limit))
}

// row measures a row in rounds, each beginning with another contender.
func (l *lab) row(ctx context.Context, r row) (rowResult, error) {
	result := rowResult{Name: r.name, X: r.x, Axis: r.axis, Unit: r.unit, Less: r.less, Own: r.own}
	var present []contender
	for _, key := range r.columns {
		c := find(key)
		if !c.available() || key != ours && key != r.own && !l.servers.MatchString(key) {
			continue
		}
		present = append(present, c)
		result.Columns = append(result.Columns, column{Server: key})
	}
	for round := range l.rounds {
		for i := range present {
			at := (i + round) % len(present)
			c := present[at]
			began := time.Now()
			s, err := r.run(ctx, l, c, round)
			if err != nil {
				return result, fmt.Errorf("%s: %w", c.title, err)
			}
			l.say("%s%s, round %d, %s: %s%s (%.1f s in all)", r.name, r.point(), round+1, c.key, figureText(s.Value, r.unit), s.cost(), time.Since(began).Seconds())
			result.Columns[at].Samples = append(result.Columns[at].Samples, s)
		}
	}
	for i := range result.Columns {
		result.Columns[i].sum()
	}
	result.judge(r.bars)
	if r.cleanup != nil {
		return result, r.cleanup(l)
	}
	return result, nil
}

// rowResult is a row's measurements and what follows from them. The JSON names are what results.json has.
type rowResult struct {
	Name    string    `json:"name"`
	X       float64   `json:"x,omitempty"`
	Axis    string    `json:"axis,omitempty"`
	Unit    string    `json:"unit"`
	Less    bool      `json:"less_is_better"`
	Own     string    `json:"own,omitempty"` // the column that the bars are about, where it is not dmsnap
	Columns []column  `json:"columns"`
	Bars    []verdict `json:"bars,omitempty"`
}

// column is one server's share of a row.
type column struct {
	Server  string   `json:"server"`
	Samples []sample `json:"samples"` // in the order of the rounds
	Median  float64  `json:"median"`
	Min     float64  `json:"min"`
	Max     float64  `json:"max"`
}

// verdict is a bar with what was reached.
type verdict struct {
	Bar     string  `json:"bar"`
	Least   float64 `json:"least,omitempty"` // the ratio that was wanted
	Most    float64 `json:"most,omitempty"`  // or the share of the peer's figure that was allowed; then Ratio is that share
	Ratio   float64 `json:"ratio,omitempty"` // of medians, to the best peer; above 1 is better than it
	Low     float64 `json:"low,omitempty"`   // the ratio in the worst round
	High    float64 `json:"high,omitempty"`  // and in the best
	Peer    string  `json:"peer,omitempty"`  // which one that was
	Value   float64 `json:"value,omitempty"` // of an absolute bar
	Reached bool    `json:"reached"`
	// Absent says that no peer was there to compare with: neither reached nor missed.
	Absent bool `json:"absent,omitempty"`
}

func (c *column) sum() {
	values := c.values("")
	c.Median, c.Min, c.Max = median(values), slices.Min(values), slices.Max(values)
}

// values are the samples' figures of a name, "" the row's own.
func (c *column) values(figure string) []float64 {
	var v []float64
	for _, s := range c.Samples {
		if figure == "" {
			v = append(v, s.Value)
		} else if x, ok := s.More[figure]; ok {
			v = append(v, x)
		}
	}
	return v
}

// of returns the column of a server, or nil.
func (r *rowResult) of(server string) *column {
	for i := range r.Columns {
		if r.Columns[i].Server == server && len(r.Columns[i].Samples) > 0 {
			return &r.Columns[i]
		}
	}
	return nil
}

// best returns the best of some columns by the median of a figure, or nil.
func (r *rowResult) best(servers []string, figure string, less bool) *column {
	var best *column
	for _, key := range servers {
		c := r.of(key)
		if c == nil || len(c.values(figure)) == 0 {
			continue
		}
		if best == nil || better(median(c.values(figure)), median(best.values(figure)), less) {
			best = c
		}
	}
	return best
}

func better(a, b float64, less bool) bool {
	if less {
		return a < b
	}
	return a > b
}

// judge holds the row's figures against its bars.
func (r *rowResult) judge(bars []bar) {
	own := r.of(cmp.Or(r.Own, ours))
	for _, b := range bars {
		v := verdict{Bar: b.title(), Least: b.least, Most: b.most}
		less := (r.Less || b.figure != "") && !b.more
		switch peer := r.best(b.peers, b.figure, less); {
		case own == nil:
			v.Absent = true
		case b.peers == nil:
			v.Value = median(own.values(b.figure))
			v.Reached = v.Value == b.limit || better(v.Value, b.limit, less)
		case peer == nil:
			v.Absent = true
		default:
			v.Peer = peer.Server
			v.Ratio, v.Low, v.High = ratios(own.values(b.figure), peer.values(b.figure), less && b.most == 0)
			v.Reached = v.Ratio >= b.least
			if b.most > 0 {
				v.Reached = v.Ratio <= b.most
			}
		}
		r.Bars = append(r.Bars, v)
	}
}
