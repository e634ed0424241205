package daemon

import (
	"net"
	"os"

	"github.com/dmsnap/dmsnap/server"
)

// ListenUnix is server.ListenUnix with the group gid, unless it is negative, and the mode of the socket.
func ListenUnix(path string, gid int, mode os.FileMode) (net.Listener, error) {
	l, err := server.ListenUnix(path)
	if err != nil {
		return nil, err
	}
	// The mode was 0600 from the first moment: no other user could connect before.
	if gid >= 0 {
		err = os.Lchown(path, -1, gid)
	}
	if err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}
