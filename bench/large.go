package main

import (
	"context"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// largeRows read a store of 40 M scattered exceptions from the cache, by whole processes.
func largeRows() []row {
	const n = 40 * million
	verb := func(name string, seconds float64, args func(origin, cow string) []string) row {
		return row{name: name + " of a store of 40 M scattered exceptions (whole process, from cache)", unit: "s", less: true, columns: []string{ours},
			run:  largeVerb(n, args),
			bars: []bar{{text: "≤ %g s", limit: seconds}, {text: "≤ %g MiB", figure: "mib", limit: 700}}}
	}
	rows := []row{
		verb("status", 4, func(_, cow string) []string { return []string{"status", cow} }),
		verb("list", 8, func(_, cow string) []string { return []string{"list", cow} }),
		verb("diff", 8, func(origin, cow string) []string { return []string{"diff", origin, cow} }),
		verb("merge --dry-run", 6, func(origin, cow string) []string { return []string{"merge", "--dry-run", origin, cow} }),
	}
	rows[len(rows)-1].cleanup = dropStores
	return rows
}

// largeVerb times a verb that prints as much as it likes; mib is the largest size of the process in memory.
func largeVerb(n uint64, args func(origin, cow string) []string) func(ctx context.Context, l *lab, c contender, round int) (sample, error) {
	return func(ctx context.Context, l *lab, _ contender, _ int) (sample, error) {
		origin, cow, err := l.bigStore(ctx, n, true)
		if err != nil {
			return sample{}, err
		}
		cmd := exec.CommandContext(ctx, l.binary, args(origin, cow)...)
		var complaints strings.Builder
		cmd.Stdout, cmd.Stderr = io.Discard, &complaints
		began := time.Now()
		err = cmd.Run()
		if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() > 1 || cmd.ProcessState.ExitCode() < 0 { // 1 is an answer: there are differences
			return sample{}, fmt.Errorf("%q: %w\n%s", cmd.Args, err, complaints.String())
		}
		took := time.Since(began).Seconds()
		used := cmd.ProcessState.SysUsage().(*syscall.Rusage)
		return sample{Value: took, More: map[string]float64{"mib": float64(used.Maxrss) / 1024,
			"cpu_seconds": (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()}}, nil
	}
}
