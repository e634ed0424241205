package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"
)

// cpuFigure is the name of a sample's figure: µs of CPU time of all the server's threads a request, in the kernel and outside.
const cpuFigure = "cpu_us"

// rateFigure is the name of a sample's figure: requests a second.
const rateFigure = "rate"

// clockTick is the unit of the times in /proc/PID/stat, USER_HZ.
const clockTick = 10 * time.Millisecond

// cpuTime is the CPU time that a process has had, with that of threads that have ended.
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStat(b)
}

// parseStat adds utime and stime, fields 14 and 15. The second field is the program's name in brackets, with anything in it.
func parseStat(b []byte) (time.Duration, error) {
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/PID/stat with %d fields", len(f))
	}
	user, err := strconv.ParseInt(string(f[11]), 10, 64)
	system, err2 := strconv.ParseInt(string(f[12]), 10, 64)
	return time.Duration(user+system) * clockTick, errors.Join(err, err2)
}

// cpu is the CPU time of the target's servers.
func (t *target) cpu() (time.Duration, error) {
	var sum time.Duration
	for _, s := range t.servers() {
		d, err := cpuTime(s.cmd.Process.Pid)
		if err != nil {
			return 0, err
		}
		sum += d
	}
	return sum, nil
}

// costs runs a load, which returns how many requests it made, and adds what they cost the server to the sample.
func (t *target) costs(s *sample, load func() (requests int64, err error)) error {
	before, err := t.cpu()
	if err != nil {
		return err
	}
	n, err := load()
	if err != nil || len(t.servers()) == 0 {
		return err
	}
	after, err := t.cpu()
	if err != nil {
		return err
	}
	if s.More == nil {
		s.More = map[string]float64{}
	}
	s.More[cpuFigure] = float64((after - before).Nanoseconds()) / 1e3 / float64(n)
	return nil
}
