package nbd

import (
	"errors"
	"io/fs"
	"syscall"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// errnoOf is where an error of a device becomes an error number of the protocol. EIO stands for all that
// has no better word: a snapshot that became invalid, a merge that failed, a disk that did.
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
