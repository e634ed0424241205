package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// transfer is how much one system call moves where the size of requests is of no interest.
const transfer = 1 << 20

// aligned returns n bytes whose address direct I/O accepts.
func aligned(n int64) []byte {
	const page = 4096
	b := make([]byte, n+page)
	skip := page - int64(uintptr(unsafe.Pointer(&b[0]))%page)
	return b[skip : skip+n]
}

// open opens a device past the page cache, so that the kernel's other readers and writers see the same
// bytes at once, and files of the share as they are.
func open(dev string, flags int) (*os.File, error) {
	f, err := os.OpenFile(dev, flags|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) {
		return os.OpenFile(dev, flags, 0)
	}
	return f, err
}

func onDevice(op job.Op) job.Result {
	flags := os.O_RDWR
	if op.Do == job.Read || op.Do == job.Get || op.Do == job.Size {
		flags = os.O_RDONLY
	}
	path, err := node(op.Dev)
	if err != nil {
		return result(err)
	}
	f, err := open(path, flags)
	if err != nil {
		return result(err)
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return result(err)
	}
	if op.N == 0 {
		op.N = end - op.Off
	}
	switch op.Do {
	case job.Size:
		return job.Result{N: end}
	case job.Flush:
		return result(f.Sync())
	case job.Write:
		b := aligned(op.N)
		copy(b, kernelcase.Stream(op.Seed, op.Off, op.N))
		n, err := f.WriteAt(b, op.Off)
		return job.Result{N: int64(n), Err: refusal(err)}
	case job.Drop:
		arg := [2]uint64{uint64(op.Off), uint64(op.N)}
		_, _, no := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&arg)))
		if no != 0 {
			return result(no)
		}
		return job.Result{}
	case job.Read:
		sum := sha256.New()
		n, err := move(sum, f, op.Off, op.N)
		return job.Result{Out: hex.EncodeToString(sum.Sum(nil)), N: n, Err: refusal(err)}
	case job.Get:
		return result(get(f, op))
	case job.Put:
		return result(put(f, op))
	}
	return job.Result{Err: fmt.Sprintf("no such operation: %q", op.Do)}
}

// move copies n bytes of f at off to w.
func move(w io.Writer, f io.ReaderAt, off, n int64) (int64, error) {
	b := aligned(min(n, transfer))
	done := int64(0)
	for done < n {
		piece := b[:min(n-done, transfer)]
		k, err := f.ReadAt(piece, off+done)
		if k < len(piece) {
			return done, err
		}
		if _, err := w.Write(piece); err != nil {
			return done, err
		}
		done += int64(k)
	}
	return done, nil
}

func get(f *os.File, op job.Op) error {
	out, err := os.OpenFile(filepath.Join(shareDir, op.Path), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = move(out, f, op.Off, op.N)
	// The host reads its own file; what is still in the guest's memory is not there.
	return errors.Join(err, out.Sync(), out.Close())
}

func put(f *os.File, op job.Op) error {
	in, err := os.Open(filepath.Join(shareDir, op.Path))
	if err != nil {
		return err
	}
	defer in.Close()
	size, err := in.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	b := aligned(transfer)
	for off := int64(0); off < size; off += transfer {
		piece := b[:min(size-off, transfer)]
		if _, err := in.ReadAt(piece, off); err != nil {
			return err
		}
		if _, err := f.WriteAt(piece, op.Off+off); err != nil {
			return err
		}
	}
	return f.Sync()
}

// pool makes everything that was written to the pool zero again, and makes the pool the first time.
func pool(op job.Op) error {
	path := filepath.Join(poolDir, "pool")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := errors.Join(f.Truncate(0), f.Truncate(op.N)); err != nil {
		return err
	}
	loop, err := os.OpenFile(op.Dev, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer loop.Close()
	if _, err := unix.IoctlLoopGetStatus64(int(loop.Fd())); err == nil {
		return loop.Sync()
	}
	return unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_SET_FD, int(f.Fd()))
}
