package nbdkernel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// errWait is the reason of something that may become true.
var errWait = errors.New("not yet")

// await calls done until it no longer returns errWait, or ctx ends: then with an error that says what is missing.
func await(ctx context.Context, missing string, done func() error) error {
	for {
		err := done()
		if !errors.Is(err, errWait) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", missing, context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// seconds rounds up: the kernel counts whole seconds.
func seconds(d time.Duration) uint64 { return uint64((d + time.Second - 1) / time.Second) }

// fileOf returns a duplicate of a connection's socket.
func fileOf(nc net.Conn) (*os.File, error) {
	c, ok := nc.(interface{ File() (*os.File, error) })
	if !ok {
		return nil, fmt.Errorf("a connection of type %T has no socket", nc)
	}
	return c.File()
}

func sysfs(index int, name string) string { return fmt.Sprintf("/sys/block/nbd%d/%s", index, name) }

// attribute reads an attribute of a device; a number if number is set.
func attribute(index int, name string) (string, error) {
	b, err := os.ReadFile(sysfs(index, name))
	return strings.TrimSpace(string(b)), err
}

func number(index int, name string) (int64, error) {
	text, err := attribute(index, name)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(text, 10, 64)
}

// describe returns what the kernel says of a device.
func describe(index int) (d Device, err error) {
	d = Device{Path: fmt.Sprintf("/dev/nbd%d", index), Index: index}
	sectors, err := number(index, "size")
	if err != nil {
		return d, err
	}
	readOnly, err := number(index, "ro")
	if err != nil {
		return d, err
	}
	blockSize, err := number(index, "queue/logical_block_size")
	if err != nil {
		return d, err
	}
	d.SizeBytes, d.ReadOnly, d.BlockSize = sectors*512, readOnly != 0, int(blockSize)
	d.URI, _ = attribute(index, "backend") // these two are for people, and not of every kernel
	pid, _ := number(index, "pid")
	d.PID = int(pid)
	d.Partitions = []string{}
	parts, err := filepath.Glob(sysfs(index, fmt.Sprintf("nbd%dp*", index)))
	for _, p := range parts {
		d.Partitions = append(d.Partitions, "/dev/"+filepath.Base(p))
	}
	slices.SortFunc(d.Partitions, func(a, b string) int {
		if len(a) != len(b) {
			return len(a) - len(b)
		}
		return strings.Compare(a, b)
	})
	return d, err
}

// ready waits until a device has its size and can be opened, and has the kernel read its partitions.
func ready(ctx context.Context, index int, size int64) (d Device, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	path := fmt.Sprintf("/dev/nbd%d", index)
	err = await(ctx, path+": the device is not ready: it has no size, or no node in /dev", func() error {
		return open(path, index, size)
	})
	if err != nil {
		return d, err
	}
	return describe(index)
}

// open opens a device as it must be and returns errWait where it is not yet.
func open(path string, index int, size int64) error {
	f, err := os.OpenFile(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENXIO) {
		return errWait
	}
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	number, err := attribute(index, "dev")
	if got := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || got != number {
		return fmt.Errorf("%s: not the node of the block device %s (%w)", path, number, err)
	}
	if got, err := f.Seek(0, 2); err != nil || got != size {
		return errWait
	}
	// A device that has no partitions by its driver's parameter, or whose partitions are in use already, is as ready.
	if err := unix.IoctlSetInt(int(f.Fd()), unix.BLKRRPART, 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%s: read the partition table: %w", path, err)
	}
	return nil
}
