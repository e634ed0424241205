package daemon

import (
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/server"
)

// ListenUnix is server.ListenUnix with the group gid, unless it is negative, and the mode of the socket.
func ListenUnix(path string, gid int, mode os.FileMode) (net.Listener, error) {
	l, err := server.ListenUnix(path)
	if err != nil {
		return nil, err
	}
	// The mode was 0600 from the first moment: no other user could connect before.
	if gid >= 0 && !hasGroup(path, gid) { // chown may be forbidden to a process, and is not needed then
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

func hasGroup(path string, gid int) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && int(st.Gid) == gid
}
