package daemon

import (
	"bytes"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestSocketGroup makes sockets as a user that is not root, as the unit in contrib/systemd does: with a group that the user is
// in as one of others, which members of the group, and nobody else, can connect to; and with one that it is not in, which is
// refused and leaves no socket.
func TestSocketGroup(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to become other users")
	}
	dir, err := os.MkdirTemp("/tmp", "dm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	const first, shared, foreign = 61001, 61002, 61003
	path := filepath.Join(dir, "s")
	as := func(uid, gid uint32, groups []uint32, do string, socket int) (end func(), out *bytes.Buffer, wait func() error) {
		c := exec.Command("/proc/self/exe", "-test.run=^TestSocketGroupProcess$", "-test.v")
		c.Env = []string{"DMSNAP_SOCKET=" + path, "DMSNAP_SOCKET_DO=" + do, "DMSNAP_SOCKET_GROUP=" + strconv.Itoa(socket), "TMPDIR=/tmp"}
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid, Groups: groups}}
		c.Dir = "/"
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out = &bytes.Buffer{}
		c.Stdout, c.Stderr = out, out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		return func() { in.Close() }, out, c.Wait
	}
	run := func(uid, gid uint32, groups []uint32, do string, socket int) string {
		end, out, wait := as(uid, gid, groups, do, socket)
		end()
		if err := wait(); err != nil {
			return out.String()
		}
		return ""
	}
	for gid, member := range map[int]uint32{shared: shared, first: first, -1: first} {
		end, out, wait := as(61001, first, []uint32{shared}, "listen", gid)
		for ready := false; !ready; {
			st, err := os.Lstat(path)
			ready = err == nil && st.Mode().Perm() == 0o660
			if ready && st.Sys().(*syscall.Stat_t).Gid != member {
				t.Errorf("group %d: the socket has %d", gid, st.Sys().(*syscall.Stat_t).Gid)
			}
		}
		if text := run(61002, foreign, []uint32{member}, "dial", 0); text != "" {
			t.Errorf("group %d: a member is refused: %s", gid, text)
		}
		if text := run(61002, foreign, nil, "dial", 0); !strings.Contains(text, "permission denied") {
			t.Errorf("group %d: somebody else is let in: %s", gid, text)
		}
		end()
		if err := wait(); err != nil {
			t.Errorf("group %d: %v: %s", gid, err, out)
		}
	}
	if text := run(61001, first, []uint32{shared}, "listen", foreign); !strings.Contains(text, "operation not permitted") {
		t.Errorf("a group that it is not in: %s", text)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is left: %v", err)
	}
}

// TestSocketGroupProcess is the process of TestSocketGroup.
func TestSocketGroupProcess(t *testing.T) {
	path := os.Getenv("DMSNAP_SOCKET")
	switch os.Getenv("DMSNAP_SOCKET_DO") {
	case "listen":
		gid, err := strconv.Atoi(os.Getenv("DMSNAP_SOCKET_GROUP"))
		if err != nil {
			t.Fatal(err)
		}
		l, err := ListenUnix(path, gid, 0o660)
		if err != nil {
			t.Fatal(err)
		}
		os.Stdin.Read(make([]byte, 1)) // until the test closes it
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	case "dial":
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	default:
		t.Skip("it is no test of its own")
	}
}

// TestUnit has systemd read the unit.
func TestUnit(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze")
	}
	text, err := os.ReadFile("../../contrib/systemd/dmsnap-fleet.service")
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	unit := filepath.Join(t.TempDir(), "dmsnap-fleet.service")
	if err := os.WriteFile(unit, bytes.ReplaceAll(text, []byte("/usr/local/bin/dmsnap"), []byte(self)), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(analyze, "verify", "--man=no", unit).CombinedOutput(); err != nil || bytes.Contains(out, []byte("dmsnap-fleet.service")) {
		t.Errorf("%v: %s", err, out)
	}
	// ~@privileged forbids chown, which --socket-group needs.
	if deny, allow := bytes.Index(text, []byte("\nSystemCallFilter=~@privileged\n")), bytes.Index(text, []byte("\nSystemCallFilter=@chown\n")); deny < 0 || allow < deny {
		t.Error("the unit does not allow chown")
	}
}
