package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		of   []float64
		want float64
	}{{[]float64{7}, 7}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 3, 2}, 2.5}} {
		before := append([]float64(nil), c.of...)
		if got := median(c.of); got != c.want {
			t.Errorf("median of %v is %v, want %v", c.of, got, c.want)
		}
		for i := range before {
			if c.of[i] != before[i] {
				t.Errorf("median changed the order of rounds: %v", c.of)
			}
		}
	}
}

func TestRatios(t *testing.T) {
	own, peer := []float64{10, 30, 20}, []float64{10, 10, 40}
	of, low, high := ratios(own, peer, false)
	if of != 2 || low != 0.5 || high != 3 { // medians 20 and 10; rounds 1, 3, 0.5
		t.Errorf("more is better: %v %v %v", of, low, high)
	}
	of, low, high = ratios(own, peer, true)
	if of != 0.5 || math.Abs(low-1.0/3) > 1e-9 || high != 2 {
		t.Errorf("less is better: %v %v %v", of, low, high)
	}
}

// samples makes a column of a row.
func samples(server string, values ...float64) column {
	c := column{Server: server}
	for _, v := range values {
		c.Samples = append(c.Samples, sample{Value: v, More: map[string]float64{"p99": 1 / v}})
	}
	c.sum()
	return c
}

func TestJudge(t *testing.T) {
	r := rowResult{Columns: []column{samples(ours, 100, 120, 110), samples(qcow2, 50, 60, 55), samples(cow, 100, 90, 95)}}
	r.judge([]bar{
		{least: 2, peers: durablePeers},
		{least: 1.2, peers: cowPeers},
		{least: 1.1, peers: cowPeers, figure: "p99"},
		{least: 1, peers: []string{direct}},
		{limit: 110},
		{limit: 111},
		{limit: 0.01, figure: "p99"},
		{limit: 0.009, figure: "p99"},
	})
	for i, want := range []verdict{
		{Ratio: 2, Peer: qcow2, Reached: true},
		{Ratio: 110.0 / 95, Peer: cow},
		{Ratio: 110.0 / 95, Peer: cow, Reached: true},
		{Absent: true},
		{Value: 110, Reached: true},
		{Value: 110},
		{Value: 1.0 / 110, Reached: true},
		{Value: 1.0 / 110},
	} {
		got := r.Bars[i]
		if math.Abs(got.Ratio-want.Ratio) > 1e-9 || math.Abs(got.Value-want.Value) > 1e-9 || got.Peer != want.Peer || got.Reached != want.Reached || got.Absent != want.Absent {
			t.Errorf("bar %d: %+v, want %+v", i, got, want)
		}
	}
}

func TestRoundsTakeTurns(t *testing.T) {
	order := ""
	l := &lab{settings: settings{rounds: 3, servers: regexp.MustCompile("")}}
	_, err := l.row(context.Background(), row{columns: []string{ours, ourRaw, direct},
		run: func(_ context.Context, _ *lab, c contender, _ int) (sample, error) {
			order += c.key + " "
			return sample{Value: 1}, nil
		}})
	const want = "dmsnap dmsnap-raw direct dmsnap-raw direct dmsnap direct dmsnap dmsnap-raw "
	if err != nil || order != want {
		t.Errorf("order %q, want %q; %v", order, want, err)
	}
}

func TestParseFio(t *testing.T) {
	out, err := os.ReadFile("testdata/fio.json")
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseFio(out)
	// The sums of reads and writes, and the later of the two percentiles, as they stand in the file.
	want := fioResult{IOPS: 19172.757475 + 8634.551495, Bytes: 78531614 + 35367122, P99: 329728e-9}
	if err != nil || math.Abs(got.IOPS-want.IOPS) > 1e-6 || got.Bytes != want.Bytes || math.Abs(got.P99-want.P99) > 1e-12 {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{"", "fio: failed", "{", `{"jobs":[]}`, `{"jobs":[{"error":5,"read":{"total_ios":1}}]}`, `{"jobs":[{"error":0}]}`} {
		if got, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("%q: %+v and no error", bad, got)
		}
	}
}

func TestFirstWritesGoToEachBlockOnce(t *testing.T) {
	l := &lab{settings: settings{seconds: 3}, origin: originSize}
	for _, r := range []job{{rw: "randwrite", block: 4096, depth: 16, limited: true}, *halfFull} {
		args := strings.Join(l.fioArgs(r, &target{uri: "nbd://x"}), " ")
		if strings.Contains(args, "norandommap") || strings.Contains(args, "time_based") {
			t.Errorf("may write a block twice: %s", args)
		}
	}
}

func TestDigits(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 123456.7: "123457", 12.34: "12.3", 1.2345: "1.23", 0.012345: "0.0123"} {
		if got := digits(v); got != want {
			t.Errorf("%v is printed as %s, want %s", v, got, want)
		}
	}
}

// aReport has every kind of row.
func aReport() *report {
	r := &report{Rounds: 3}
	row := rowResult{Name: "a <workload>", Unit: "IOPS", Columns: []column{samples(ours, 100, 120, 110), samples(cow, 50, 60, 55)}}
	row.judge([]bar{{text: "≥ 1 × best", least: 1, peers: cowPeers}, {text: "≥ 1 × copy", least: 1, peers: []string{direct}}})
	limit := rowResult{Name: "another", Unit: "ms", Less: true, Columns: []column{samples(ours, 4)}}
	limit.judge([]bar{{text: "≤ 3 ms", limit: 3}})
	r.Rows = []rowResult{row, limit}
	return r
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	if err := aReport().printTable(&out); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(out.String(), "\n")
	for _, want := range []string{"110 [100–120]", "55.0 [50.0–60.0]", "2.00 (nbdkit cow)", "≥ 1 × best: 2.00 (2.00–2.00), reached", "≥ 1 × copy: nothing to compare with"} {
		if !strings.Contains(lines[2], want) {
			t.Errorf("no %q in %s", want, lines[2])
		}
	}
	if !strings.Contains(lines[3], "≤ 3 ms: 4, NOT reached") {
		t.Error(lines[3])
	}
	if a, b := strings.Count(lines[0], "|"), strings.Count(lines[3], "|"); a != b {
		t.Errorf("%d columns, then %d", a, b)
	}
}

func TestCurveTablesAndPlots(t *testing.T) {
	curves := &report{Rounds: 2}
	for _, x := range []float64{1, 2, 4} {
		curves.Rows = append(curves.Rows, rowResult{Name: "grows", X: x, Axis: "things", Unit: "IOPS", Columns: []column{samples(ours, 100/x, 120/x)}})
	}
	var table bytes.Buffer
	if err := curves.printCurves(&table); err != nil {
		t.Fatal(err)
	}
	if want := "| 4      | 27.5 [25.0–30.0] | 0.0367  |"; !strings.Contains(table.String(), want) {
		t.Errorf("no %q in\n%s", want, table.String())
	}
	for name, plot := range map[string]func(io.Writer) error{"ratios": aReport().plotRatios, "curves": curves.plotCurves} {
		var svg bytes.Buffer
		if err := plot(&svg); err != nil {
			t.Fatal(err)
		}
		d := xml.NewDecoder(&svg)
		shapes := 0
		for {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if s, ok := token.(xml.StartElement); ok && (s.Name.Local == "rect" || s.Name.Local == "circle") {
				shapes++
			}
		}
		if shapes < 2 { // the background and something on it
			t.Errorf("%s: %d shapes", name, shapes)
		}
	}
}

func TestResultsHaveEverything(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	if err := aReport().write(dir); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	var back report
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if c := back.Rows[0].of(ours); c == nil || len(c.Samples) != 3 || c.Samples[1].Value != 120 || !back.Rows[0].Bars[0].Reached {
		t.Errorf("%s", b)
	}
}

// TestBigStores loads what writeStore writes: it measures something only if it is a store.
func TestBigStores(t *testing.T) {
	for _, scattered := range []bool{false, true} {
		dir := t.TempDir()
		origin, cow := filepath.Join(dir, "o"), filepath.Join(dir, "c")
		const n = 1 << 10
		if err := writeStore(origin, cow, n, scattered); err != nil {
			t.Fatal(err)
		}
		dev, err := block.Open(cow, block.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		s, err := store.Open(dev)
		if err != nil {
			t.Fatal(err)
		}
		runs := 0
		for range s.Exceptions() {
			runs++
		}
		if s.Len() != n || scattered != (runs > n/2) {
			t.Errorf("%d exceptions in %d runs, scattered %v", s.Len(), runs, scattered)
		}
		if info, err := os.Stat(origin); err != nil || s.CheckOrigin(info.Size()) != nil {
			t.Errorf("the origin is too small: %v", err)
		}
	}
}

// TestCopyInOrder holds the ceiling of merges against what a merge has to do.
func TestCopyInOrder(t *testing.T) {
	dir := t.TempDir()
	origin, cow := filepath.Join(dir, "o"), filepath.Join(dir, "c")
	const n = 600 // more than one area, and a run of more than 1 MiB
	if err := writeStore(origin, cow, n, false); err != nil {
		t.Fatal(err)
	}
	l := ondisk.Layout{ChunkSectors: 8}
	f, err := os.OpenFile(cow, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := make([]byte, n*4096)
	for i := range uint64(n) {
		data := bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 2048)
		copy(want[i*4096:], data)
		if _, err := f.WriteAt(data, l.COWOffset(l.DataChunk(i))); err != nil {
			t.Fatal(err)
		}
	}
	all, err := exceptionsOf(cow)
	if err != nil || len(all) != n {
		t.Fatalf("%d exceptions, %v", len(all), err)
	}
	if err := copyInOrder(origin, cow, all); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(origin)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:len(want)], want) || bytes.ContainsFunc(got[len(want):], func(r rune) bool { return r != 0 }) {
		t.Error("the origin has not what the store holds")
	}
}
