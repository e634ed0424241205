package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// A FreezeCommand is run before nodes are sealed and, always, after: it makes the programs that use them write what they
// hold in memory, and wait.
type FreezeCommand struct {
	Command string        // for a shell, which gets one argument: freeze or thaw
	Timeout time.Duration // for each of both; 0: 10 s
}

// Run runs the command, with DMSNAP_ACTION as the argument and the names of the nodes in DMSNAP_NODES. A command that takes
// longer than Timeout, or than ctx, is killed with the processes that it started, which is an error.
func (f FreezeCommand) Run(ctx context.Context, thaw bool, nodes []string) error {
	timeout := f.Timeout
	if timeout <= 0 {
		timeout = 10 * time.Second
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("it took longer than %v", timeout))
	defer cancel()
	action := "freeze"
	if thaw {
		action = "thaw"
	}
	c := exec.CommandContext(ctx, "/bin/sh", "-c", f.Command+` "$@"`, "sh", action)
	c.Env = append(os.Environ(), "DMSNAP_ACTION="+action, "DMSNAP_NODES="+strings.Join(nodes, " "))
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	c.WaitDelay = time.Second // a process that left the group may keep the output open
	var out tail
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("the %s command: %w%s", action, err, out.text())
	}
	return err
}

// tail keeps the first bytes of an output.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p[:min(len(p), 1024-len(t.b))]...)
	return len(p), nil
}

func (t *tail) text() string {
	if s := strings.TrimSpace(strings.ToValidUTF8(string(t.b), "?")); s != "" {
		return ": " + strings.ReplaceAll(s, "\n", "; ")
	}
	return ""
}
