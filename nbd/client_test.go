package nbd_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/nbd"
)

// serve serves exports on a unix socket until the test ends, and returns the server and a function that
// gives an export's URI.
func serve(t testing.TB, o nbd.Options, exports ...nbd.Export) (*nbd.Server, func(name string) string) {
	t.Helper()
	s, uri, _ := serveUntil(t, o, exports...)
	return s, uri
}

// serveUntil is serve with a function that ends the server: it returns when no request is executed any more.
func serveUntil(t testing.TB, o nbd.Options, exports ...nbd.Export) (_ *nbd.Server, uri func(name string) string, end func()) {
	t.Helper()
	s := nbd.NewServer(o)
	for _, e := range exports {
		if err := s.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	socket := filepath.Join(testhost.ShortDir(t), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	end = sync.OnceFunc(func() {
		cancel()
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Error("Serve does not end")
		}
	})
	t.Cleanup(end)
	return s, func(name string) string {
		return nbd.URI{Network: "unix", Address: socket, Export: name}.String()
	}, end
}

func dial(t testing.TB, uri string, contexts ...string) *nbd.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := nbd.Dial(ctx, uri, contexts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A device behind server and client is still a device: the whole way there and back passes the suite.
func TestConformanceThroughTheProtocol(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device {
		_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.MemoryFrom(blocktest.Pattern(1<<20, 1)), CanTrim: true})
		return dial(t, uri("x"))
	})
	t.Run("read-only", func(t *testing.T) {
		blocktest.RunReadOnly(t, func(t *testing.T) block.Device {
			_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.NewMemory(1 << 20), ReadOnly: true, CanTrim: true})
			return dial(t, uri("x"))
		})
	})
}

// What a device can do arrives there through server and client, as far as the protocol has a request for it.
func TestProtocolPassesOn(t *testing.T) {
	blocktest.RunForward(t, func(t *testing.T, dev block.Device) block.Device {
		_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: dev, CanTrim: true})
		return dial(t, uri("x"))
	}, "ReadCached", "WriteLastAt", "BeginFlush", "BeginRead", "Allocate", "DropCache", "Refresh", "Grow", "CanGrow", "BlockSize", "Identity")
}

// Two clients of one export are the same disk, whatever way leads to its socket.
func TestClientIdentity(t *testing.T) {
	export := func(name string) nbd.Export { return nbd.Export{Name: name, Device: block.NewMemory(1 << 20)} }
	_, uri := serve(t, nbd.Options{}, export("x"), export("y"))
	_, elsewhere := serve(t, nbd.Options{}, export("x"))
	u, err := nbd.ParseURI(uri("x"))
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(testhost.ShortDir(t), "link")
	if err := os.Symlink(u.Address, link); err != nil {
		t.Fatal(err)
	}
	first := dial(t, uri("x"))
	for _, c := range []struct {
		name string
		dev  block.Device
		want bool
	}{
		{"itself", first, true},
		{"itself, forwarded", block.NewForward(first), true},
		{"another client", dial(t, uri("x")), true},
		{"by a link", dial(t, nbd.URI{Network: "unix", Address: link, Export: "x"}.String()), true},
		{"another export", dial(t, uri("y")), false},
		{"another server", dial(t, elsewhere("x")), false},
		{"a local device", block.NewMemory(1 << 20), false},
	} {
		if got := block.Same(first, c.dev); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

func TestClientLargeTransfers(t *testing.T) {
	const size = 36 << 20
	mem := block.NewMemory(size)
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: mem})
	c := dial(t, uri("x"))
	p := blocktest.Pattern(size-1000, 3)
	clear(p[1<<20 : 20<<20])
	if n, err := c.WriteAt(p, 500); n != len(p) || err != nil {
		t.Fatal(n, err)
	}
	q := bytes.Repeat([]byte{1}, len(p))
	if n, err := c.ReadAt(q, 500); n != len(p) || err != nil || !bytes.Equal(p, q) {
		t.Fatal(n, err, bytes.Equal(p, q))
	}
}

func TestClientConcurrent(t *testing.T) {
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.NewMemory(64 << 20)})
	c := dial(t, uri("x"))
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() {
			p, q := blocktest.Pattern(16<<10, uint64(i)), make([]byte, 16<<10)
			for k := range int64(16) {
				off := int64(i)<<20 + k*(16<<10)
				if _, err := c.WriteAt(p, off); err != nil {
					t.Error(err)
				}
				if _, err := c.ReadAt(q, off); err != nil || !bytes.Equal(p, q) {
					t.Errorf("worker %d: %v", i, err)
				}
			}
			if err := c.Flush(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}
