// Package nbdkernel makes exports of NBD servers block devices of the host, /dev/nbdN, by the NBD client of the Linux kernel.
//
//	d, err := nbdkernel.Attach(ctx, "nbd+unix:///disk?socket=/run/nbd.sock", nbdkernel.Options{Index: nbdkernel.AnyIndex})
//	// d.Path is ready: mount it
//	err = nbdkernel.Detach(ctx, d.Path, false)
//
// Attach does the handshake and hands the connections over to the kernel, which speaks to the server by itself: the device
// stays when the process ends, and fails when the server does. [Hold] stays between them instead and reconnects.
//
// # Guarantees
//
//   - Attach returns when the device can be used, or leaves none. Options that the kernel would ignore, or do in another way, are
//     refused with the reason.
//   - Detach makes what was written durable first, and refuses a device in use; with force neither stops it.
//   - Functions may be called concurrently, for different devices.
//
// It needs the kernel module nbd, and CAP_SYS_ADMIN to attach and detach. The package uses genetlink
// (docs/decisions/0011-genetlink.md); no core package imports it.
package nbdkernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// AnyIndex has the kernel choose a device that is free.
const AnyIndex = -1

// ErrTLS is the error of Attach for a URI that asks for TLS; see Hold.
var ErrTLS = errors.New("the kernel's NBD client has no TLS")

// Options are how a device is attached.
type Options struct {
	Index       int           // of the device /dev/nbdN, or AnyIndex
	Connections int           // to the server; 0: 1. More need a server that allows it (multi-conn)
	ReadOnly    bool          // the device, whatever the export is
	BlockSize   int           // logical block size in bytes, a power of two from 512 to 4096; 0: what the server requires
	Timeout     time.Duration // after which the kernel gives a connection up that does not answer a request; 0: never
	DeadTimeout time.Duration // how long requests wait when all connections are lost; 0: they fail at once
}

// A Device is an attached device.
type Device struct {
	Path       string   `json:"device"` // /dev/nbdN
	Index      int      `json:"index"`
	SizeBytes  int64    `json:"size_bytes"`
	BlockSize  int      `json:"block_size"`
	ReadOnly   bool     `json:"read_only"`
	Partitions []string `json:"partitions"`    // paths
	URI        string   `json:"uri,omitempty"` // of the export, where the kernel remembers it (Linux 5.14)
	PID        int      `json:"pid,omitempty"` // of the process that attached it, as the kernel reports it
}

// IndexOf reads the index out of /dev/nbdN, or of a link to it.
func IndexOf(path string) (int, error) {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	m := devicePath.FindStringSubmatch(path)
	if m == nil {
		return 0, fmt.Errorf("%s: not the path of an NBD device, /dev/nbdN", path)
	}
	return strconv.Atoi(m[1])
}

var devicePath = regexp.MustCompile(`^/dev/nbd([0-9]{1,6})$`)

// Attach connects to the export that an NBD URI names and makes it a block device. It returns when the device can be
// opened and has its size; its partitions, if it has any, are known by then. A device that is not ready when ctx ends is detached.
func Attach(ctx context.Context, uri string, o Options) (Device, error) {
	return attach(ctx, uri, o, func(ctx context.Context) (*nbd.Transmission, error) {
		t, err := nbd.DialTransmission(ctx, uri)
		if u, parse := nbd.ParseURI(uri); parse == nil && u.TLS {
			err = fmt.Errorf("%s: %w", uri, ErrTLS)
		}
		return t, err
	})
}

// attach hands connections made by dial over to the kernel.
func attach(ctx context.Context, uri string, o Options, dial func(context.Context) (*nbd.Transmission, error)) (d Device, err error) {
	k, err := dialKernel()
	if err != nil {
		return d, err
	}
	defer k.Close()
	var list []*nbd.Transmission
	defer func() {
		for _, t := range list {
			if err != nil {
				t.Disconnect()
			} else {
				t.Conn.Close() // the kernel has its own reference
			}
		}
	}()
	for range max(1, o.Connections) {
		t, err := dial(ctx)
		if err != nil {
			return d, err
		}
		list = append(list, t)
		if err := sameExport(list[0], t, o.Connections); err != nil {
			return d, fmt.Errorf("%s: %w", uri, err)
		}
	}
	c, err := configure(uri, list, o)
	if err != nil {
		return d, fmt.Errorf("%s: %w", uri, err)
	}
	index, err := k.connect(c)
	if err != nil {
		return d, err
	}
	if d, err = ready(ctx, index, c.size); err != nil {
		return d, errors.Join(err, k.disconnect(index))
	}
	d.URI = uri
	return d, nil
}

// sameExport refuses a connection whose export is not the first one's.
func sameExport(first, t *nbd.Transmission, connections int) error {
	switch {
	case connections > 1 && !first.Info.MultiConn:
		return errors.New("the server does not allow several connections (multi-conn)")
	case first.Info.Size != t.Info.Size || first.Flags != t.Flags:
		return errors.New("the export is another one at each connection")
	}
	return nil
}

// A configuration is what is sent to the kernel about a device.
type configuration struct {
	index                int // or AnyIndex
	size                 int64
	blockSize            int
	flags                uint16 // of the transmission
	timeout, deadTimeout time.Duration
	backend              string
	sockets              []*nbd.Transmission
}

// configure checks what the kernel could not do, or would do silently in another way.
func configure(uri string, list []*nbd.Transmission, o Options) (c configuration, err error) {
	info := list[0].Info
	c = configuration{index: o.Index, size: info.Size, flags: list[0].Flags, blockSize: o.BlockSize, timeout: o.Timeout, deadTimeout: o.DeadTimeout,
		backend: uri, sockets: list}
	least := max(512, int(info.MinBlock))
	if c.blockSize == 0 {
		c.blockSize = least
	}
	switch b := c.blockSize; {
	case b < least || b > os.Getpagesize() || b&(b-1) != 0:
		return c, fmt.Errorf("a block size of %d bytes: must be a power of two from %d, which the server requires, to %d", b, least, os.Getpagesize())
	case info.Size == 0:
		return c, errors.New("the export is empty")
	case info.Size%int64(b) != 0:
		return c, fmt.Errorf("the export has %d bytes, which is no multiple of the block size %d", info.Size, b)
	case info.MaxBlock < 128<<10:
		return c, fmt.Errorf("the server takes requests of at most %d bytes: the kernel's client does not ask for that limit", info.MaxBlock)
	}
	if o.ReadOnly {
		c.flags |= wire.ReadOnly
	}
	// The kernel's client speaks the simple form of these.
	c.flags &= wire.HasFlags | wire.ReadOnly | wire.SendFlush | wire.SendFUA | wire.Rotational | wire.SendTrim | wire.SendWriteZeroes | wire.CanMultiConn
	return c, nil
}

// flushTimeout is how long a forced detach waits for what was written to be durable: the server may be lost.
const flushTimeout = time.Minute

// Detach makes what was written to a device durable and detaches it. A device in use, by a mounted file system for one, is refused
// unless force is set; so is one that can't be flushed, for which force waits a minute. It returns when the kernel has let the device go.
func Detach(ctx context.Context, path string, force bool) error {
	index, err := IndexOf(path)
	if err != nil {
		return err
	}
	k, err := dialKernel()
	if err != nil {
		return err
	}
	defer k.Close()
	connected, err := k.connected(index)
	if err != nil {
		return err
	}
	if len(connected) == 0 {
		return fmt.Errorf("%s: the device is not attached", path)
	}
	if err := flush(ctx, path, !force); err != nil && !force {
		return err
	}
	return k.detach(ctx, index)
}

// detach ends a device and waits until the kernel has let it go.
func (k *kernel) detach(ctx context.Context, index int) error {
	if err := k.disconnect(index); err != nil {
		return err
	}
	return await(ctx, fmt.Sprintf("/dev/nbd%d: the kernel still has the device", index), func() error {
		if connected, err := k.connected(index); err != nil || len(connected) > 0 {
			return errors.Join(err, errWait)
		}
		return nil
	})
}

// flush makes what was written to a device durable. exclusive: the device must not be in use; else it waits for flushTimeout at most.
func flush(ctx context.Context, path string, exclusive bool) error {
	flags := unix.O_RDONLY
	if exclusive {
		flags |= unix.O_EXCL // of a block device: nobody mounts or holds it
	} else {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, flushTimeout, errors.New("the server does not answer"))
		defer cancel()
	}
	done := make(chan error, 1)
	go func() { // nothing ends an fsync
		f, err := os.OpenFile(path, flags, 0)
		if err == nil {
			err = f.Sync()
			f.Close()
		}
		done <- err
	}()
	select {
	case err := <-done:
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%s: the device is in use: unmount its file systems first", path)
		}
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s: what was written is not durable yet: %w", path, context.Cause(ctx))
	}
}

// List returns the devices that are attached, by whatever program, in order.
func List() ([]Device, error) {
	k, err := dialKernel()
	if err != nil {
		return nil, err
	}
	defer k.Close()
	indices, err := k.connected(AnyIndex)
	if err != nil {
		return nil, err
	}
	list := []Device{}
	for _, i := range indices {
		d, err := describe(i)
		if errors.Is(err, os.ErrNotExist) { // detached meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, d)
	}
	return list, nil
}
