package fleet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// lockDirectory locks DIR/lock, which holds the id of the process that has it.
func lockDirectory(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	l, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(l.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		owner := make([]byte, 20)
		n, _ := l.ReadAt(owner, 0)
		l.Close()
		return nil, fmt.Errorf("%s: %w (process %s)", dir, ErrLocked, strings.TrimSpace(string(owner[:n])))
	}
	if err == nil {
		err = l.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintf(l, "%d\n", os.Getpid())
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return l, nil
}
