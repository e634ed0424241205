package newfile

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// The extended attribute that is a file's access list, which together with the mode says who may use it.
const accessList = "system.posix_acl_access"

// keepAttributes gives f the extended attributes of the file at path, and no access list where that has none: f may
// have one from its directory.
func keepAttributes(f *os.File, path string) error {
	names, err := attributes(path)
	if err != nil {
		return err
	}
	listed := false
	for _, name := range names {
		if !kept(name) {
			continue
		}
		listed = listed || name == accessList
		value, err := readAttribute(path, name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := unix.Fsetxattr(int(f.Fd()), name, value, 0); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if listed {
		return nil
	}
	err = unix.Fremovexattr(int(f.Fd()), accessList)
	if err == nil || errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	return fmt.Errorf("%s: %w", accessList, err)
}

// kept reports whether an attribute is kept. Those that the kernel derives from the content, or sets by itself, are
// not: the content is another.
func kept(name string) bool {
	switch name {
	case accessList, "security.selinux":
		return true
	}
	return strings.HasPrefix(name, "user.")
}

// attributes lists the names of a file's extended attributes.
func attributes(path string) ([]string, error) {
	list, err := grown(func(b []byte) (int, error) { return unix.Listxattr(path, b) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	return strings.FieldsFunc(string(list), func(r rune) bool { return r == 0 }), err
}

func readAttribute(path, name string) ([]byte, error) {
	return grown(func(b []byte) (int, error) { return unix.Getxattr(path, name, b) })
}

// grown calls a function that returns the needed size when it is called without a buffer.
func grown(call func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := call(nil)
		if err != nil || n == 0 {
			return nil, err
		}
		b := make([]byte, n)
		n, err = call(b)
		if !errors.Is(err, unix.ERANGE) { // else it became longer
			return b[:max(0, n)], err
		}
	}
}
