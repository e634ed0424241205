package newfile

import (
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// inUseByte is locked in a temporary file while it is filled, far behind the bytes of docs/decisions/0001-locks.md.
const inUseByte = 1 << 62

// onlyTemporary is temporary after those were removed that killed processes left. The folder is locked meanwhile, so that no
// file is looked at before its process has locked it. On file systems without such locks nothing is removed.
func (t *target) onlyTemporary() (*os.File, error) {
	folder, err := os.Open(filepath.Dir(t.path))
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	if unix.Flock(int(folder.Fd()), unix.LOCK_EX) == nil {
		t.removeLeft()
	}
	f, err := t.temporary()
	if err != nil {
		return nil, err
	}
	// Of its own, since f is closed before the file gets its name.
	if t.inUse, err = lockTemporary(f.Name(), os.O_RDWR, unix.F_WRLCK); err != nil {
		f.Close()
		os.Remove(f.Name())
		return nil, err
	}
	return f, nil
}

// lockTemporary returns a file that is locked until it is closed, and nil where it can't be locked.
func lockTemporary(path string, mode int, kind int16) (*os.File, error) {
	f, err := os.OpenFile(path, mode|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: inUseByte, Len: 1}) != nil {
		return nil, f.Close()
	}
	return f, nil
}

// removeLeft removes the regular files with names that temporary makes, unless they are locked. Errors are ignored: what is
// left takes space, and does no other harm.
func (t *target) removeLeft() {
	entries, err := os.ReadDir(filepath.Dir(t.path))
	if err != nil {
		return
	}
	for _, e := range entries {
		if !t.isTemporary(e.Name()) || e.Type() != fs.FileMode(0) {
			continue
		}
		path := filepath.Join(filepath.Dir(t.path), e.Name())
		if f, err := lockTemporary(path, os.O_RDONLY, unix.F_RDLCK); err == nil && f != nil {
			os.Remove(path)
			f.Close()
		}
	}
}
