package nbd

import (
	"errors"
	"io/fs"
	"syscall"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// errnoOf converts an error of a device to an error number of the protocol. EIO is for everything without a number of
// its own: a snapshot that became invalid, a merge or a disk that failed.
func errnoOf(err error) wire.Errno {
	var outside *block.RangeError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, block.ErrReadOnly):
		return wire.EPERM
	case errors.Is(err, block.ErrNotFast):
		return wire.ENOTSUP
	case errors.As(err, &outside):
		if outside.Op == "write" || outside.Op == "zero" {
			return wire.ENOSPC
		}
		return wire.EINVAL
	case errors.Is(err, fs.ErrClosed):
		return wire.ESHUTDOWN
	case block.IsNoSpace(err):
		return wire.ENOSPC
	case errors.Is(err, syscall.ENOMEM):
		return wire.ENOMEM
	}
	return wire.EIO
}
