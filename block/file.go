package block

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// File is a regular file or a block special file. It implements all the optional abilities of this
// package. Its methods may be called concurrently.
//
// Size is the exact size in bytes. A regular file may end within a sector; the layers above decide what that means (a
// COW device leaves the rest unused, an origin would lose bytes).
type File struct {
	path     string
	readOnly atomic.Bool
	special  bool // a block special file
	block    int  // logical block size in bytes
	identity string
	lock     LockMode
	locked   bool
	backing  int // descriptor that locks the file behind a loop device; -1: none
	lockFD   int // descriptor that has f's locks when fd has not; -1: none. See AllowWrites

	// life is held for reading by each call that uses fd, and for writing by Close: a descriptor's
	// number may be another file's as soon as it is closed.
	life   sync.RWMutex
	fd     int // -1 when closed
	size   atomic.Int64
	grow   sync.Mutex                // makes Grow's check and change of the size one step
	syncs  sync.RWMutex              // see synced
	failed atomic.Pointer[error]     // the first failure to make something durable
	lacks  [numAbilities]atomic.Bool // what the file system refused before

	data    atomic.Pointer[dataRun] // see knownData
	punches atomic.Uint64           // calls of fallocate that may have made holes
}

// ability is something that not all file systems, block devices and kernels can do. The first refusal is remembered, so
// that later calls do not try again.
type ability int

const (
	dsyncWrite ability = iota // pwritev2 with RWF_DSYNC
	punchHole                 // fallocate with FALLOC_FL_PUNCH_HOLE
	zeroRange                 // fallocate with FALLOC_FL_ZERO_RANGE
	allocate                  // plain fallocate
	discardIoctl
	cachedReads // reads with RWF_NOWAIT by asynchronous I/O
	numAbilities
)

// Path returns the path the file was opened by.
func (f *File) Path() string { return f.path }

// ReadOnly reports whether the file was opened for reading.
func (f *File) ReadOnly() bool { return f.readOnly.Load() }

// Size returns the size in bytes.
func (f *File) Size() int64 { return f.size.Load() }

// BlockSize returns the logical block size of a block special file, 512 for a regular file.
func (f *File) BlockSize() int { return f.block }

// Identity is equal for two openings of one disk: of one inode whatever its names, or of one block
// device whatever its special files.
func (f *File) Identity() string { return f.identity }

// Locked reports whether the locks of the [LockMode] are held: not with LockNone, nor on a file system
// without locks.
func (f *File) Locked() bool { return f.locked }

// ReadAt reads len(p) bytes at off; see [Device]. A file that was truncated below its Size gives
// io.ErrUnexpectedEOF.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if err := f.enter("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	defer f.life.RUnlock()
	for done := 0; done < len(p); {
		n, err := unix.Pread(f.fd, p[done:], off+int64(done))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return done, f.errorAt("read", off+int64(done), err)
		case n == 0:
			return done, f.errorAt("read", off+int64(done), io.ErrUnexpectedEOF)
		default:
			done += n
		}
	}
	return len(p), nil
}

// WriteAt writes p at off; see [Device].
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if err := f.enterChange("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	defer f.life.RUnlock()
	return f.write(p, off)
}

// write is WriteAt without the checks.
func (f *File) write(p []byte, off int64) (int, error) {
	return f.writeBy(p, off, func(p []byte, off int64) (int, error) { return unix.Pwrite(f.fd, p, off) })
}

// writeBy writes p at off by as many calls of pwrite as it takes.
func (f *File) writeBy(p []byte, off int64, pwrite func([]byte, int64) (int, error)) (int, error) {
	for done := 0; done < len(p); {
		n, err := pwrite(p[done:], off+int64(done))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return done, f.errorAt("write", off+int64(done), err)
		case n == 0:
			return done, f.errorAt("write", off+int64(done), io.ErrShortWrite)
		default:
			done += n
		}
	}
	return len(p), nil
}

// Flush makes durable every write that returned before the call (fdatasync). After a failure each later Flush and
// WriteDurableAt returns the same error: the kernel reports lost writes only once, so a second attempt that succeeds is
// no proof that they are durable.
func (f *File) Flush() error {
	if err := f.enter("flush", 0, 0); err != nil {
		return err
	}
	defer f.life.RUnlock()
	return f.synced(f.datasync)
}

func (f *File) datasync() error {
	if err := retry(func() error { return unix.Fdatasync(f.fd) }); err != nil {
		return f.error("flush", err)
	}
	return nil
}

// BeginFlush makes the kernel begin to write a range (sync_file_range). A write error is returned by a later Flush.
func (f *File) BeginFlush(off, n int64) {
	if f.enter("flush", off, n) != nil {
		return
	}
	defer f.life.RUnlock()
	unix.SyncFileRange(f.fd, off, n, unix.SYNC_FILE_RANGE_WRITE)
}

// BeginRead makes the kernel begin to read a range into its cache (posix_fadvise).
func (f *File) BeginRead(off, n int64) {
	if f.enter("read", off, n) != nil {
		return
	}
	defer f.life.RUnlock()
	if n > 0 { // 0 would be all of the file
		unix.Fadvise(f.fd, off, n, unix.FADV_WILLNEED)
	}
}

// WriteDurableAt writes p at off and returns when it is durable, by one system call where kernel and
// file system have it. A failure counts as a failed Flush, except a lack of space (see [IsNoSpace]) for p
// itself: then nothing that was written before is lost, and later calls succeed when there is space.
func (f *File) WriteDurableAt(p []byte, off int64) error {
	if err := f.enterChange("write", off, int64(len(p))); err != nil {
		return err
	}
	defer f.life.RUnlock()
	return f.writeDurable(p, off, func(p []byte, off int64) (int, error) {
		return unix.Pwritev2(f.fd, [][]byte{p}, off, unix.RWF_DSYNC)
	})
}

// writeDurable is WriteDurableAt without the checks. dsync writes and makes durable by one system call.
func (f *File) writeDurable(p []byte, off int64, dsync func([]byte, int64) (int, error)) error {
	var noSpace error // of the write itself, which fails no Flush
	failed := f.synced(func() error {
		if !f.lacks[dsyncWrite].Load() {
			n, err := f.writeBy(p, off, dsync)
			if IsNoSpace(err) && !f.canWrite(p[n:], off+int64(n)) {
				noSpace = err
				return nil
			}
			if !unsupported(err) {
				return err
			}
			f.lacks[dsyncWrite].Store(true)
		}
		if _, err := f.write(p, off); IsNoSpace(err) {
			noSpace = err
			return nil
		} else if err != nil {
			return err
		}
		return f.datasync()
	})
	if failed != nil {
		return failed
	}
	return noSpace
}

// canWrite finds out which half of a durable write of p lacked space. It returns true when a plain write accepts any
// byte of p, or fails for another reason: then the flush lacked space, and earlier writes may be lost too.
func (f *File) canWrite(p []byte, off int64) bool {
	for {
		n, err := unix.Pwrite(f.fd, p, off)
		if err != unix.EINTR {
			return n > 0 || !IsNoSpace(err)
		}
	}
}

// synced runs a call that makes something durable, unless one failed before, and records its failure.
//
// The race considered: the kernel reports a lost write once per open file. When two such calls run at the same time,
// one of them may get the report of a write that the other is responsible for, and the other succeeds. So a call that
// succeeded waits until all concurrent calls have recorded their results, and then checks for a failure.
func (f *File) synced(call func() error) error {
	if err := f.failed.Load(); err != nil {
		return *err
	}
	f.syncs.RLock()
	if err := call(); err != nil {
		f.failed.CompareAndSwap(nil, &err)
	}
	f.syncs.RUnlock()

	f.syncs.Lock()
	defer f.syncs.Unlock()
	if err := f.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// Refresh looks the size up again; see [Resizer].
func (f *File) Refresh() (int64, error) {
	if err := f.enter("refresh", 0, 0); err != nil {
		return f.Size(), err
	}
	defer f.life.RUnlock()
	f.grow.Lock()
	defer f.grow.Unlock()
	return f.refresh()
}

// refresh is Refresh without the checks, under f.grow.
func (f *File) refresh() (int64, error) {
	size, err := f.lookUpSize()
	if err != nil {
		return f.Size(), err
	}
	f.size.Store(max(size, f.Size()))
	return f.Size(), nil
}

// lookUpSize asks the kernel for the size in bytes.
func (f *File) lookUpSize() (int64, error) {
	if f.special {
		// Moves the descriptor's offset, which nothing uses.
		size, err := unix.Seek(f.fd, 0, io.SeekEnd)
		if err != nil {
			return 0, f.error("size", err)
		}
		return size, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return 0, f.error("size", err)
	}
	return st.Size, nil
}

// Grow makes a regular file at least size bytes long by a hole at its end. The new size is durable
// after the next Flush. A block special file that is too short is an error.
func (f *File) Grow(size int64) error {
	if err := f.enterChange("grow", 0, 0); err != nil {
		return err
	}
	defer f.life.RUnlock()
	f.grow.Lock()
	defer f.grow.Unlock()
	if size <= f.Size() {
		return nil
	}
	// Another program may have made the file longer since: never cut that off.
	now, err := f.lookUpSize()
	if err != nil {
		return err
	}
	if now < size {
		if f.special {
			return f.error("grow", fmt.Errorf("a block device of %d bytes can't be made %d bytes long from here: %w", now, size, ErrFixedSize))
		}
		if err := retry(func() error { return unix.Ftruncate(f.fd, size) }); err != nil {
			return f.error("grow", err)
		}
	}
	_, err = f.refresh()
	return err
}

// CanGrow reports whether f is a regular file that is open for writing.
func (f *File) CanGrow() bool { return !f.special && !f.readOnly.Load() }

// Close waits for calls under way, releases the locks and closes the file. It makes nothing durable:
// that is Flush. Later calls return an error wrapping fs.ErrClosed.
func (f *File) Close() error {
	f.life.Lock()
	defer f.life.Unlock()
	if f.fd < 0 {
		return f.error("close", fs.ErrClosed)
	}
	err := unix.Close(f.fd)
	f.fd = -1
	for _, fd := range []*int{&f.lockFD, &f.backing} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
	if err != nil {
		return f.error("close", err)
	}
	return nil
}

// enter begins a call on a range. On success the caller holds f.life for reading.
func (f *File) enter(op string, off, n int64) error {
	f.life.RLock()
	err := CheckRange(op, off, n, f.Size())
	if f.fd < 0 {
		err = f.error(op, fs.ErrClosed)
	}
	if err != nil {
		f.life.RUnlock()
	}
	return err
}

// enterChange is enter for calls that change the file.
func (f *File) enterChange(op string, off, n int64) error {
	if err := f.enter(op, off, n); err != nil {
		return err
	}
	if f.readOnly.Load() {
		f.life.RUnlock()
		return f.error(op, ErrReadOnly)
	}
	return nil
}

// error names the file in an error.
func (f *File) error(op string, err error) error {
	return &fs.PathError{Op: op, Path: f.path, Err: err}
}

// errorAt names the file and the place in an error.
func (f *File) errorAt(op string, off int64, err error) error {
	return f.error(op, fmt.Errorf("at byte %d: %w", off, err))
}

// unsupported reports an error that says that a file system, device or kernel lacks an ability.
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS)
}

// retry calls again what a signal interrupted.
func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}
