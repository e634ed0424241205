// Package machine boots a real Linux kernel beside a test and lets the test speak to it.
//
// Two kinds of guests: user-mode Linux, a kernel that is a program and boots in three seconds over the
// host's own files ([UML]); and a distribution's kernel in qemu, slower, another version, two CPUs
// ([QEMU]). In both the first process is test/kernel/guest, which does what package job describes.
package machine

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// A Machine is a running guest. Its methods are for one goroutine.
type Machine struct {
	Release string // the kernel's version
	Booted  time.Duration
	Calls   int // lists of operations done
	Ops     int // operations done

	share   string
	disk    string
	cmd     *exec.Cmd
	in      io.WriteCloser
	replies chan string // closed when the line ends
	console *tail
	exited  chan error
	broken  error // why the line can't be used any more
	files   int
}

// line is how a machine is started and spoken to: what the two kinds differ in.
type line struct {
	cmd     *exec.Cmd
	disk    string                                              // the guest's name of disks, but for the last letter
	connect func() (to io.WriteCloser, from io.Reader, _ error) // called when cmd runs
}

// boot starts a machine and waits until its first process answers.
func boot(l line, share string) (*Machine, error) {
	m := &Machine{share: share, cmd: l.cmd, disk: l.disk, replies: make(chan string, 1), console: &tail{}, exited: make(chan error, 1)}
	l.cmd.Stdout, l.cmd.Stderr = m.console, m.console
	// A group of its own, so that Kill ends what user-mode Linux started and nothing else; and the
	// machine goes when the test does.
	l.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	start := time.Now()
	if err := l.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { m.exited <- l.cmd.Wait() }()
	in, out, err := l.connect()
	if err != nil {
		m.Kill()
		return nil, fmt.Errorf("%w\n%s", err, m.Console())
	}
	m.in = in
	go func() {
		defer close(m.replies)
		r := bufio.NewReaderSize(out, 1<<16)
		for {
			text, err := r.ReadString('\n')
			if err != nil {
				return
			}
			m.replies <- text
		}
	}()
	for {
		text, err := m.receive(5 * time.Minute)
		if err != nil {
			m.Kill()
			return nil, fmt.Errorf("the kernel did not come up: %w\n%s", err, m.Console())
		}
		if strings.TrimSpace(text) == "READY" {
			break
		}
	}
	m.Booted = time.Since(start)
	r, err := m.Do(job.Op{Do: job.Ping})
	if err != nil {
		m.Kill()
		return nil, err
	}
	m.Release = r[0].Out
	return m, nil
}

func (m *Machine) receive(wait time.Duration) (string, error) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case text, ok := <-m.replies:
		if !ok {
			return "", errors.New("the line to the guest ended")
		}
		return text, nil
	case err := <-m.exited:
		m.exited <- err
		return "", fmt.Errorf("the guest ended: %v", err)
	case <-timer.C:
		return "", fmt.Errorf("no answer for %v", wait)
	}
}

// Do does the operations in order, all of them whatever comes of each, and returns their results. An
// error means that the guest itself is gone or hangs; it cannot be used any more.
func (m *Machine) Do(ops ...job.Op) ([]job.Result, error) {
	if m.broken != nil {
		return nil, m.broken
	}
	r, err := m.do(ops)
	if err != nil {
		m.broken = fmt.Errorf("%w\n%s", err, m.Console())
		return nil, m.broken
	}
	m.Calls++
	m.Ops += len(ops)
	return r, nil
}

func (m *Machine) do(ops []job.Op) ([]job.Result, error) {
	text, err := json.Marshal(ops)
	if err != nil {
		return nil, err
	}
	if len(text) > 2000 {
		name := m.Name("job")
		if err := os.WriteFile(filepath.Join(m.share, name), text, 0o644); err != nil {
			return nil, err
		}
		defer os.Remove(filepath.Join(m.share, name))
		text = []byte("@" + name)
	}
	if _, err := m.in.Write(append(text, '\n')); err != nil {
		return nil, err
	}
	wait := 30 * time.Second
	for _, op := range ops {
		wait += time.Duration(op.Seconds)*time.Second + 5*time.Second
	}
	reply, err := m.receive(wait)
	if err != nil {
		return nil, err
	}
	var results []job.Result
	if err := json.Unmarshal([]byte(reply), &results); err != nil {
		return nil, fmt.Errorf("answer %q: %w", reply, err)
	}
	if len(results) != len(ops) {
		return nil, fmt.Errorf("%d results for %d operations", len(results), len(ops))
	}
	return results, nil
}

// Name returns a file name that was not used before. Shared files are never rewritten: a guest may
// remember the content of one it has seen.
func (m *Machine) Name(what string) string {
	m.files++
	return fmt.Sprintf("%s-%06d", what, m.files)
}

// Disk is the guest's path of disk i of Config.Disks.
func (m *Machine) Disk(i int) string { return m.disk + string(rune('a'+i)) }

// Share is the host's path of the directory that both see.
func (m *Machine) Share() string { return m.share }

// Console returns the last of what the kernel said.
func (m *Machine) Console() string { return m.console.String() }

// Complaints returns lines of the console in which the kernel reports a fault of its own.
func (m *Machine) Complaints() []string {
	var all []string
	for l := range strings.Lines(m.Console()) {
		for _, word := range []string{"BUG:", "WARNING:", "Oops", "Kernel panic", "INFO: task"} {
			if strings.Contains(l, word) {
				all = append(all, strings.TrimSpace(l))
				break
			}
		}
	}
	return all
}

// Plug pulls the plug and returns at once; it may be called while Do waits, which then fails.
func (m *Machine) Plug() { syscall.Kill(-m.cmd.Process.Pid, syscall.SIGKILL) }

// Kill pulls the plug and waits until the machine is gone.
func (m *Machine) Kill() {
	if m.cmd.Process != nil {
		m.Plug()
		m.exited <- <-m.exited
	}
	if m.in != nil {
		m.in.Close()
	}
	if m.broken == nil {
		m.broken = errors.New("the guest was killed")
	}
}

// Close shuts the machine down, or kills it when it does not go.
func (m *Machine) Close() {
	if m.broken == nil {
		fmt.Fprint(m.in, "END\n")
		select {
		case err := <-m.exited:
			m.exited <- err
		case <-time.After(10 * time.Second):
		}
	}
	m.Kill()
}

// tail keeps the last part of what is written to it.
type tail struct {
	mu   sync.Mutex
	text []byte
}

const tailBytes = 64 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if len(t.text) > 2*tailBytes {
		t.text = bytes.Clone(t.text[len(t.text)-tailBytes:])
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.text)
}
