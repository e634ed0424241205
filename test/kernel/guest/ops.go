package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// background is what Spawn started and Reap or Kill will end.
var background = map[int]*exec.Cmd{}

func do(op job.Op) job.Result {
	switch op.Do {
	case job.Ping:
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			return job.Result{Err: refusal(err)}
		}
		return job.Result{Out: unix.ByteSliceToString(u.Release[:])}
	case job.Module:
		return result(loadModules(op.Argv...))
	case job.Exec:
		return execute(op)
	case job.Until:
		return until(op)
	case job.Spawn:
		return spawn(op)
	case job.Reap, job.Kill:
		return reap(op)
	case job.Sleep:
		time.Sleep(time.Duration(op.N) * time.Millisecond)
		return job.Result{}
	case job.Mkdir:
		return result(os.MkdirAll(op.Dev, 0o755))
	case job.Pool:
		return result(pool(op))
	}
	if r, handled := deviceMapper(op); handled {
		return r
	}
	return onDevice(op)
}

func result(err error) job.Result { return job.Result{Err: refusal(err)} }

func seconds(op job.Op) time.Duration {
	if op.Seconds == 0 {
		return time.Minute
	}
	return time.Duration(op.Seconds) * time.Second
}

func execute(op job.Op) job.Result {
	ctx, cancel := context.WithTimeout(context.Background(), seconds(op))
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, op.Argv[0], op.Argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(op.Stdin), &out, &out
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	r := job.Result{Out: out.String()}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		r.Err = fmt.Sprintf("%s took longer than %v", op.Argv[0], seconds(op))
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	case err != nil:
		r.Err = refusal(err)
	}
	return r
}

func until(op job.Op) job.Result {
	want, end := op.Stdin, time.Now().Add(seconds(op))
	op.Stdin = ""
	for {
		r := execute(op)
		if r.Err != "" || strings.Contains(r.Out, want) {
			return r
		}
		if time.Now().After(end) {
			return job.Result{Err: fmt.Sprintf("never said %q", want), Out: r.Out}
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func spawn(op job.Op) job.Result {
	out, err := os.Create(filepath.Join(shareDir, op.Path))
	if err != nil {
		return result(err)
	}
	defer out.Close()
	cmd := exec.Command(op.Argv[0], op.Argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(op.Stdin), out, out
	if err := cmd.Start(); err != nil {
		return result(err)
	}
	background[cmd.Process.Pid] = cmd
	return job.Result{Out: strconv.Itoa(cmd.Process.Pid), N: int64(cmd.Process.Pid)}
}

func reap(op job.Op) job.Result {
	cmd := background[int(op.N)]
	if cmd == nil {
		return job.Result{Err: "no such background process"}
	}
	delete(background, int(op.N))
	if op.Do == job.Kill {
		cmd.Process.Kill()
	}
	timer := time.AfterFunc(seconds(op), func() { cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return job.Result{Code: exit.ExitCode()}
	}
	return result(err)
}
