// Package fuse shows block devices as files of a mounted folder, with or without root.
//
//	s, err := fuse.Mount("/run/disks", fuse.Options{})
//	err = s.Add("vda", dev, false) // /run/disks/vda
//	...
//	err = s.Close()
//
// A file keeps the size of its device: it is read, written, made durable by fsync, punched and zeroed by
// fallocate, and asked for holes by lseek. Requests go past the page cache, so that what other transports change is seen at once,
// and a write is with the device when it returns. It is durable after an fsync.
//
// # Guarantees
//
//   - An fsync covers every write, to whichever file descriptor of the export, that returned before it. A failed one is EIO.
//   - A write to a file that is open with O_SYNC or O_DSYNC, or with RWF_DSYNC, is durable when it returns.
//   - What is waiting for space (block.RetryLater) waits until there is some, or the process that asked gets a signal.
//   - When Remove or Close has returned, nothing uses the device any more. Descriptors that are still open get ENODEV.
//   - Unmount, of this or another process, ends a mount in order. So does umount(8).
//   - When the process is killed, what was made durable is there, and nothing hangs: open files answer ENOTCONN. Mount
//     removes a mount that such a process left.
//
// The package uses go-fuse (docs/decisions/0004-fuse.md); no core package imports it.
package fuse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/eventlog"
)

// Options are the options of a Server. The zero value is usable.
type Options struct {
	// AllowOther lets users other than the one who mounts use the files, as their modes say. Without root it needs
	// user_allow_other in /etc/fuse.conf.
	AllowOther bool

	// Owner owns the files; nil: the user that mounts. Mode is that of the files; 0: 0600. Read-only exports lack its w
	// bits.
	Owner *Owner
	Mode  os.FileMode

	// Cache has the kernel cache what is read and written, and writes still go to the device at once. Changed must be called for
	// every change of a device other than by its file. Without it requests go past the page cache, except those of a loop device:
	// that has a cache of its own, which knows nothing of changes either way.
	Cache bool

	// Log receives one line for each failed request. It may be called concurrently.
	Log func(line string)

	// Logger, unless it is nil, receives the same as records with the attribute "export".
	Logger *slog.Logger
}

// An Owner is who owns the files of a mount.
type Owner struct{ UID, GID int }

// A Server is a mounted folder with a file for each export. Its methods may be called concurrently.
type Server struct {
	dir  string
	opts Options
	fs   *gofuse.Server

	root *folder

	ended chan struct{} // closed when nothing is mounted any more

	mu      sync.Mutex
	exports map[string]*export
	inodes  uint64 // the last inode number that was used
}

// maxIO is how many bytes the kernel asks for at a time, at most.
const maxIO = 1 << 20

// Mount mounts a new, empty folder on dir, which must exist and be empty. A mount that a killed process left there is
// removed first.
func Mount(dir string, o Options) (*Server, error) {
	if err := removeStale(dir); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err == nil && len(entries) > 0 {
		err = fmt.Errorf("%s: the folder is not empty", dir)
	}
	if err != nil {
		return nil, err
	}
	if o.Mode == 0 {
		o.Mode = 0o600
	}
	s := &Server{dir: dir, opts: o, ended: make(chan struct{}), exports: map[string]*export{}, inodes: 1}
	none := new(time.Duration) // names and sizes are asked for each time: exports come and go
	silent := log.New(io.Discard, "", 0)
	s.root = &folder{s: s}
	options := &fs.Options{
		EntryTimeout: none, AttrTimeout: none, Logger: silent,
		MountOptions: gofuse.MountOptions{
			FsName: "dmsnap", Name: "dmsnap", AllowOther: o.AllowOther, Options: []string{"default_permissions"},
			MaxWrite: maxIO, DisableXAttrs: true, DirectMount: true, DisableReadDirPlus: true, DisableSplice: true, Logger: silent,
		},
	}
	s.fs, err = gofuse.NewServer(syncing{fs.NewNodeFS(s.root, options)}, dir, &options.MountOptions)
	if err == nil {
		go s.fs.Serve()
		err = s.fs.WaitMount()
	}
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	go func() {
		s.fs.Wait()
		close(s.ended)
	}()
	return s, nil
}

// syncing makes writes durable that are to be: of a file that is opened with O_DSYNC, and those with RWF_DSYNC. The kernel says so in
// the flags of a write, and sends no FSYNC of its own where the page cache is not used.
type syncing struct{ gofuse.RawFileSystem }

func (f syncing) Write(cancel <-chan struct{}, in *gofuse.WriteIn, data []byte) (written uint32, code gofuse.Status) {
	written, code = f.RawFileSystem.Write(cancel, in, data)
	return written, f.sync(cancel, in, code)
}

func (f syncing) Writev(cancel <-chan struct{}, in *gofuse.WriteIn, data [][]byte) (written uint32, code gofuse.Status) {
	written, code = f.RawFileSystem.Writev(cancel, in, data)
	return written, f.sync(cancel, in, code)
}

// sync makes a write durable that has succeeded, if it is to be.
func (f syncing) sync(cancel <-chan struct{}, in *gofuse.WriteIn, code gofuse.Status) gofuse.Status {
	if code.Ok() && in.Flags&syscall.O_DSYNC != 0 {
		return f.Fsync(cancel, &gofuse.FsyncIn{InHeader: in.InHeader, Fh: in.Fh})
	}
	return code
}

// removeStale removes the mount of a process that is gone.
func removeStale(dir string) error {
	_, err := os.Stat(dir)
	if !errors.Is(err, syscall.ENOTCONN) {
		return err
	}
	return detach(dir)
}

// detach takes a mount out of the tree of files; descriptors that are open stay open.
func detach(dir string) error {
	err := unix.Unmount(dir, unix.MNT_DETACH)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	return fusermount(dir, true)
}

// Add shows a device as a file called name from now on. readOnly: changes fail, whatever the device can do.
func (s *Server) Add(name string, dev block.Device, readOnly bool) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > unix.NAME_MAX {
		return fmt.Errorf("fuse: %q can't be the name of a file", name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exports[name] != nil {
		return fmt.Errorf("fuse: export %q exists", name)
	}
	s.inodes++
	gone, stop := context.WithCancel(context.Background())
	x := &export{name: name, dev: dev, readOnly: readOnly, ino: s.inodes, gone: gone, stop: stop}
	x.inode = s.root.NewPersistentInode(gone, &file{s: s, x: x}, fs.StableAttr{Mode: syscall.S_IFREG, Ino: x.ino})
	s.exports[name] = x
	return nil
}

// Cached reports whether the kernel caches the content of the files.
func (s *Server) Cached() bool { return s.opts.Cache }

// Changed drops what the kernel has cached of n bytes at off of a file; n 0: to the end. It waits for the requests to those
// bytes, and so must not be called by one of them.
func (s *Server) Changed(name string, off, n int64) {
	s.mu.Lock()
	x := s.exports[name]
	s.mu.Unlock()
	if x != nil && s.opts.Cache {
		x.inode.NotifyContent(off, n) // an error: the kernel does not know the file
	}
}

// Path returns the path of an export's file, whether it exists or not.
func (s *Server) Path(name string) string { return filepath.Join(s.dir, name) }

// Remove ends the export name. Requests that wait for space fail. When it returns nil nothing uses the device any more;
// when ctx ends before, its cause.
func (s *Server) Remove(ctx context.Context, name string) error {
	s.mu.Lock()
	x := s.exports[name]
	delete(s.exports, name)
	s.mu.Unlock()
	if x == nil {
		return fmt.Errorf("fuse: there is no export %q", name)
	}
	err := x.end(ctx)
	if s.opts.Cache {
		x.inode.NotifyContent(0, 0)
	}
	x.inode.ForgetPersistent()
	return err
}

// Close removes all exports and the mount, also while files are open or the folder is in use. What was written and not
// flushed is flushed. The devices stay open.
func (s *Server) Close() error {
	s.mu.Lock()
	list := slices.Collect(maps.Values(s.exports))
	clear(s.exports)
	s.mu.Unlock()
	var all error
	for _, x := range list {
		all = errors.Join(all, x.end(context.Background()))
		if !x.readOnly {
			if err := x.dev.Flush(); err != nil {
				all = errors.Join(all, fmt.Errorf("fuse: flush %q: %w", x.name, err))
			}
		}
	}
	select {
	case <-s.ended: // unmounted by somebody else; what is mounted there now is not ours
		return all
	default:
	}
	if err := s.fs.Unmount(); err != nil { // it is in use
		return errors.Join(all, detach(s.dir))
	}
	return all
}

// Ended is closed when the folder is no longer mounted, and nothing in it is in use: after Close, or when somebody else has
// unmounted it.
func (s *Server) Ended() <-chan struct{} { return s.ended }

// An export is a device that is shown.
type export struct {
	name     string
	dev      block.Device
	readOnly bool

	ino   uint64
	inode *fs.Inode       // kept until the export ends
	gone  context.Context // ends with the export: what waits fails
	stop  context.CancelFunc

	mu sync.RWMutex // held for reading by requests, and for writing from the end on
}

// end waits for the requests under way; no others begin.
func (x *export) end(ctx context.Context) error {
	x.stop()
	locked := make(chan struct{})
	go func() {
		x.mu.Lock()
		close(locked)
	}()
	select {
	case <-locked:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// do executes a request: again when there may be space, until the export ends or ctx does. It returns what the process
// gets to see.
func (x *export) do(ctx context.Context, s *Server, op string, request func() error) syscall.Errno {
	if !x.mu.TryRLock() {
		return syscall.ENODEV
	}
	defer x.mu.RUnlock()
	for {
		if x.gone.Err() != nil {
			return syscall.ENODEV
		}
		err := request()
		changed := block.CanRetry(err)
		if changed == nil {
			return s.errno(x, op, err)
		}
		if x.await(ctx, changed); ctx.Err() != nil {
			return syscall.EINTR
		}
	}
}

// await waits until a request may be tried again, its process got a signal, or the export ends.
func (x *export) await(ctx context.Context, changed <-chan struct{}) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(x.gone, cancel)()
	block.AwaitRetry(ctx, changed) // its error is that of ctx, which the caller asks
}

// errno is what a process gets for an error. Other than refusals they are logged.
func (s *Server) errno(x *export, op string, err error) syscall.Errno {
	var errno syscall.Errno
	var outside *block.RangeError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, block.ErrReadOnly):
		return syscall.EROFS
	case errors.As(err, &outside):
		return syscall.EINVAL
	case block.IsNoSpace(err):
		errno = syscall.ENOSPC
	default:
		errno = syscall.EIO
	}
	text := fmt.Sprintf("%s: %v", op, err)
	l := eventlog.Log{Line: s.opts.Log, Logger: s.opts.Logger}
	l.Event(slog.LevelWarn, fmt.Sprintf("fuse %q: %s", x.name, text), text, err, slog.String("export", x.name))
	return errno
}
