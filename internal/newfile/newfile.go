// Package newfile makes output files: a file has its name only when it is complete and durable.
//
// [Write] fills a temporary file beside the target, makes it durable, renames it to the target and makes the directory
// durable. A crash leaves the old target, or the new one; at worst the temporary file (".NAME.*.part") is left too.
//
// A target that exists is replaced with [Options].Replace only, and never while it is in use: it is locked as for
// writing (docs/decisions/0001-locks.md) before anything is written, and until it is replaced. The new file keeps its
// mode, owner, access list and other extended attributes. A target behind a symbolic link is replaced; the link stays.
// Devices, pipes, sockets, directories, the inputs and sealed layers (ondisk.SealedLabel) are never replaced.
package newfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// Options say what may be replaced.
type Options struct {
	// Replace allows a regular file that exists to be replaced.
	Replace bool
	// Inputs are files that are never replaced: what the output is made of, or other outputs.
	Inputs []string
	// RemoveLeft removes temporary files for the same target first that calls with this option left when their process was killed.
	RemoveLeft bool
}

// ErrNotRegular reports a target that exists and is not a regular file.
var ErrNotRegular = errors.New("not a regular file")

// ErrStandardOutput reports the path "-", which by custom means standard output. A file of that name is "./-".
var ErrStandardOutput = errors.New(`"-" means standard output, which can't be used here; a file of that name is "./-"`)

// nameBytes bounds the part of the target's name in the name of the temporary file, in bytes.
const nameBytes = 200

// A target is the file that is going to have the name.
type target struct {
	path  string // of the file itself, not of a symbolic link to it
	info  os.FileInfo
	old   *block.File // locked; nil where nothing is replaced
	inUse *os.File    // locked; nil where RemoveLeft is not wanted
}

// Check returns the error that Write would return before it writes: for callers that have long work to do first.
// A later Write may still be refused.
func Check(path string, o Options) error {
	t, err := o.open(path)
	if err != nil {
		return err
	}
	return t.close()
}

// Write has fill write a new file, and names it path when it is complete and durable. Without an error from fill
// nothing of the file is visible under its name before.
//
// Errors: fs.ErrExist for a target that may not be replaced, ErrNotRegular, block.ErrInUse for a target that is in use,
// those of the operating system and of fill. After an error the target is as it was, unless only the last step failed,
// which makes the directory durable.
func Write(path string, o Options, fill func(*os.File) error) (err error) {
	t, err := o.open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	create := t.temporary
	if o.RemoveLeft {
		create = t.onlyTemporary
	}
	f, err := create()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name()) // gone already when only the directory could not be made durable
		}
	}()
	if err = t.fill(f, fill); err == nil {
		err = f.Sync() // the content is durable before the name
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := t.rename(f.Name()); err != nil {
		return err
	}
	return block.SyncDirectory(filepath.Dir(t.path))
}

// WriteDevice is Write for a file of size bytes, reading as zeros, that is filled as a device.
func WriteDevice(path string, o Options, size int64, fill func(*block.File) error) error {
	return Write(path, o, func(f *os.File) error {
		dev, err := Device(f, size)
		if err != nil {
			return err
		}
		return errors.Join(fill(dev), dev.Close())
	})
}

// Device makes the new file that fill was called with size bytes long and opens it as a device, locked.
func Device(f *os.File, size int64) (*block.File, error) {
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	return block.Open(f.Name(), block.Options{})
}

// open finds the target and locks the file that is going to be replaced.
func (o Options) open(path string) (*target, error) {
	if path == "-" {
		return nil, ErrStandardOutput
	}
	at, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(path); err == nil {
			return nil, fmt.Errorf("%s: a symbolic link to nothing", path)
		}
		if err := block.CheckNewFile(path); err != nil {
			return nil, err
		}
		_, err := os.Stat(filepath.Dir(path))
		return &target{path: path}, err
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	info, err := os.Stat(at)
	if err != nil {
		return nil, err
	}
	for _, in := range o.Inputs {
		if i, err := os.Stat(in); err == nil && os.SameFile(i, info) {
			return nil, fmt.Errorf("%s: is the same file as %s", path, in)
		}
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s: %w", path, ErrNotRegular)
	case !o.Replace:
		return nil, fmt.Errorf("%s: %w", path, fs.ErrExist)
	}
	old, err := block.Open(at, block.Options{ReadOnly: true, Lock: block.LockWrite})
	if err != nil {
		return nil, fmt.Errorf("not replaced: %w", err)
	}
	sector := make([]byte, ondisk.SectorSize)
	if _, err := old.ReadAt(sector, 0); err == nil {
		if err := ondisk.CheckUnsealed(sector); err != nil {
			old.Close()
			return nil, fmt.Errorf("%s: not replaced: %w", path, err)
		}
	}
	return &target{path: at, info: info, old: old}, nil
}

// close gives the locks back.
func (t *target) close() error {
	if t.inUse != nil {
		t.inUse.Close()
	}
	if t.old == nil {
		return nil
	}
	return t.old.Close()
}

const suffix = ".part"

// prefix is what the name of the temporary file begins with; digits follow, and the suffix.
func (t *target) prefix() string {
	name := filepath.Base(t.path)
	return "." + name[:min(len(name), nameBytes)] + "."
}

// isTemporary reports whether a name is one that temporary makes.
func (t *target) isTemporary(name string) bool {
	rest, begins := strings.CutPrefix(name, t.prefix())
	digits, ends := strings.CutSuffix(rest, suffix)
	_, err := strconv.ParseUint(digits, 10, 64)
	return begins && ends && err == nil
}

// temporary makes the file that is filled, for its owner only, beside the target.
func (t *target) temporary() (*os.File, error) {
	f, err := os.CreateTemp(filepath.Dir(t.path), t.prefix()+"*"+suffix)
	if err != nil {
		return nil, err
	}
	if err := f.Chmod(0o600); err != nil { // whatever the umask
		return nil, errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	return f, nil
}

// fill fills the file and gives it what it keeps of the one that it replaces. The owner comes first: where it can't
// be kept, no work is done in vain. The mode comes last: it may forbid its owner to write.
func (t *target) fill(f *os.File, fill func(*os.File) error) error {
	if t.old == nil {
		return fill(f)
	}
	owner := t.info.Sys().(*syscall.Stat_t)
	if err := keepOwner(f, owner); err != nil {
		return fmt.Errorf("%s: not replaced: its owner (%d:%d) can't be kept: %w", t.path, owner.Uid, owner.Gid, err)
	}
	if err := fill(f); err != nil {
		return err
	}
	if err := keepAttributes(f, t.path); err != nil {
		return fmt.Errorf("%s: not replaced: its extended attributes can't be kept: %w", t.path, err)
	}
	return unix.Fchmod(int(f.Fd()), owner.Mode&0o7777)
}

// keepOwner changes owner and group where they are not so already.
func keepOwner(f *os.File, want *syscall.Stat_t) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if is := info.Sys().(*syscall.Stat_t); is.Uid == want.Uid && is.Gid == want.Gid {
		return nil
	}
	return f.Chown(int(want.Uid), int(want.Gid))
}

// rename gives the finished file its name. It takes no name that something else has by now.
func (t *target) rename(from string) error {
	if t.old != nil {
		now, err := os.Lstat(t.path)
		if err == nil && !os.SameFile(now, t.info) {
			err = fmt.Errorf("%s: not replaced: it was replaced meanwhile", t.path)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return os.Rename(from, t.path)
	}
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, t.path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // a file system that has no such thing
		if err = os.Link(from, t.path); err == nil {
			err = os.Remove(from)
		}
		return err
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: t.path, Err: err}
	}
	return nil
}
