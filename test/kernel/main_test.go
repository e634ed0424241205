// Package kernel_test compares dmsnap with a running Linux kernel: the same operations in both, and each other's
// stores. It runs with DMSNAP_KERNEL=1, as `make test-kernel` does; see README.md.
package kernel_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/test/kernel/job"
	"github.com/dmsnap/dmsnap/test/kernel/machine"
)

// unavailable says why there is no kernel to ask, or is empty.
var unavailable = "no kernel is asked without DMSNAP_KERNEL=1 (make test-kernel)"

// binaries is the directory of the static programs that run inside guests.
var binaries string

// A judge is a kind of machine that runs a kernel: how it is started, and why that is impossible here.
type judge struct {
	name  string
	have  func() error
	start func(machine.Config) (*machine.Machine, error)
	shim  string
}

// judging is the kind of machine in use.
var judging judge

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Getenv("DMSNAP_KERNEL") == "" {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "dmsnap-kernel-")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer os.RemoveAll(dir)
	binaries = dir
	for name, pkg := range map[string]string{"guest": "./guest", "files": "./files", "dmsnap": "../../cmd/dmsnap"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(dir, name), pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Printf("build %s: %v\n%s", pkg, err, out)
			return 1
		}
	}
	if unavailable = chooseJudge(dir); unavailable != "" {
		fmt.Println("SKIPPED:", unavailable)
		return m.Run()
	}
	start := time.Now()
	code := m.Run()
	closeShared()
	if tally.boots > 0 {
		fmt.Printf("%s (%v in all)\n", tally.String(), time.Since(start).Round(time.Second))
	}
	return code
}

// chooseJudge sets judging to the first kind of machine whose guest program answers, and leaves that machine running
// for the tests that share one. It returns why there is none: that a kernel is installed, or begins to boot, does
// not mean that programs run under it.
func chooseJudge(dir string) (why string) {
	uml := judge{name: "uml", have: machine.HaveUML, start: machine.UML}
	kinds := []judge{uml, {name: "qemu", have: machine.HaveQEMU, start: machine.QEMU}}
	if os.Getenv("DMSNAP_KERNEL") == "qemu" {
		kinds = kinds[1:]
	}
	var reasons []string
	for _, kind := range kinds {
		err := kind.have()
		if err == nil && kind.name == "uml" {
			var noShim error
			if kind.shim, noShim = machine.BuildShim(dir); noShim != nil {
				fmt.Println("user-mode Linux without the shim for long register states:", noShim)
			}
		}
		if err == nil {
			judging = kind
			err = startShared()
		}
		if err == nil {
			return ""
		}
		fmt.Printf("no kernel by %s: %v\n", kind.name, err)
		reasons = append(reasons, fmt.Sprintf("%s: %s", kind.name, strings.SplitN(err.Error(), "\n", 2)[0]))
	}
	return "no kernel can be asked on this machine (" + strings.Join(reasons, "; ") + ")"
}

// tally counts what was compared, for the summary at the end.
var tally counts

type counts struct {
	mu                                                      sync.Mutex
	releases                                                []string
	boots                                                   int
	scripts, operations, observations                       int
	exchanged, crashes, rounds, kills, percentages, hazards int
}

func (c *counts) add(change func(*counts)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c)
}

func (c *counts) String() string {
	return fmt.Sprintf("judged by Linux %s (%d boots): %d scripts, %d operations and %d states compared; "+
		"%d stores exchanged, %d crash images, %d cross-merge rounds, %d kill points, %d LVM percentages, %d hazards reproduced",
		strings.Join(c.releases, ", "), c.boots, c.scripts, c.operations, c.observations,
		c.exchanged, c.crashes, c.rounds, c.kills, c.percentages, c.hazards)
}

// boot starts a machine of the kind that judges, with the modules loaded and an empty pool, and checks at the end of
// the test that the kernel logged no error.
func boot(t testing.TB, disks ...string) *machine.Machine {
	t.Helper()
	need(t)
	m, err := newMachine(machine.Config{Dir: t.TempDir(), Disks: disks})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

func need(t testing.TB) {
	t.Helper()
	if unavailable != "" {
		t.Skip("SKIPPED: " + unavailable)
	}
}

// newMachine starts a machine with the guest's program.
func newMachine(c machine.Config) (*machine.Machine, error) {
	c.Guest, c.Shim = filepath.Join(binaries, "guest"), judging.shim
	m, err := judging.start(c)
	if err != nil {
		return nil, err
	}
	r, err := m.Do(job.Op{Do: job.Module, Argv: machine.Wanted()}, job.Op{Do: job.Pool, Dev: pool, N: poolBytes})
	if err == nil && (r[0].Err != "" || r[1].Err != "") {
		err = fmt.Errorf("modules: %s; pool: %s\n%s", r[0].Err, r[1].Err, m.Console())
	}
	if err != nil {
		m.Kill()
		return nil, err
	}
	tally.add(func(c *counts) {
		c.boots++
		if !slices.Contains(c.releases, m.Release) {
			c.releases = append(c.releases, m.Release)
		}
	})
	return m, nil
}

// shared is the machine of the tests that leave it as they found it: one boot for all of them.
var shared struct {
	m   *machine.Machine
	dir string
}

// sharedMachine returns the running machine, or a new one when a test broke the last.
func sharedMachine(t testing.TB) *machine.Machine {
	t.Helper()
	need(t)
	if shared.m != nil {
		if _, err := shared.m.Do(job.Op{Do: job.Ping}); err == nil {
			return shared.m
		}
		closeShared()
	}
	if err := startShared(); err != nil {
		t.Fatal(err)
	}
	return shared.m
}

func startShared() error {
	dir, err := os.MkdirTemp("", "dmsnap-guest-")
	if err != nil {
		return err
	}
	m, err := newMachine(machine.Config{Dir: dir})
	if err != nil {
		os.RemoveAll(dir)
		return err
	}
	shared.m, shared.dir = m, dir
	return nil
}

func closeShared() {
	if shared.m != nil {
		shared.m.Close()
		os.RemoveAll(shared.dir)
		shared.m = nil
	}
}
