package server

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/nbd"
)

// A socket without a listener is replaced; one with a listener, and anything else, is not.
func TestListenUnix(t *testing.T) {
	path := filepath.Join(testhost.ShortDir(t), "sock")
	l, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path); err == nil || !strings.Contains(err.Error(), "listens there already") {
		t.Errorf("a socket in use: %v", err)
	}
	l.(*ownSocket).UnixListener.Close() // as if killed
	if l, err = ListenUnix(path); err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	if err := os.WriteFile(path, []byte("letter"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "letter" {
		t.Errorf("the file holds %q, %v", b, err)
	}
	if _, err := ListenUnix("/tmp/" + strings.Repeat("x", 200)); err == nil || !strings.Contains(err.Error(), "107") {
		t.Errorf("a long path: %v", err)
	}
}

// TestListenUnixLeavesTheUmask: what a process makes while it listens has the mode that it asked for. As root a directory
// that can't be entered is not noticed.
func TestListenUnixLeavesTheUmask(t *testing.T) {
	dir := testhost.ShortDir(t)
	probe := filepath.Join(dir, "probe")
	if err := os.Mkdir(probe, 0o700); err != nil {
		t.Fatal(err)
	}
	want, err := os.Stat(probe)
	if err != nil {
		t.Fatal(err)
	}
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				ended <- nil
				return
			default:
			}
			l, err := ListenUnix(filepath.Join(dir, "s"))
			if err != nil {
				ended <- err
				return
			}
			l.Close()
		}
	}()
	for i := range 2000 {
		made := filepath.Join(dir, strconv.Itoa(i))
		if err := os.Mkdir(made, 0o700); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(made)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want.Mode() {
			t.Errorf("directory %d has mode %v, want %v", i, info.Mode(), want.Mode())
			break
		}
	}
	close(stop)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// Clients get the absolute path, so that is what has to be short.
func TestSocketPathThatIsAbsoluteTooLong(t *testing.T) {
	deep := filepath.Join(t.TempDir(), strings.Repeat("d", 100))
	if err := os.Mkdir(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Chdir(deep)
	if _, err := ListenUnix("s"); err == nil || !strings.Contains(err.Error(), "107") {
		t.Errorf("a long absolute path: %v", err)
	}
}

// A listener leaves a socket that another server has put in the place of its own.
func TestCloseSparesSocketsOfOthers(t *testing.T) {
	path := filepath.Join(testhost.ShortDir(t), "sock")
	first, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil { // somebody tidied up
		t.Fatal(err)
	}
	second, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the second server lost its socket: %v", err)
	} else {
		c.Close()
	}
	second.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// Of many servers that find a socket that nobody listens on, one gets it.
func TestOneServerGetsAStaleSocket(t *testing.T) {
	for range 20 {
		path := filepath.Join(testhost.ShortDir(t), "sock")
		stale, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		stale.(*net.UnixListener).SetUnlinkOnClose(false)
		stale.Close()
		var got atomic.Int32
		var all sync.WaitGroup
		var listeners [16]net.Listener
		for i := range listeners {
			all.Go(func() {
				if l, err := ListenUnix(path); err == nil {
					got.Add(1)
					listeners[i] = l
				}
			})
		}
		all.Wait()
		if n := got.Load(); n != 1 {
			t.Errorf("%d servers listen on one path", n)
		}
		for _, l := range listeners {
			if l != nil {
				l.Close()
			}
		}
	}
}

func TestTCPAddresses(t *testing.T) {
	for address, want := range map[string]string{
		"10809": "tcp localhost:10809", ":10809": "tcp localhost:10809", "0": "tcp localhost:0",
		"0.0.0.0:1": "tcp4 0.0.0.0:1", "127.0.0.1:1": "tcp4 127.0.0.1:1", "[::1]:1": "tcp [::1]:1", "[::]:1": "tcp [::]:1",
		"disks.example:1": "tcp disks.example:1",
		"127.0.0.1":       "", "localhost": "", "::1": "", "[::1]": "", "127.0.0.1:": "", "": "", "127.0.0.1:65536": "", "99999": "",
	} {
		network, full, err := tcpAddress(address)
		if got := strings.TrimSpace(network + " " + full); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v, want %q", address, got, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "unknown port") {
			t.Errorf("%q: %v", address, err)
		}
	}
	if _, _, err := tcpAddress("127.0.0.1"); err == nil || !strings.Contains(err.Error(), "127.0.0.1:10809") {
		t.Errorf("a HOST without a port: %v", err)
	}
	l, err := ListenTCP("0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a := l.Addr().(*net.TCPAddr); a.IP.To4() == nil || !strings.HasPrefix(nbd.ExportURI(a, "x", false), "nbd://0.0.0.0:") {
		t.Errorf("0.0.0.0 listens on %v, %s", a, nbd.ExportURI(a, "x", false))
	}
}

func TestListenTCPIsLoopbackUnlessAsked(t *testing.T) {
	for _, address := range []string{":0", "0", "localhost:0", "127.0.0.1:0"} {
		l, err := ListenTCP(address)
		if err != nil {
			t.Fatal(err)
		}
		if a := l.Addr().(*net.TCPAddr); !a.IP.IsLoopback() {
			t.Errorf("--listen %s listens on %s", address, a)
		}
		l.Close()
	}
}
