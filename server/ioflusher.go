package server

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// BecomeIOFlusher has every thread of the process allocate memory without waiting for the kernel to write dirty pages
// (PR_SET_IO_FLUSHER), which may wait for this process where they belong to a device that it serves. Threads and programs that are started
// later inherit it. It needs CAP_SYS_RESOURCE and Linux 5.6, and fails in a binary with cgo, whose threads can't all be reached.
func BecomeIOFlusher() error {
	if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("become an I/O flusher: %w", errno)
	}
	return nil
}
