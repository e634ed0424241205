package nbdkernel

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/nbd"
)

// keepBytes is how much Hold keeps of what was written and not flushed.
const keepBytes = 64 << 20

// HoldOptions are those of Hold.
type HoldOptions struct {
	Options // DeadTimeout: how long requests wait for a server that is lost; 0: 5 minutes

	// Dial connects to the server, at first and again; nil: by the URI. It may use TLS.
	Dial func(ctx context.Context) (*nbd.Client, error)

	// Log receives one line for each failed request. It may be called concurrently.
	Log func(line string)
}

// Hold attaches an export, calls ready when the device is, and stays between the kernel and the server until ctx ends,
// which detaches the device, or the device is detached.
//
// When the server is lost it connects again, with what the server had acknowledged and not flushed (nbd.Redialer.KeepChanges): the
// device's users wait meanwhile and lose nothing, also when the server was killed. For that it keeps up to 64 MiB in memory.
// A request passes through this process, which costs about as much CPU time as the server.
func Hold(ctx context.Context, uri string, o HoldOptions, ready func(Device) error) (err error) {
	if o.Dial == nil {
		o.Dial = func(ctx context.Context) (*nbd.Client, error) { return nbd.Dial(ctx, uri) }
	}
	if o.DeadTimeout == 0 {
		o.DeadTimeout = 5 * time.Minute
	}
	export, err := nbd.NewRedialer(ctx, o.DeadTimeout, o.Dial)
	if err != nil {
		return err
	}
	export.KeepChanges(keepBytes)
	info := export.Info()
	between := nbd.NewServer(nbd.Options{Log: o.Log})
	err = between.Add(nbd.Export{Device: export, ReadOnly: info.ReadOnly || o.ReadOnly, CanTrim: info.CanTrim, MultiConn: true})
	if err != nil {
		export.Close()
		return err
	}
	// The kernel's connections outlive ctx: until the device is detached.
	serving, stop := context.WithCancel(context.Background())
	var connections sync.WaitGroup
	defer connections.Wait()
	defer stop()
	defer export.Close() // so that requests that wait for the server fail
	detached := make(chan struct{})
	o.Options.DeadTimeout = 0 // this process is the server
	d, err := attach(ctx, uri, o.Options, func(ctx context.Context) (*nbd.Transmission, error) {
		ours, theirs, err := socketPair()
		if err != nil {
			return nil, err
		}
		connections.Go(func() { between.ServeConn(serving, ours) })
		return nbd.NewTransmission(ctx, theirs, "")
	})
	if err != nil {
		return err
	}
	go func() {
		connections.Wait()
		close(detached)
	}()
	if err = ready(d); err == nil {
		select {
		case <-detached:
			return export.Flush()
		case <-ctx.Done():
		}
	}
	// What is in the page cache is written as long as there is a device, also of one that is in use.
	return errors.Join(err, flush(context.Background(), d.Path, false), release(d.Index))
}

// release detaches a device whose process ends.
func release(index int) error {
	k, err := dialKernel()
	if err != nil {
		return err
	}
	defer k.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return k.detach(ctx, index)
}

// socketPair returns two connected sockets.
func socketPair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var list [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket pair")
		c, failed := net.FileConn(f)
		f.Close()
		list[i], err = c, errors.Join(err, failed)
	}
	if err != nil {
		for _, c := range list {
			if c != nil {
				c.Close()
			}
		}
		return nil, nil, err
	}
	return list[0], list[1], nil
}
