package fuse

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// processFile is the name of a file that no listing shows, in every mounted folder: its content is the id of the process
// that serves it.
const processFile = ".dmsnap-process"

// ErrInUse is the error of Unmount for a folder that is in use.
var ErrInUse = errors.New("the folder is in use: files in it are open, or mounted")

// Unmount ends a mount of this package, of whatever process: it makes everything that was written durable, unmounts the folder,
// and waits until the process no longer uses its devices, if that process is one that ends with its mount. A folder in use is
// refused with ErrInUse. With lazy it is taken out of the tree of files at once, nothing is waited for, and the mount ends with
// the last use of it. The mount of a process that is gone is removed.
func Unmount(ctx context.Context, dir string, lazy bool) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if _, err := os.Stat(dir); errors.Is(err, syscall.ENOTCONN) {
		return detach(dir)
	}
	mounted, err := isMounted(dir)
	if err != nil {
		return err
	}
	if !mounted {
		return fmt.Errorf("%s: no mount of dmsnap", dir)
	}
	process, err := serving(dir)
	if err != nil {
		return err
	}
	if process >= 0 {
		defer unix.Close(process)
	}
	if err := syncFiles(dir); err != nil {
		return err
	}
	if lazy {
		return detach(dir)
	}
	err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EPERM) {
		err = fusermount(dir, false)
	}
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s: %w", dir, ErrInUse)
	}
	if err != nil || process < 0 {
		return err
	}
	return awaitProcess(ctx, process)
}

// isMounted reports whether a mount of this package is what one sees in dir.
func isMounted(dir string) (bool, error) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false, err
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	defer f.Close()
	found := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// 36 35 98:0 /root /mount/point options... - type source options
		before, after, _ := strings.Cut(lines.Text(), " - ")
		if fields := strings.Fields(before); len(fields) > 4 && unescape(fields[4]) == real {
			found = strings.HasPrefix(after, "fuse.dmsnap ") // the last one is on top
		}
	}
	return found, nil
}

// unescape replaces the octal escapes of a path in mountinfo.
func unescape(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}

// serving returns a descriptor of the process that serves a mounted folder, or -1 where it can't be had.
func serving(dir string) (int, error) {
	b, err := os.ReadFile(filepath.Join(dir, processFile))
	if errors.Is(err, os.ErrPermission) { // root, with a mount of another user
		return -1, nil
	}
	if err != nil {
		return -1, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return -1, fmt.Errorf("%s: %w", dir, err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil { // of another PID namespace, or of a kernel before 5.3
		return -1, nil
	}
	return fd, nil
}

// syncFiles makes durable what was written to the files of a folder.
func syncFiles(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrPermission) {
		return nil // they are flushed at the end of the process
	}
	for _, e := range entries {
		f, failed := os.Open(filepath.Join(dir, e.Name()))
		if errors.Is(failed, os.ErrNotExist) || errors.Is(failed, os.ErrPermission) {
			continue
		}
		if failed == nil {
			failed = f.Sync()
			f.Close()
		}
		err = errors.Join(err, failed)
	}
	return err
}

// awaitProcess waits until a process has ended.
func awaitProcess(ctx context.Context, process int) error {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(process), Events: unix.POLLIN}}, int((50*time.Millisecond)/time.Millisecond))
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("unmounted; the process that served it has not ended yet: %w", context.Cause(ctx))
		}
	}
}
