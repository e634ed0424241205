package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// outcome is what became of a call of a verb.
type outcome struct {
	args        []string
	status      int // -1: killed by a signal
	out, stderr string
}

func (o outcome) String() string {
	return fmt.Sprintf("dmsnap %s: status %d, %.300q, stderr %.2000q", strings.Join(o.args, " "), o.status, o.out, o.stderr)
}

// verbTimeout is how long a verb may take before it counts as hanging.
const verbTimeout = 60 * time.Second

// run runs a verb to its end.
func run(args ...string) outcome {
	ctx, cancel := context.WithTimeout(context.Background(), verbTimeout)
	defer cancel()
	return runUntil(ctx, syscall.SIGKILL, args...)
}

// runUntil runs a verb, and sends it a signal when ctx ends.
func runUntil(ctx context.Context, signal syscall.Signal, args ...string) outcome {
	var out, stderr bytes.Buffer
	c := exec.CommandContext(ctx, program(), args...)
	c.Stdout, c.Stderr = &out, &stderr
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.Cancel = func() error { return c.Process.Signal(signal) }
	c.WaitDelay = verbTimeout
	err := c.Run()
	o := outcome{args, -1, out.String(), stderr.String()}
	if c.ProcessState != nil {
		o.status = c.ProcessState.ExitCode()
	} else {
		o.stderr += err.Error()
	}
	return o
}

// server is a running dmsnap serve, or daemon.
type server struct {
	socket, control string
	cmd             *exec.Cmd
	http            *http.Client
	ended           chan struct{} // closed when the process has ended
	mu              sync.Mutex
	stderr          bytes.Buffer
}

func (s *server) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stderr.Write(p)
}

// log returns what the server has written to its standard error.
func (s *server) log() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stderr.String()
}

// serve starts dmsnap serve with its sockets in dir, and waits until clients may connect.
func serve(dir string, args ...string) (*server, error) { return launch(dir, "serve", args...) }

// launch is serve for any verb that serves.
func launch(dir, verb string, args ...string) (*server, error) {
	s := &server{socket: dir + "/nbd", control: dir + "/ctl", ended: make(chan struct{})}
	s.cmd = exec.Command(program(), append(append([]string{verb}, args...), "--socket", s.socket, "--control", s.control)...)
	s.cmd.Stderr = s
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	s.http = &http.Client{Timeout: 70 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.control)
		}}}
	ready := make(chan error, 1)
	go func() {
		r := bufio.NewReader(out)
		_, err := r.ReadString('\n')
		ready <- err
		io.Copy(io.Discard, r)
		s.cmd.Wait()
		close(s.ended)
	}()
	select {
	case err = <-ready:
	case <-time.After(verbTimeout):
		err = errors.New("it says nothing")
	}
	if err != nil {
		s.kill()
		return nil, fmt.Errorf("%s %q: %w, status %d, %s", verb, args, err, s.cmd.ProcessState.ExitCode(), s.log())
	}
	return s, nil
}

// wait waits for the end of the process and returns its exit status, -1 when a signal ended it.
func (s *server) wait(timeout time.Duration) (int, error) {
	select {
	case <-s.ended:
		return s.cmd.ProcessState.ExitCode(), nil
	case <-time.After(timeout):
		return 0, fmt.Errorf("the server did not end within %v", timeout)
	}
}

// terminate sends SIGTERM and returns the exit status.
func (s *server) terminate() (int, error) {
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return 0, err
	}
	status, err := s.wait(30 * time.Second)
	if err != nil {
		// What every goroutine is doing.
		s.cmd.Process.Signal(syscall.SIGQUIT)
		s.wait(5 * time.Second)
		s.kill()
		err = fmt.Errorf("SIGTERM: %w\n%.20000s", err, s.log())
	}
	return status, err
}

// kill ends the process at once.
func (s *server) kill() {
	s.cmd.Process.Kill() // an error: it has ended
	<-s.ended
}

// apiError is a refusal of the control API.
type apiError struct {
	Status        int
	Code, Message string
}

func (e *apiError) Error() string { return fmt.Sprintf("%d %s: %s", e.Status, e.Code, e.Message) }

// api calls the control API. answer may be nil.
func (s *server) api(method, path string, body, answer any) error {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		r = bytes.NewReader(b)
	}
	q, err := http.NewRequest(method, "http://dmsnap/v1/"+path, r)
	if err != nil {
		return err
	}
	p, err := s.http.Do(q)
	if err != nil {
		return err
	}
	defer p.Body.Close()
	b, err := io.ReadAll(p.Body)
	if err != nil {
		return err
	}
	if p.StatusCode != http.StatusOK {
		var e struct{ Error apiError }
		if err := json.Unmarshal(b, &e); err != nil {
			return fmt.Errorf("%s %s: %d %.200q", method, path, p.StatusCode, b)
		}
		e.Error.Status = p.StatusCode
		return &e.Error
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(b, answer)
}

// snapshotStatus is what the API says of a snapshot.
type snapshotStatus struct {
	Name       string `json:"name"`
	Merged     bool   `json:"merged"`
	State      string `json:"state"`
	Valid      bool   `json:"valid"`
	Exceptions int64  `json:"exceptions"`
	Full       bool   `json:"full"`
}

// mergeStatus is what the API says of a live merge.
type mergeStatus struct {
	Name   string `json:"name"`
	State  string `json:"state"`
	Error  string `json:"error"`
	Merged int64  `json:"merged_chunks"`
	Total  int64  `json:"total_chunks"`
}

type serverStatus struct {
	Snapshots []snapshotStatus `json:"snapshots"`
	Merge     *mergeStatus     `json:"merge"`
}

func (s *server) status() (st serverStatus, err error) {
	return st, s.api("GET", "status", nil, &st)
}
