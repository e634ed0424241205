package block

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Options say how [Open] opens a file. The zero value opens for reading and writing and excludes
// every other user that writes.
type Options struct {
	ReadOnly bool
	Lock     LockMode
	// Used lets a file be opened for writing that the kernel uses itself; see CheckUnused. A block special file that is
	// mounted or otherwise claimed is still refused.
	Used bool
}

// Open opens a regular file or a block special file as a device. Anything else is an error that names the kind of file.
// A file in use in a way that excludes the use asked for is [ErrInUse]; a block special file opened for writing that
// the kernel uses itself (mounted, part of a volume group) is too.
func Open(path string, o Options) (*File, error) {
	lock, err := o.lockMode()
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	// The kind of file decides how to open it: opening a FIFO blocks, opening a tape rewinds it, and a block special
	// file wants O_EXCL.
	var before unix.Stat_t
	if err := retry(func() error { return unix.Stat(path, &before) }); err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	if err := checkKind(before.Mode); err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	special := before.Mode&unix.S_IFMT == unix.S_IFBLK
	mode := unix.O_RDWR
	if o.ReadOnly {
		mode = unix.O_RDONLY
	} else if special {
		mode |= unix.O_EXCL
	}
	fd, err := openDescriptor(path, mode, 0)
	if err == unix.EBUSY && special {
		return nil, fmt.Errorf("open %s: %w (mounted, or claimed by another device or program): %w", path, ErrInUse, err)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := &File{path: path, special: special, fd: fd, lockFD: -1, backing: -1}
	f.readOnly.Store(o.ReadOnly)
	if err := f.prepare(before, lock); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if !o.ReadOnly && !o.Used {
		if err := f.CheckUnused(); err != nil {
			f.Close()
			return nil, err
		}
	}
	return f, nil
}

// CheckNewFile returns an error when a new regular file at path would be in the directory of device nodes: a mistyped
// /dev/NAME would become a file in memory. Other file systems mounted below /dev, such as /dev/shm, are accepted.
func CheckNewFile(path string) error {
	const devices = "/dev"
	folder, err := filepath.Abs(filepath.Dir(path))
	if err == nil {
		folder, err = filepath.EvalSymlinks(folder)
	}
	if err != nil {
		return nil // creating the file returns this error
	}
	if folder != devices && !strings.HasPrefix(folder, devices+"/") {
		return nil
	}
	var here, there unix.Stat_t
	if unix.Stat(folder, &here) != nil || unix.Stat(devices, &there) != nil || here.Dev != there.Dev {
		return nil
	}
	return &fs.PathError{Op: "create", Path: path, Err: errors.New("no such device, and no regular file is made in " + devices)}
}

// Create makes a new sparse regular file of size bytes, readable and writable for its owner only, and opens it for
// writing. A path that exists already, of whatever kind, is an error wrapping fs.ErrExist. When Create returns, the
// file and its name are durable.
func Create(path string, size int64) (*File, error) {
	f, err := CreateUnsynced(path, size)
	if err != nil {
		return nil, err
	}
	if err = retry(func() error { return unix.Fsync(f.fd) }); err != nil {
		err = f.error("create", err)
	} else {
		err = SyncDirectory(filepath.Dir(path))
	}
	if err != nil {
		os.Remove(path)
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// CreateUnsynced is Create without the durability: a crash may leave the file at any smaller size, or not at all. A Flush
// makes the file durable, and SyncDirectory its name.
func CreateUnsynced(path string, size int64) (*File, error) {
	if size < 0 {
		return nil, fmt.Errorf("create %s: size of %d bytes", path, size)
	}
	if err := CheckNewFile(path); err != nil {
		return nil, err
	}
	fd, err := openDescriptor(path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return nil, &fs.PathError{Op: "create", Path: path, Err: err}
	}
	f := &File{path: path, fd: fd, lockFD: -1, backing: -1}
	err = f.fill(size)
	if err == nil {
		return f, nil
	}
	unix.Close(fd)
	// Removing the name is only cleanup; a program that has opened the new file meanwhile keeps it.
	if !errors.Is(err, ErrInUse) {
		os.Remove(path)
	}
	return nil, err
}

// fill makes the new, empty file size bytes long, for CreateUnsynced.
func (f *File) fill(size int64) error {
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return f.error("create", err)
	}
	if err := f.prepare(st, LockWrite); err != nil {
		return err
	}
	return f.Grow(size)
}

// SyncDirectory makes the names in a directory durable, where its file system can.
func SyncDirectory(path string) error {
	fd, err := openDescriptor(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	err = retry(func() error { return unix.Fsync(fd) })
	if err != nil && err != unix.EINVAL { // EINVAL: a file system that has no such thing
		return &fs.PathError{Op: "fsync", Path: path, Err: err}
	}
	return nil
}

// prepare fills in what is known of the open descriptor, and locks it.
func (f *File) prepare(before unix.Stat_t, lock LockMode) error {
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return f.error("open", err)
	}
	if st.Mode&unix.S_IFMT != before.Mode&unix.S_IFMT || st.Dev != before.Dev || st.Ino != before.Ino {
		return f.error("open", errors.New("replaced by another file while it was being opened"))
	}
	f.block = SectorSize
	f.identity = identityOfStat(&st)
	if f.special {
		n, err := unix.IoctlGetUint32(f.fd, unix.BLKSSZGET)
		if err != nil {
			return f.error("logical block size", err)
		}
		f.block = int(n)
	}
	size, err := f.lookUpSize()
	if err != nil {
		return err
	}
	f.size.Store(size)
	f.lock = lock
	if f.locked, err = lockFile(f.fd, f.path, lock); err == nil && lock != LockNone && f.special {
		f.backing, err = f.lockBacking(lock)
	}
	return err
}

// AllowWrites makes a file that was opened with ReadOnly and LockRead one that is open for writing, with LockWrite,
// without a window in which another program could write to it. The kernel checks permissions now. After an error
// (ErrInUse while others read it and exclude writers; EACCES, EROFS) the file is open for reading as before. Calls
// under way are waited for. On a file that is open for writing it does nothing.
func (f *File) AllowWrites() error {
	f.life.Lock()
	defer f.life.Unlock()
	switch {
	case f.fd < 0:
		return f.error("open for writing", fs.ErrClosed)
	case !f.readOnly.Load():
		return nil
	case f.lock != LockRead:
		return f.error("open for writing", errors.New("it has no reader's lock that could become a writer's"))
	}
	if err := f.upgrade(); err != nil {
		return err
	}
	fd, err := f.reopen()
	if err != nil {
		f.downgrade(f.fd)
		return err
	}
	// The old descriptor has the locks; closing it would release them.
	f.lockFD, f.fd = f.fd, fd
	f.lock = LockWrite
	f.readOnly.Store(false)
	return nil
}

// upgrade makes the reader's locks a writer's.
func (f *File) upgrade() error {
	if f.locked {
		if err := upgradeLocks(f.fd, f.path); err != nil {
			return err
		}
	}
	if f.backing >= 0 {
		if err := upgradeLocks(f.backing, f.path); err != nil {
			f.downgrade(f.fd)
			return err
		}
	}
	return nil
}

// downgrade reverts upgrade; fd has the file's locks.
func (f *File) downgrade(fd int) {
	if f.locked {
		releaseLocks(fd, writerLocks)
	}
	if f.backing >= 0 {
		releaseLocks(f.backing, writerLocks)
	}
}

// DenyWrites reverts AllowWrites, for a file that was not written to since. On a file that is open for reading it does
// nothing.
func (f *File) DenyWrites() error {
	f.life.Lock()
	defer f.life.Unlock()
	switch {
	case f.fd < 0:
		return f.error("deny writes", fs.ErrClosed)
	case f.readOnly.Load():
		return nil
	case f.lockFD < 0:
		return f.error("deny writes", errors.New("it was opened for writing"))
	}
	err := unix.Close(f.fd)
	f.fd, f.lockFD = f.lockFD, -1
	f.lock = LockRead
	f.readOnly.Store(true)
	f.downgrade(f.fd)
	if err != nil {
		return f.error("deny writes", err)
	}
	return nil
}

// reopen opens the file of f.fd again, for writing. Its path may be that of another file by now.
func (f *File) reopen() (int, error) {
	mode := unix.O_RDWR
	if f.special {
		mode |= unix.O_EXCL
	}
	var old, now unix.Stat_t
	if err := unix.Fstat(f.fd, &old); err != nil {
		return -1, f.error("open for writing", err)
	}
	fd, err := openDescriptor(fmt.Sprintf("/proc/self/fd/%d", f.fd), mode, 0)
	if err == unix.ENOENT { // no /proc
		fd, err = openDescriptor(f.path, mode, 0)
	}
	if err == unix.EBUSY && f.special {
		return -1, fmt.Errorf("open %s for writing: %w (mounted, or claimed by another device or program): %w", f.path, ErrInUse, err)
	}
	if err != nil {
		return -1, f.error("open for writing", err)
	}
	err = unix.Fstat(fd, &now)
	if err == nil && (now.Dev != old.Dev || now.Ino != old.Ino) {
		err = errors.New("the path leads to another file by now")
	}
	if err != nil {
		unix.Close(fd)
		return -1, f.error("open for writing", err)
	}
	return fd, nil
}

// checkKind returns an error for a file of a kind that can't be a device.
func checkKind(mode uint32) error {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFBLK:
		return nil
	case unix.S_IFDIR:
		return unix.EISDIR
	case unix.S_IFCHR:
		return errors.New("a character device, not a disk image or block device")
	case unix.S_IFIFO:
		return errors.New("a pipe, not a disk image or block device")
	case unix.S_IFSOCK:
		return errors.New("a socket, not a disk image or block device")
	}
	return errors.New("not a disk image or block device")
}

// openDescriptor is open(2).
func openDescriptor(path string, mode int, permission uint32) (int, error) {
	fd := -1
	err := retry(func() (err error) {
		fd, err = unix.Open(path, mode|unix.O_CLOEXEC, permission)
		return err
	})
	return fd, err
}
