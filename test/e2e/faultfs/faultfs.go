// Package faultfs is a FUSE file system for tests, with injected errors and power cuts. It keeps its files in
// memory and runs in a process of its own, so that a test may use files on it in any way:
//
//	func TestMain(m *testing.M) {
//		faultfs.Main() // does not return in the process of the file system
//		os.Exit(m.Run())
//	}
//
//	f, err := faultfs.Start(dir)     // mounted on dir
//	err = f.Folder("cows", 8<<20)    // dir/cows, with space for 8 MiB
//	err = f.Add(faultfs.Rule{Op: faultfs.Fsync, File: "v.cow", Errno: syscall.EIO, Count: 1})
//	err = f.Close()
//
// It behaves as Linux' disk file systems do. Reads are served from the kernel's page cache, which POSIX_FADV_DONTNEED
// and O_DIRECT go past. A failed fsync leaves what was not flushed readable as long as the page cache holds it,
// clean, and not on the disk. A power cut loses any subset of the sectors that were not flushed, and the last of the
// changes of names that were not.
//
// The process ends, and the mount with it, when the process that started it ends in whatever way.
package faultfs

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net/rpc"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// environment names the variable that makes a process one of a file system; its value is the mount point.
const environment = "DMSNAP_FAULTFS"

// FS is a mounted file system. Its methods may be called concurrently.
type FS struct {
	dir   string
	cmd   *exec.Cmd
	rpc   *rpc.Client
	stdin io.Closer
}

// ErrUnavailable wraps the reason why this machine can't mount a FUSE file system.
var ErrUnavailable = errors.New("no FUSE file system can be mounted")

// Start mounts a new, empty file system on a directory that exists.
func Start(dir string) (*FS, error) {
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	} else if err := f.Close(); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), environment+"="+dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt from the terminal is not for it
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	f := &FS{dir: dir, cmd: cmd, stdin: in, rpc: rpc.NewClient(pipes{out, in})}
	if err := f.rpc.Call("Control.Mount", 0, new(int)); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrUnavailable, err), f.end())
	}
	return f, nil
}

// pipes are the two ends of a process as one connection.
type pipes struct {
	io.Reader
	io.WriteCloser
}

// Dir returns the mount point.
func (f *FS) Dir() string { return f.dir }

// Folder makes a directory in the root, or changes its limit: the bytes that its files may occupy together, 0 for no
// limit. A directory is like a file system of its own. Only directories can hold files. With a slash in the name it is in
// another directory, which was made before.
func (f *FS) Folder(name string, limit int64) error {
	return f.rpc.Call("Control.Folder", FolderArgs{name, limit}, new(int))
}

// Add adds a rule. The first one that applies to a call counts.
func (f *FS) Add(r Rule) error { return f.rpc.Call("Control.Add", r, new(int)) }

// Clear removes all rules and releases the calls that hang.
func (f *FS) Clear() error { return f.rpc.Call("Control.Clear", 0, new(int)) }

// Release lets the calls that hang go on. Their rules stay.
func (f *FS) Release() error { return f.rpc.Call("Control.Release", 0, new(int)) }

// Hanging returns how many calls hang.
func (f *FS) Hanging() (n int, err error) {
	err = f.rpc.Call("Control.Hanging", 0, &n)
	return n, err
}

// Hits returns the calls that rules applied to since the last Hits.
func (f *FS) Hits() (hits []Hit, err error) {
	err = f.rpc.Call("Control.Hits", 0, &hits)
	return hits, err
}

// Used returns the bytes that the files of a directory occupy.
func (f *FS) Used(folder string) (n int64, err error) {
	err = f.rpc.Call("Control.Used", folder, &n)
	return n, err
}

// PowerOff makes every call fail from now on; calls that hang fail too. Nothing reaches the disk any more.
func (f *FS) PowerOff() error { return f.rpc.Call("Control.PowerOff", 0, new(int)) }

// PowerOn is the end of a power cut: the file system is mounted again with what the disk has, without rules. What
// survived of what was not flushed depends on the seed. Processes that had files open must have ended. It returns the
// number of sectors that are lost.
func (f *FS) PowerOn(seed uint64) (lost int, err error) {
	err = f.rpc.Call("Control.PowerOn", seed, &lost)
	return lost, err
}

// Close unmounts the file system and ends its process.
func (f *FS) Close() error {
	return errors.Join(f.rpc.Call("Control.Clear", 0, new(int)), f.end())
}

func (f *FS) end() error {
	f.rpc.Close() // closes its standard input, which ends it
	late := time.AfterFunc(20*time.Second, func() { f.cmd.Process.Kill() })
	defer late.Stop()
	if err := f.cmd.Wait(); err != nil {
		return fmt.Errorf("faultfs: %w", err)
	}
	return nil
}

// Main runs the file system, in a process that [Start] started; in others it does nothing. Programs that call Start
// call it first.
func Main() {
	dir := os.Getenv(environment)
	if dir == "" {
		return
	}
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP)
	c := &Control{dir: dir, v: newVolume()}
	s := rpc.NewServer()
	if err := s.Register(c); err != nil {
		log.Fatal(err)
	}
	s.ServeConn(pipes{os.Stdin, os.Stdout}) // until its input ends
	c.v.mu.Lock()
	c.v.rules = nil
	c.v.releaseAll()
	c.v.mu.Unlock()
	if err := c.unmount(); err != nil {
		log.Fatal(err)
	}
	os.Exit(0)
}

// Control has the calls of the file system's process.
type Control struct {
	dir    string
	v      *volume
	server *fuse.Server
}

// FolderArgs are the arguments of Folder.
type FolderArgs struct {
	Name  string
	Limit int64
}

// Mount mounts the volume.
func (c *Control) Mount(int, *int) error {
	none := time.Duration(0)
	server, err := fs.Mount(c.dir, &rootNode{v: c.v}, &fs.Options{
		EntryTimeout: &none, AttrTimeout: &none, NullPermissions: true,
		MountOptions: fuse.MountOptions{FsName: "faultfs", Name: "faultfs", DirectMount: true,
			MaxWrite: 128 << 10, ExplicitDataCacheControl: true, DisableXAttrs: true,
			Logger: log.New(io.Discard, "", 0)},
	})
	c.server = server
	return err
}

// unmount waits a moment for processes that have just been killed to end, and then detaches the mount from them.
func (c *Control) unmount() error {
	if c.server == nil {
		return nil
	}
	for range 8 {
		if c.server.Unmount() == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return syscall.Unmount(c.dir, syscall.MNT_DETACH)
}

// Folder is [FS.Folder].
func (c *Control) Folder(a FolderArgs, _ *int) error {
	c.v.mu.Lock()
	defer c.v.mu.Unlock()
	c.v.folder(a.Name).limit = a.Limit
	return nil
}

// Add is [FS.Add].
func (c *Control) Add(r Rule, _ *int) error {
	c.v.mu.Lock()
	defer c.v.mu.Unlock()
	c.v.rules = append(c.v.rules, &rule{Rule: r})
	return nil
}

// Clear is [FS.Clear].
func (c *Control) Clear(int, *int) error {
	c.v.mu.Lock()
	defer c.v.mu.Unlock()
	c.v.rules = nil
	c.v.releaseAll()
	return nil
}

// Release is [FS.Release].
func (c *Control) Release(int, *int) error {
	c.v.mu.Lock()
	defer c.v.mu.Unlock()
	c.v.releaseAll()
	return nil
}

// Hanging is [FS.Hanging].
func (c *Control) Hanging(_ int, n *int) error {
	c.v.mu.Lock()
	defer c.v.mu.Unlock()
	*n = c.v.hanging
	return nil
}

// Hits is [FS.Hits].
func (c *Control) Hits(_ int, hits *[]Hit) error {
	c.v.mu.Lock()
	defer c.v.mu.Unlock()
	*hits, c.v.hits = c.v.hits, nil
	return nil
}

// Used is [FS.Used].
func (c *Control) Used(name string, n *int64) error {
	c.v.mu.Lock()
	defer c.v.mu.Unlock()
	if d := c.v.folders[name]; d != nil {
		*n = d.used()
	}
	return nil
}

// PowerOff is [FS.PowerOff].
func (c *Control) PowerOff(int, *int) error {
	c.v.mu.Lock()
	defer c.v.mu.Unlock()
	c.v.off = true
	c.v.releaseAll()
	return nil
}

// PowerOn is [FS.PowerOn].
func (c *Control) PowerOn(seed uint64, lost *int) error {
	if err := c.unmount(); err != nil {
		return err
	}
	c.v.mu.Lock()
	*lost = c.v.cut(seed)
	c.v.rules, c.v.off = nil, false
	c.v.mu.Unlock()
	return c.Mount(0, nil)
}
