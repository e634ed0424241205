// Command bench measures dmsnap beside its peers, on one machine in one run, and says which bars are
// reached. See docs/benchmarks.md.
//
//	go run ./bench            the table of workloads
//	go run ./bench curves     how cost grows
//	go run ./bench registry   disks in a registry
//	bench floor SOCKET IMAGE  a server that does the least; the table starts it
//
// Each row of the table is a workload, each column a server. A row is measured in rounds: every server
// once a round, each in a fresh process and from the same state, and each round begins with another
// server. What is compared was measured within seconds of each other, so a machine that is busier for a
// while is so for all of them.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// settings are the command's flags.
type settings struct {
	binary  string
	dir     string
	out     string
	rounds  int
	seconds float64
	only    *regexp.Regexp
	servers *regexp.Regexp
	json    bool
	install bool
	self    string // this program, which is a server too

	goldenRef string // an ext4 image in a registry
}

func run(ctx context.Context, args []string) error {
	if len(args) == 3 && args[0] == "floor" {
		return serveFloor(ctx, args[1], args[2])
	}
	var s settings
	what := ""
	if len(args) > 0 && (args[0] == "curves" || args[0] == "registry") {
		what, args = args[0], args[1:]
	}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.StringVar(&s.binary, "dmsnap", "bin/dmsnap", "the binary to measure")
	f.StringVar(&s.dir, "dir", os.TempDir(), "make a scratch folder in this one; its file system is what is measured")
	f.StringVar(&s.out, "out", "", "also write the table, every measurement as JSON, and a plot into this folder")
	f.IntVar(&s.rounds, "rounds", 5, "rounds")
	f.Float64Var(&s.seconds, "seconds", 3, "length of a measurement that is bounded by time")
	only := f.String("only", "", "workloads whose name this regular expression matches")
	servers := f.String("servers", "", "servers whose key this regular expression matches, beside dmsnap")
	f.StringVar(&s.goldenRef, "golden", "", "of registry: use this disk, of 2 GiB, in a registry instead of making one")
	f.BoolVar(&s.json, "json", false, "print JSON instead of the table")
	f.BoolVar(&s.install, "install", false, "as root, install the peers that are absent")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("%q: there is one argument, curves or registry, and it comes first", f.Arg(0))
	}
	if s.rounds < 1 || s.seconds <= 0 {
		return fmt.Errorf("--rounds and --seconds must be positive")
	}
	var err error
	if s.only, err = regexp.Compile(*only); err != nil {
		return fmt.Errorf("--only: %w", err)
	}
	if s.servers, err = regexp.Compile(*servers); err != nil {
		return fmt.Errorf("--servers: %w", err)
	}
	installPeers(ctx, s.install)
	if _, err := exec.LookPath("fio"); err != nil {
		return fmt.Errorf("the client of every workload over NBD: %w", err)
	}
	l, err := newLab(s)
	if err != nil {
		return err
	}
	defer l.close()
	switch what {
	case "curves":
		return l.measure(ctx, curveRows(), (*report).printCurves, (*report).writeCurves)
	case "registry":
		return l.measure(ctx, remoteRows(), (*report).printTable, (*report).write)
	}
	return l.measure(ctx, workloads(), (*report).printTable, (*report).write)
}

// measure runs the rows that were asked for and reports them with print and write.
func (l *lab) measure(ctx context.Context, rows []row, print func(*report, io.Writer) error, write func(*report, string) error) error {
	report := &report{Machine: l.machine(ctx), Rounds: l.rounds, Seconds: l.seconds}
	l.say("scratch folder %s (%s)", l.dir, report.Machine.FileSystem)
	for _, r := range rows {
		if !l.only.MatchString(r.name) {
			continue
		}
		result, err := l.row(ctx, r)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		report.Rows = append(report.Rows, result)
		if l.out != "" { // what has been measured is kept, whether the rest succeeds or not
			if err := write(report, l.out); err != nil {
				return err
			}
		}
	}
	if len(report.Rows) == 0 {
		return fmt.Errorf("--only: no workload is called that")
	}
	if l.json {
		return report.printJSON(os.Stdout)
	}
	return print(report, os.Stdout)
}

// newLab makes the scratch directory.
func newLab(s settings) (*lab, error) {
	binary, err := filepath.Abs(s.binary)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(binary); err != nil {
		return nil, fmt.Errorf("%w: make build, or make bench", err)
	}
	// A socket's path has 107 bytes at most, so names in it are short.
	dir, err := os.MkdirTemp(s.dir, "dmsnap-bench-")
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	s.binary = binary
	if s.self, err = os.Executable(); err != nil {
		return nil, err
	}
	return &lab{settings: s, dir: dir, origin: originSize}, nil
}
