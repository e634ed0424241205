package main

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// machine is where and with what was measured.
type machine struct {
	When       time.Time         `json:"when"`
	CPU        string            `json:"cpu"`
	Cores      int               `json:"cores"`
	MemoryMiB  int64             `json:"memory_mib"`
	Kernel     string            `json:"kernel"`
	FileSystem string            `json:"file_system"` // of the scratch directory
	Go         string            `json:"go"`
	Commit     string            `json:"commit"`
	Load       float64           `json:"load_before"` // processes that wanted a core in the minute before
	Versions   map[string]string `json:"versions"`
}

func (l *lab) machine(ctx context.Context) machine {
	m := machine{When: time.Now().UTC().Truncate(time.Second), Cores: runtime.NumCPU(), Go: runtime.Version(),
		CPU: field("/proc/cpuinfo", "model name"), FileSystem: fileSystem(l.dir), Versions: map[string]string{}}
	if kib, err := strconv.ParseInt(strings.TrimSuffix(field("/proc/meminfo", "MemTotal"), " kB"), 10, 64); err == nil {
		m.MemoryMiB = kib / 1024
	}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = strings.TrimSpace(string(b))
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		first, _, _ := strings.Cut(string(b), " ")
		m.Load, _ = strconv.ParseFloat(first, 64)
	}
	m.Commit = firstLine(ctx, "git", "describe", "--always", "--dirty", "--abbrev=12")
	for _, p := range peers {
		if line := firstLine(ctx, p.program, "--version"); line != "" {
			m.Versions[p.program] = line
		}
	}
	return m
}

// field returns the value of the first "name: value" line of a file.
func field(path, name string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		key, value, ok := strings.Cut(lines.Text(), ":")
		if ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// firstLine is the first line that a program prints, or "".
func firstLine(ctx context.Context, argv ...string) string {
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).Output()
	if err != nil {
		return ""
	}
	line, _, _ := bytes.Cut(out, []byte("\n"))
	return string(bytes.TrimSpace(line))
}

// fileSystem is the type of the file system a directory is on.
func fileSystem(dir string) string {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	longest, found := -1, ""
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// "36 35 98:0 /root /mount/point options tags - type source options"
		before, after, _ := strings.Cut(lines.Text(), " - ")
		b, a := strings.Fields(before), strings.Fields(after)
		if len(b) < 5 || len(a) < 1 {
			continue
		}
		if under, err := filepath.Rel(b[4], dir); err == nil && !strings.HasPrefix(under, "..") && len(b[4]) >= longest {
			longest, found = len(b[4]), a[0]
		}
	}
	return found
}

// A peer is a program the benchmark needs, and Debian's package of it.
type peer struct{ program, pkg string }

var peers = []peer{{"fio", "fio"}, {"qemu-nbd", "qemu-utils"}, {"qemu-img", "qemu-utils"}, {"nbdkit", "nbdkit"},
	{"nbdfuse", "libnbd-bin"}, {"qemu-storage-daemon", "qemu-system-common"}}

// installPeers says which peers are absent and how to get them; with install, and as root, it gets them.
func installPeers(ctx context.Context, install bool) {
	l := &lab{}
	var packages []string
	for _, p := range peers {
		if _, err := exec.LookPath(p.program); err != nil {
			l.say("%s is absent; Debian has it in %s", p.program, p.pkg)
			packages = append(packages, p.pkg)
		}
	}
	packages = slices.Compact(packages) // those of one package stand together
	switch _, err := exec.LookPath("apt-get"); {
	case packages == nil:
		return
	case !install || syscall.Geteuid() != 0 || err != nil:
		l.say("what needs them is left out. To install them: apt-get install %s", strings.Join(packages, " "))
		return
	}
	apt := []string{"env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-y", "-q", "--no-install-recommends"}
	for _, what := range [][]string{{"update"}, append([]string{"install"}, packages...)} {
		if err := command(ctx, slices.Concat(apt, what)...); err != nil {
			l.say("%v", err)
			return
		}
	}
}
