package blocktest

import (
	"errors"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
)

// RunFailedFlush checks what a device does after a failed Flush or durable write: every later one fails with the same
// error and makes nothing durable, everything else works. open returns a device of zeros of at least 64 KiB, and a
// function that makes one Flush, or one durable write at byte 8192, fail with an error and returns what it returned.
// block.File and Faulty behave alike.
func RunFailedFlush(t *testing.T, open func(t *testing.T) (dev block.Device, fail func(Kind, error) error)) {
	for _, kind := range []Kind{Flush, WriteDurable} {
		for _, cause := range []error{syscall.EIO, syscall.ENOSPC, syscall.EDQUOT} {
			t.Run(kind.String()+" "+cause.Error(), func(t *testing.T) {
				dev, fail := open(t)
				write(t, dev, 0, []byte("before"))
				if err := dev.Flush(); err != nil {
					t.Fatal(err)
				}
				var outside *block.RangeError
				if err := block.WriteDurable(dev, []byte("x"), dev.Size()); !errors.As(err, &outside) {
					t.Fatalf("a durable write past the end: %v", err)
				}
				if err := dev.Flush(); err != nil {
					t.Fatalf("after a request that was refused: %v", err)
				}
				failed := fail(kind, cause)
				if !errors.Is(failed, cause) {
					t.Fatalf("the failure: %v", failed)
				}
				for range 2 {
					if err := dev.Flush(); err != failed {
						t.Errorf("flush: %v, want %v", err, failed)
					}
					if err := block.WriteDurable(dev, []byte("after"), 0); err != failed {
						t.Errorf("durable write: %v, want %v", err, failed)
					}
				}
				want(t, dev, 0, []byte("before")) // the durable write did not begin
				write(t, dev, 0, []byte("later!"))
				want(t, dev, 0, []byte("later!"))
				if err := block.Zero(dev, 4096, 4096, 0); err != nil {
					t.Errorf("zero: %v", err)
				}
				if _, err := block.Extents(dev, 0, 8192); err != nil {
					t.Errorf("extents: %v", err)
				}
				if err := fail(kind, syscall.ENOMEM); err != failed {
					t.Errorf("another failure became %v, want %v", err, failed)
				}
				if err := dev.Flush(); err != failed {
					t.Errorf("the first error was replaced by %v", err)
				}
			})
		}
	}
}
