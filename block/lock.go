package block

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// LockMode says what a [File] shares with other users of the same file: dmsnap, qemu's programs, and
// other Files of this process.
//
// The locks are advisory open-file-description locks on single bytes, the ones that qemu's programs take and look for
// (docs/decisions/0001-locks.md). They end with the descriptor, also when the process is killed.
type LockMode int

const (
	// LockDefault is LockWrite for a file opened for writing, LockRead for one opened read-only.
	LockDefault LockMode = iota
	// LockWrite excludes other writers, and readers that exclude writers.
	LockWrite
	// LockRead excludes writers and admits other readers.
	LockRead
	// LockShared reads while others write, except those that admit no reader. What is read may change from one call to
	// the next.
	LockShared
	// LockNone takes no locks and looks for none.
	LockNone
)

// The bytes of a file that represent uses of it. A program that uses a file in way w read-locks byte usesByte+w; one
// that excludes use w by others read-locks byte excludesByte+w. Both test for the other kind of lock after taking their
// own, so that of two programs that start at the same time at least one finds the other.
const (
	usesByte     = 100
	excludesByte = 200

	useRead   = 0 // expects what it reads to be consistent
	useWrite  = 1
	useResize = 3
)

// lockPlan has the uses of a LockMode, and the uses by others that it excludes.
type lockPlan struct{ uses, excludes []int64 }

var lockPlans = map[LockMode]lockPlan{
	LockWrite:  {[]int64{useRead, useWrite, useResize}, []int64{useWrite, useResize}},
	LockRead:   {[]int64{useRead}, []int64{useWrite, useResize}},
	LockShared: {[]int64{useRead}, nil},
}

// lockMode resolves LockDefault and refuses a writer that admits other writers.
func (o Options) lockMode() (LockMode, error) {
	switch {
	case o.Lock == LockDefault && o.ReadOnly:
		return LockRead, nil
	case o.Lock == LockDefault:
		return LockWrite, nil
	case !o.ReadOnly && (o.Lock == LockRead || o.Lock == LockShared):
		return 0, errors.New("a reader's lock on a file opened for writing")
	}
	return o.Lock, nil
}

// lockFile takes the locks of a mode on an open file. held is false, without an error, for LockNone
// and where the file system has no locks. The descriptor must be closed after an error.
func lockFile(fd int, path string, mode LockMode) (held bool, err error) {
	if mode == LockNone {
		return false, nil
	}
	plan := lockPlans[mode]
	var take, look []int64
	for _, w := range plan.uses {
		take, look = append(take, usesByte+w), append(look, excludesByte+w)
	}
	for _, w := range plan.excludes {
		take, look = append(take, excludesByte+w), append(look, usesByte+w)
	}
	return takeLocks(fd, path, take, look)
}

// writerLocks are the bytes that a writer locks and a reader that excludes writers does not.
var writerLocks = []int64{usesByte + useWrite, usesByte + useResize}

// upgradeLocks makes the locks of LockRead those of LockWrite; after an error they are as before.
func upgradeLocks(fd int, path string) error {
	_, err := takeLocks(fd, path, writerLocks, []int64{excludesByte + useWrite, excludesByte + useResize})
	if err != nil {
		releaseLocks(fd, writerLocks)
	}
	return err
}

// releaseLocks releases the locks on some bytes.
func releaseLocks(fd int, bytes []int64) {
	for _, b := range bytes {
		l := byteLock(unix.F_UNLCK, b)
		retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l) })
	}
}

// takeLocks takes locks on some bytes, and tests for locks of others on other bytes. held is false, without an error,
// where the file system has no locks.
func takeLocks(fd int, path string, take, look []int64) (held bool, err error) {
	for _, b := range take {
		l := byteLock(unix.F_RDLCK, b)
		err := retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l) })
		switch {
		case noLocks(err):
			return false, nil
		case err == unix.EAGAIN || err == unix.EACCES:
			// Another program write-locked the byte, or the whole file.
			return false, inUse(fd, path, "")
		case err != nil:
			return false, &fs.PathError{Op: "lock", Path: path, Err: err}
		}
	}
	for _, b := range look {
		// A write lock conflicts with any other lock. It is only tested for, never taken.
		l := byteLock(unix.F_WRLCK, b)
		if err := retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l) }); err != nil {
			return false, &fs.PathError{Op: "lock", Path: path, Err: err}
		}
		if l.Type != unix.F_UNLCK {
			return false, inUse(fd, path, conflicts[b])
		}
	}
	return true, nil
}

// conflicts is what another program's lock on a byte means for this one.
var conflicts = map[int64]string{
	usesByte + useWrite:      "it is being written",
	usesByte + useResize:     "it may be resized",
	excludesByte + useRead:   "it must not be read now",
	excludesByte + useWrite:  "it must not be written now",
	excludesByte + useResize: "it must not be resized now",
}

func byteLock(kind int16, at int64) unix.Flock_t {
	return unix.Flock_t{Type: kind, Whence: unix.SEEK_SET, Start: at, Len: 1}
}

// noLocks reports an error that says that a file system or kernel has no such locks. EINVAL is the answer of a
// kernel without open-file-description locks.
func noLocks(err error) bool {
	return unsupported(err) || err == unix.ENOLCK || err == unix.EINVAL
}

// inUse is the error for a lock conflict. It names the other process where that is known.
func inUse(fd int, path, why string) error {
	s := ""
	if who := holders(fd); len(who) > 0 {
		s = " by " + strings.Join(who, ", ")
	}
	if why != "" {
		s += " (" + why + ")"
	}
	return fmt.Errorf("%s: %w%s", path, ErrInUse, s)
}

// holders names the processes that hold locks on the file: "qemu-nbd (process 4242)". An open-file-description lock has
// no owner that the kernel could report, but the descriptors of each process can be searched, as far as permissions
// allow. fd itself is left out.
func holders(fd int) []string {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return nil
	}
	// As /proc/PID/fdinfo/FD shows a lock: "lock: 1: OFDLCK ADVISORY READ -1 fe:00:9977949 100 101".
	file := fmt.Sprintf(" %02x:%02x:%d ", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino)
	self := strconv.Itoa(os.Getpid())
	var who []string
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range processes {
		pid := filepath.Base(p)
		if !holdsLock(p, file, pid == self, fd) {
			continue
		}
		name, _ := os.ReadFile(p + "/comm")
		s := fmt.Sprintf("%s (process %s)", strings.TrimSpace(string(name)), pid)
		if pid == self {
			s = "this process"
		}
		who = append(who, s)
	}
	return who
}

// holdsLock reports whether a process has a descriptor, other than fd of this process, with a lock on
// the file.
func holdsLock(process, file string, self bool, fd int) bool {
	infos, _ := filepath.Glob(process + "/fdinfo/*")
	for _, info := range infos {
		if self && filepath.Base(info) == strconv.Itoa(fd) {
			continue
		}
		text, _ := os.ReadFile(info)
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "lock:") && strings.Contains(line, file) {
				return true
			}
		}
	}
	return false
}

// HasWriter reports whether a program holds the lock of one that writes to the file at path
// (docs/decisions/0001-locks.md); false also where that is unknown. It takes no lock: even a short one could make a
// program fail that is starting at that moment.
func HasWriter(path string) bool {
	fd, err := openDescriptor(path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	l := byteLock(unix.F_WRLCK, usesByte+useWrite)
	err = retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l) })
	return err == nil && l.Type != unix.F_UNLCK
}
