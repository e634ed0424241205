package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// originSize is the size of the origin of every workload that does not say otherwise, in bytes.
const originSize = 1 << 30

// A lab is where one run takes place: a scratch directory with the images.
type lab struct {
	settings
	dir    string
	origin int64 // bytes
	reg    *registry
}

func (l *lab) close() error {
	var err error
	if l.reg != nil && l.reg.server != nil {
		err = l.reg.stop()
	}
	return errors.Join(err, os.RemoveAll(l.dir))
}

func (l *lab) path(name string) string { return filepath.Join(l.dir, name) }

// say reports on standard error how far the run is.
func (l *lab) say(format string, args ...any) { fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...) }

// image returns an image of random bytes of the origin's size, made when it is first asked for. Its pages are
// in the cache of the operating system: every server reads the same file, so none gains by going last.
func (l *lab) image(name string, size int64) (string, error) {
	path := l.path(name)
	info, err := os.Stat(path)
	switch {
	case err == nil && info.Size() == size:
		return path, warm(path)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return "", err
	}
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var seed [32]byte
	if _, err := io.CopyN(f, rand.NewChaCha8(seed), size); err != nil {
		return "", err
	}
	return path, errors.Join(f.Sync(), f.Close())
}

// warm reads a file once, which leaves its pages in the cache.
func warm(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for {
		if _, err := f.Read(buf); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// copyImage copies a file with its holes, sharing blocks where the file system can.
func copyImage(ctx context.Context, from, to string) error {
	return command(ctx, "cp", "--sparse=always", "--reflink=auto", from, to)
}

// settle writes everything that is dirty to the disk, so that no measurement pays for the one before it.
func settle() { syscall.Sync() }

// command runs a program to its end; what it printed is in the error when it fails.
func command(ctx context.Context, argv ...string) error {
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%v: %w\n%s", argv, err, bytes.TrimSpace(out))
	}
	return nil
}

// A server is a process that serves NBD on a unix socket.
type server struct {
	cmd    *exec.Cmd
	socket string
	stderr bytes.Buffer
	exited chan error
	mount  string        // the server ends when this is unmounted; "": with SIGTERM
	ready  time.Duration // from the start of the process to the first bytes of its greeting
}

// start runs a server of NBD and returns when it has greeted a client. argv gets the socket's path.
func (l *lab) start(ctx context.Context, argv func(socket string) []string) (*server, error) {
	return l.startAt(ctx, l.path("s.sock"), greeting, argv)
}

// startAt is start of a server that is ready when ready has no error for the socket.
func (l *lab) startAt(ctx context.Context, socket string, ready func(socket string) error, argv func(socket string) []string) (*server, error) {
	s := &server{socket: socket, exited: make(chan error, 1)}
	if err := os.Remove(s.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	a := argv(s.socket)
	s.cmd = exec.CommandContext(ctx, a[0], a[1:]...)
	s.cmd.Stderr = &s.stderr
	s.cmd.Cancel = func() error { return s.cmd.Process.Signal(syscall.SIGTERM) }
	s.cmd.WaitDelay = 20 * time.Second
	began := time.Now()
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { s.exited <- s.cmd.Wait() }()
	if err := s.answers(ready, began.Add(2*time.Minute)); err != nil {
		s.cmd.Process.Kill()
		return nil, fmt.Errorf("%v: %w\n%s", a, err, s.stderr.Bytes())
	}
	s.ready = time.Since(began)
	return s, nil
}

// answers waits until ready has no error.
func (s *server) answers(ready func(socket string) error, until time.Time) error {
	for time.Now().Before(until) {
		select {
		case err := <-s.exited:
			s.exited <- err
			return fmt.Errorf("ended before it served: %v", err)
		default:
		}
		if ready(s.socket) == nil {
			return nil
		}
		time.Sleep(100 * time.Microsecond) // nothing reports when a foreign process begins to listen
	}
	return errors.New("does not serve")
}

// greeting receives the 18 bytes with which every NBD server begins.
func greeting(socket string) error {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	var b [18]byte
	_, err = io.ReadFull(c, b[:])
	return err
}

// uri is the address of an export, for fio's nbd engine.
func (s *server) uri(export string) string { return "nbd+unix:///" + export + "?socket=" + s.socket }

// stop ends the server as an operator would and waits for it.
func (s *server) stop() error {
	if s.mount == "" {
		s.cmd.Process.Signal(syscall.SIGTERM)
	} else if err := command(context.Background(), "fusermount3", "-u", s.mount); err != nil {
		return err
	}
	select {
	case err := <-s.exited:
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGTERM {
			return nil // it has no handler: qemu-nbd and nbdkit of some versions
		}
		if err != nil {
			return fmt.Errorf("%s: %w\n%s", s.cmd.Path, err, s.stderr.Bytes())
		}
		return nil
	case <-time.After(5 * time.Minute): // nbdkit cow frees a large overlay slowly on a busy machine
		s.cmd.Process.Kill()
		return fmt.Errorf("%s: does not end within five minutes of SIGTERM", s.cmd.Path)
	}
}
