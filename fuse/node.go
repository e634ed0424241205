package fuse

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
)

// A folder is the root of a mount.
type folder struct {
	fs.Inode
	s *Server
}

// processInode is the inode number of processFile.
const processInode = 1 << 62

// A file is an export as it was when its name was looked up.
type file struct {
	fs.Inode
	s *Server
	x *export
}

var (
	_ fs.NodeLookuper  = (*folder)(nil)
	_ fs.NodeReaddirer = (*folder)(nil)
	_ fs.NodeGetattrer = (*folder)(nil)
	_ fs.NodeOpener    = (*file)(nil)
	_ fs.NodeReader    = (*file)(nil)
	_ fs.NodeWriter    = (*file)(nil)
	_ fs.NodeFsyncer   = (*file)(nil)
	_ fs.NodeGetattrer = (*file)(nil)
	_ fs.NodeSetattrer = (*file)(nil)
	_ fs.NodeAllocater = (*file)(nil)
	_ fs.NodeLseeker   = (*file)(nil)
)

// owner sets who owns a node.
func (o *Options) owner(a *gofuse.Attr) {
	a.Owner = gofuse.Owner{Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid())}
	if o.Owner != nil {
		a.Owner = gofuse.Owner{Uid: uint32(o.Owner.UID), Gid: uint32(o.Owner.GID)}
	}
}

func (d *folder) Getattr(_ context.Context, _ fs.FileHandle, out *gofuse.AttrOut) syscall.Errno {
	out.Mode, out.Ino = syscall.S_IFDIR|0o700, 1
	if d.s.opts.AllowOther {
		out.Mode = syscall.S_IFDIR | 0o755
	}
	d.s.opts.owner(&out.Attr)
	return 0
}

func (d *folder) Lookup(ctx context.Context, name string, out *gofuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if name == processFile {
		f := &fs.MemRegularFile{Data: fmt.Appendln(nil, os.Getpid()), Attr: gofuse.Attr{Mode: syscall.S_IFREG | 0o444}}
		out.Mode, out.Size, out.Ino = f.Attr.Mode, uint64(len(f.Data)), processInode
		return d.NewInode(ctx, f, fs.StableAttr{Mode: syscall.S_IFREG, Ino: processInode}), 0
	}
	d.s.mu.Lock()
	x := d.s.exports[name]
	d.s.mu.Unlock()
	if x == nil {
		return nil, syscall.ENOENT
	}
	x.inode.Operations().(*file).attr(&out.Attr)
	return x.inode, 0
}

func (d *folder) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	var list []gofuse.DirEntry
	for name, x := range d.s.exports {
		list = append(list, gofuse.DirEntry{Name: name, Mode: syscall.S_IFREG, Ino: x.ino})
	}
	slices.SortFunc(list, func(a, b gofuse.DirEntry) int { return int(a.Ino) - int(b.Ino) })
	return fs.NewListDirStream(list), 0
}

func (f *file) attr(a *gofuse.Attr) {
	mode := uint32(f.s.opts.Mode.Perm())
	if f.x.readOnly {
		mode &^= 0o222
	}
	size := uint64(f.x.dev.Size())
	a.Mode, a.Ino, a.Nlink, a.Size, a.Blocks, a.Blksize = syscall.S_IFREG|mode, f.x.ino, 1, size, size/512, maxIO
	f.s.opts.owner(a)
}

func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *gofuse.AttrOut) syscall.Errno {
	f.attr(&out.Attr)
	return 0
}

// Setattr takes the size that the file has, and nothing else: times are not kept.
func (f *file) Setattr(_ context.Context, _ fs.FileHandle, in *gofuse.SetAttrIn, out *gofuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok && size != uint64(f.x.dev.Size()) {
		return syscall.EPERM
	}
	if _, ok := in.GetMode(); ok {
		return syscall.EPERM
	}
	if _, ok := in.GetUID(); ok {
		return syscall.EPERM
	}
	if _, ok := in.GetGID(); ok {
		return syscall.EPERM
	}
	f.attr(&out.Attr)
	return 0
}

func (f *file) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if f.x.readOnly && flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return nil, 0, syscall.EROFS
	}
	if f.s.opts.Cache {
		return nil, gofuse.FOPEN_KEEP_CACHE, 0
	}
	return nil, gofuse.FOPEN_DIRECT_IO, 0
}

// within returns how much of n bytes at off is inside of the device.
func (f *file) within(off int64, n int) int {
	return int(max(0, min(int64(n), f.x.dev.Size()-off)))
}

func (f *file) Read(ctx context.Context, _ fs.FileHandle, dest []byte, off int64) (gofuse.ReadResult, syscall.Errno) {
	p := dest[:f.within(off, len(dest))]
	errno := f.x.do(ctx, f.s, "read", func() error {
		_, err := f.x.dev.ReadAt(p, off)
		return err
	})
	if errno != 0 {
		return nil, errno // with a result the error would be lost
	}
	return gofuse.ReadResultData(p), 0
}

func (f *file) Write(ctx context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	if f.x.readOnly {
		return 0, syscall.EROFS
	}
	p := data[:f.within(off, len(data))]
	if len(p) == 0 && len(data) > 0 {
		return 0, syscall.ENOSPC // behind the end, as on a block device
	}
	errno := f.x.do(ctx, f.s, "write", func() error {
		_, err := f.x.dev.WriteAt(p, off)
		return err
	})
	if errno != 0 {
		return 0, errno
	}
	return uint32(len(p)), 0
}

func (f *file) Fsync(ctx context.Context, _ fs.FileHandle, _ uint32) syscall.Errno {
	if f.x.readOnly {
		return 0
	}
	return f.x.do(ctx, f.s, "flush", f.x.dev.Flush)
}

// Allocate punches holes, zeroes, and sets space aside.
func (f *file) Allocate(ctx context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	end := uint64(f.x.dev.Size())
	switch {
	case f.x.readOnly:
		return syscall.EROFS
	case off > end || size > end-off:
		if mode&unix.FALLOC_FL_KEEP_SIZE == 0 || off > end {
			return syscall.EPERM // it can't grow
		}
		size = end - off
	}
	var request func() error
	switch mode &^ unix.FALLOC_FL_KEEP_SIZE {
	case 0:
		request = func() error {
			_, err := block.Allocate(f.x.dev, int64(off), int64(size))
			return err
		}
	case unix.FALLOC_FL_PUNCH_HOLE:
		request = func() error { return block.Zero(f.x.dev, int64(off), int64(size), 0) }
	case unix.FALLOC_FL_ZERO_RANGE:
		request = func() error { return block.Zero(f.x.dev, int64(off), int64(size), block.KeepAllocated) }
	default:
		return syscall.EOPNOTSUPP
	}
	return f.x.do(ctx, f.s, "fallocate", request)
}

// Lseek finds data and holes.
func (f *file) Lseek(ctx context.Context, _ fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	size := f.x.dev.Size()
	if whence != unix.SEEK_DATA && whence != unix.SEEK_HOLE {
		return 0, syscall.EINVAL
	}
	if off >= uint64(size) {
		return 0, syscall.ENXIO
	}
	at, found := int64(off), false
	errno := f.x.do(ctx, f.s, "extents", func() error {
		for at < size && ctx.Err() == nil {
			extents, err := block.Extents(f.x.dev, at, size-at)
			if err != nil {
				return err
			}
			for _, e := range extents {
				if hole := e.Flags&block.ReadsZero != 0; hole == (whence == unix.SEEK_HOLE) {
					found = true
					return nil
				}
				at += e.Length
			}
		}
		return nil
	})
	switch {
	case errno != 0:
		return 0, errno
	case !found && ctx.Err() != nil:
		return 0, syscall.EINTR
	case !found && whence == unix.SEEK_DATA:
		return 0, syscall.ENXIO
	}
	return uint64(at), 0 // the end is a hole
}

// fusermount ends a mount without root, or takes it out of the tree of files.
func fusermount(dir string, lazy bool) error {
	args := []string{"-u", dir}
	if lazy {
		args = []string{"-u", "-z", dir}
	}
	c := exec.Command("fusermount3", args...)
	c.Env = append(os.Environ(), "LC_ALL=C")
	out, err := c.CombinedOutput()
	switch {
	case err != nil && bytes.Contains(out, []byte("busy")):
		return syscall.EBUSY
	case err != nil:
		return fmt.Errorf("unmount %s: %w: %s", dir, err, bytes.TrimSpace(out))
	}
	return nil
}
