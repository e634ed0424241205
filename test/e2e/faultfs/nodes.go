package faultfs

import (
	"context"
	"path"
	"sort"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// The nodes of a mount. They hold nothing but pointers into the volume, which outlives the mount.

type rootNode struct {
	fs.Inode
	v *volume
}

type folderNode struct {
	fs.Inode
	v *volume
	d *folder
}

type fileNode struct {
	fs.Inode
	v    *volume
	d    *folder
	f    *file
	name string // the one it was last found by
}

var (
	_ fs.NodeLookuper  = (*rootNode)(nil)
	_ fs.NodeReaddirer = (*rootNode)(nil)
	_ fs.NodeLookuper  = (*folderNode)(nil)
	_ fs.NodeReaddirer = (*folderNode)(nil)
	_ fs.NodeCreater   = (*folderNode)(nil)
	_ fs.NodeMkdirer   = (*folderNode)(nil)
	_ fs.NodeTmpfiler  = (*folderNode)(nil)
	_ fs.NodeLinker    = (*folderNode)(nil)
	_ fs.NodeUnlinker  = (*folderNode)(nil)
	_ fs.NodeRenamer   = (*folderNode)(nil)
	_ fs.NodeFsyncer   = (*folderNode)(nil)
	_ fs.NodeStatfser  = (*folderNode)(nil)
	_ fs.NodeGetattrer = (*folderNode)(nil)
	_ fs.NodeOpener    = (*fileNode)(nil)
	_ fs.NodeReader    = (*fileNode)(nil)
	_ fs.NodeWriter    = (*fileNode)(nil)
	_ fs.NodeFsyncer   = (*fileNode)(nil)
	_ fs.NodeFlusher   = (*fileNode)(nil)
	_ fs.NodeGetattrer = (*fileNode)(nil)
	_ fs.NodeSetattrer = (*fileNode)(nil)
	_ fs.NodeAllocater = (*fileNode)(nil)
	_ fs.NodeLseeker   = (*fileNode)(nil)
	_ fs.NodeStatfser  = (*fileNode)(nil)
)

func (n *rootNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	d := n.v.folders[name]
	if d == nil {
		return nil, syscall.ENOENT
	}
	out.Mode, out.Ino = syscall.S_IFDIR|0o755, d.ino
	return n.NewInode(ctx, &folderNode{v: n.v, d: d}, fs.StableAttr{Mode: syscall.S_IFDIR, Ino: d.ino}), 0
}

func (n *rootNode) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	return fs.NewListDirStream(n.v.within("")), 0
}

// within lists the folders that are in another one, or in the root, "". v.mu is held.
func (v *volume) within(folder string) (list []fuse.DirEntry) {
	for _, d := range v.sorted() {
		if dir, name := path.Split(d.name); strings.TrimSuffix(dir, "/") == folder {
			list = append(list, fuse.DirEntry{Name: name, Mode: syscall.S_IFDIR, Ino: d.ino})
		}
	}
	return list
}

func (n *folderNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Ino = syscall.S_IFDIR|0o755, n.d.ino
	return 0
}

// child makes the node of a file. v.mu is held.
func (n *folderNode) child(ctx context.Context, name string, f *file, out *fuse.EntryOut) *fs.Inode {
	f.fill(&out.Attr)
	inode := n.NewInode(ctx, &fileNode{v: n.v, d: n.d, f: f}, fs.StableAttr{Mode: syscall.S_IFREG, Ino: f.ino})
	// NewInode returns the node that is there, if there is one.
	inode.Operations().(*fileNode).name = name
	return inode
}

func (n *folderNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	f := n.d.names[name]
	if d := n.v.folders[n.d.name+"/"+name]; d != nil {
		out.Mode, out.Ino = syscall.S_IFDIR|0o755, d.ino
		return n.NewInode(ctx, &folderNode{v: n.v, d: d}, fs.StableAttr{Mode: syscall.S_IFDIR, Ino: d.ino}), 0
	}
	if f == nil {
		return nil, syscall.ENOENT
	}
	return n.child(ctx, name, f, out), 0
}

// Mkdir makes a directory, durably.
func (n *folderNode) Mkdir(ctx context.Context, name string, _ uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	errno, _ := n.v.enter(Create, name)
	if errno == 0 {
		n.v.folder(n.d.name + "/" + name)
	}
	n.v.mu.Unlock()
	if errno != 0 {
		return nil, errno
	}
	return n.Lookup(ctx, name, out)
}

func (n *folderNode) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	list := n.v.within(n.d.name)
	for name, f := range n.d.names {
		list = append(list, fuse.DirEntry{Name: name, Mode: syscall.S_IFREG, Ino: f.ino})
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Name < list[j].Name })
	return fs.NewListDirStream(list), 0
}

func (n *folderNode) Create(ctx context.Context, name string, flags uint32, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	errno, _ := n.v.enter(Create, name)
	defer n.v.mu.Unlock()
	if errno != 0 {
		return nil, nil, 0, errno
	}
	f := n.d.names[name]
	switch {
	case f != nil && flags&syscall.O_EXCL != 0:
		return nil, nil, 0, syscall.EEXIST
	case f == nil:
		f = n.newFile(ctx, mode)
		n.d.change(nameChange{here: name, file: f})
	case flags&syscall.O_TRUNC != 0:
		f.truncate(0)
	}
	return n.child(ctx, name, f, out), nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *folderNode) newFile(ctx context.Context, mode uint32) *file {
	var uid, gid uint32
	if c, ok := fuse.FromContext(ctx); ok {
		uid, gid = c.Uid, c.Gid
	}
	return n.v.newFile(mode, uid, gid)
}

func (n *folderNode) Tmpfile(ctx context.Context, flags uint32, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	errno, _ := n.v.enter(Create, "")
	defer n.v.mu.Unlock()
	if errno != 0 {
		return nil, nil, 0, errno
	}
	return n.child(ctx, "", n.newFile(ctx, mode), out), nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *folderNode) Link(ctx context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	errno, _ := n.v.enter(Rename, name)
	defer n.v.mu.Unlock()
	t, ok := target.(*fileNode)
	switch {
	case errno != 0:
		return nil, errno
	case !ok || t.d != n.d:
		return nil, syscall.EXDEV
	case n.d.names[name] != nil:
		return nil, syscall.EEXIST
	}
	n.d.change(nameChange{here: name, file: t.f})
	return n.child(ctx, name, t.f, out), 0
}

func (n *folderNode) Unlink(_ context.Context, name string) syscall.Errno {
	errno, _ := n.v.enter(Remove, name)
	defer n.v.mu.Unlock()
	switch {
	case errno != 0:
		return errno
	case n.d.names[name] == nil:
		return syscall.ENOENT
	}
	n.d.change(nameChange{gone: name})
	return 0
}

func (n *folderNode) Rename(_ context.Context, name string, parent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	errno, _ := n.v.enter(Rename, name)
	defer n.v.mu.Unlock()
	to, ok := parent.(*folderNode)
	f := n.d.names[name]
	switch {
	case errno != 0:
		return errno
	case f == nil:
		return syscall.ENOENT
	case !ok:
		return syscall.EXDEV
	case flags&^uint32(unix.RENAME_NOREPLACE) != 0:
		return syscall.EINVAL
	case flags&unix.RENAME_NOREPLACE != 0 && to.d.names[newName] != nil:
		return syscall.EEXIST
	}
	if to.d == n.d {
		n.d.change(nameChange{gone: name, here: newName, file: f})
	} else { // the directories are durable each for itself
		to.d.change(nameChange{here: newName, file: f})
		n.d.change(nameChange{gone: name})
	}
	if c := n.GetChild(name); c != nil {
		c.Operations().(*fileNode).name = newName
	}
	return 0
}

// Fsync of a directory makes its names durable.
func (n *folderNode) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	errno, _ := n.v.enter(SyncDir, n.d.name)
	defer n.v.mu.Unlock()
	if errno == 0 {
		n.d.syncNames()
	}
	return errno
}

func (n *folderNode) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	n.d.statfs(out)
	return 0
}

func (n *fileNode) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	n.d.statfs(out)
	return 0
}

func (d *folder) statfs(out *fuse.StatfsOut) {
	total := d.limit
	if total == 0 {
		total = 1 << 40
	}
	out.Bsize, out.Frsize, out.NameLen = pageSize, pageSize, 255
	out.Blocks, out.Bfree = uint64(total/pageSize), uint64(max(0, total-d.used())/pageSize)
	out.Bavail, out.Files, out.Ffree = out.Bfree, 1<<20, 1<<20
}

// fill reports what a file is. The times never change: the kernel must not drop its pages for that.
func (f *file) fill(out *fuse.Attr) {
	out.Ino, out.Mode, out.Nlink = f.ino, syscall.S_IFREG|f.mode, 1
	out.Uid, out.Gid = f.uid, f.gid
	out.Size, out.Blocks, out.Blksize = uint64(f.current.size), uint64(len(f.current.pages))*pageSize/sectorSize, pageSize
	out.Mtime, out.Ctime, out.Atime = 1, 1, 1
}

// Open lets the kernel keep the pages it has, as a disk file system does.
func (n *fileNode) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	if n.v.off {
		return nil, 0, syscall.EIO
	}
	if flags&syscall.O_TRUNC != 0 {
		n.f.truncate(0)
	}
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *fileNode) Flush(context.Context, fs.FileHandle) syscall.Errno { return 0 }

func (n *fileNode) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	errno, _ := n.v.enter(Read, n.name)
	defer n.v.mu.Unlock()
	if errno != 0 {
		return nil, errno
	}
	return fuse.ReadResultData(p[:n.f.current.read(p, off)]), 0
}

func (n *fileNode) Write(_ context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	errno, short := n.v.enter(Write, n.name)
	defer n.v.mu.Unlock()
	if errno != 0 {
		return 0, errno
	}
	if short >= 0 && short < len(p) {
		p = p[:short]
	}
	written, errno := n.d.write(n.f, p, off)
	return uint32(written), errno
}

func (n *fileNode) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	errno, _ := n.v.enter(Fsync, n.name)
	defer n.v.mu.Unlock()
	switch {
	case n.v.off:
	case errno != 0:
		n.f.lose()
	default:
		n.f.sync()
	}
	return errno
}

func (n *fileNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	n.f.fill(&out.Attr)
	return 0
}

func (n *fileNode) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	size, resize := in.GetSize()
	if resize {
		errno, _ := n.v.enter(Truncate, n.name)
		defer n.v.mu.Unlock()
		if errno != 0 {
			return errno
		}
		n.f.truncate(int64(size))
	} else {
		n.v.mu.Lock()
		defer n.v.mu.Unlock()
	}
	if mode, ok := in.GetMode(); ok {
		n.f.mode = mode & 0o7777
	}
	if uid, ok := in.GetUID(); ok {
		n.f.uid = uid
	}
	if gid, ok := in.GetGID(); ok {
		n.f.gid = gid
	}
	n.f.fill(&out.Attr)
	return 0
}

func (n *fileNode) Allocate(_ context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	op := Allocate
	if mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) != 0 {
		op = Punch
	}
	errno, _ := n.v.enter(op, n.name)
	defer n.v.mu.Unlock()
	if errno != 0 {
		return errno
	}
	end := int64(off + size)
	switch {
	case mode&unix.FALLOC_FL_PUNCH_HOLE != 0:
		n.f.punch(int64(off), int64(size), false)
		return 0
	case mode&^uint32(unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_ZERO_RANGE) != 0:
		return syscall.EOPNOTSUPP
	}
	if errno := n.d.reserve(n.f, int64(off), int64(size)); errno != 0 {
		return errno
	}
	if mode&unix.FALLOC_FL_ZERO_RANGE != 0 {
		n.f.punch(int64(off), int64(size), true)
	}
	if mode&unix.FALLOC_FL_KEEP_SIZE == 0 && end > n.f.current.size {
		n.f.truncate(end)
	}
	return 0
}

func (n *fileNode) Lseek(_ context.Context, _ fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	n.v.mu.Lock()
	defer n.v.mu.Unlock()
	at := int64(off)
	c := &n.f.current
	if at >= c.size {
		return 0, syscall.ENXIO
	}
	if whence != unix.SEEK_DATA && whence != unix.SEEK_HOLE {
		return 0, syscall.EINVAL
	}
	for at < c.size && (c.pages[at/pageSize] != nil) != (whence == unix.SEEK_DATA) {
		at = (at/pageSize + 1) * pageSize
	}
	if at >= c.size {
		if whence == unix.SEEK_DATA {
			return 0, syscall.ENXIO
		}
		at = c.size
	}
	return uint64(at), 0
}
