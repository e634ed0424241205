package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

func ofKind(k blocktest.Kind) func(blocktest.Op) bool {
	return func(op blocktest.Op) bool { return op.Kind == k }
}

// A request that the device delays blocks nobody behind it, whichever kind it is; not even as many as
// the connection may have but one.
func TestSlowRequestsAreOvertaken(t *testing.T) {
	for _, k := range []blocktest.Kind{blocktest.Read, blocktest.Write, blocktest.Flush} {
		dev := blocktest.NewFaulty(block.MemoryFrom([]byte(strings.Repeat("x", 4096))), nil)
		_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: dev})
		p := begin(t, uri("x"), false)
		var holds []*blocktest.Hold
		for i := range 63 {
			h := dev.Hold(ofKind(k))
			defer h.Release()
			holds = append(holds, h)
			switch k {
			case blocktest.Read:
				p.request(wire.CmdRead, 0, uint64(i), 0, 1)
			case blocktest.Write:
				p.request(wire.CmdWrite, 0, uint64(i), 512, 1)
				p.send("ff")
			case blocktest.Flush:
				p.request(wire.CmdFlush, 0, uint64(i), 0, 0)
			}
			<-h.Reached()
		}
		for i := range 10 {
			p.request(wire.CmdCache, 0, 100+uint64(i), 0, 1)
			p.simple(100+uint64(i), 0)
		}
		p.request(wire.CmdRead, 0, 200, 0, 1)
		p.simple(200, 0)
		p.expect("'x")
		holds[17].Release()
		p.simple(17, 0)
		if k == blocktest.Read {
			p.expect("'x")
		}
	}
}

// serving is a server that a test stops itself.
type serving struct {
	*nbd.Server
	uri   func(string) string
	stop  func()
	ended chan error
}

func start(t *testing.T, o nbd.Options, network string, exports ...nbd.Export) *serving {
	t.Helper()
	s := &serving{Server: nbd.NewServer(o), ended: make(chan error, 1)}
	for _, e := range exports {
		if err := s.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	address := "127.0.0.1:0"
	if network == "unix" {
		address = testhost.ShortDir(t) + "/s"
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	s.uri = func(name string) string {
		return nbd.URI{Network: network, Address: l.Addr().String(), Export: name}.String()
	}
	go func() { s.ended <- s.Serve(ctx, l) }()
	t.Cleanup(cancel)
	return s
}

// wait waits until what is true.
func wait(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !is(); {
		if time.Now().After(end) {
			t.Fatalf("%s: still not", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// The end of a server: a request under way is answered, later ones are refused, and then writable devices
// are flushed, once.
func TestShutdown(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			var log blocktest.Log
			dev := blocktest.NewFaulty(log.Record("", block.MemoryFrom([]byte(strings.Repeat("x", 4096)))), nil)
			ro := log.Record("ro", block.NewMemory(4096))
			s := start(t, nbd.Options{}, network, nbd.Export{Name: "x", Device: dev}, nbd.Export{Name: "ro", Device: ro, ReadOnly: true})
			p, idle, shaking := begin(t, s.uri("x"), false), begin(t, s.uri("x"), false), connect(t, s.uri("x"))
			h := dev.Hold(ofKind(blocktest.Read))
			defer h.Release()
			p.request(wire.CmdRead, 0, 1, 0, 1)
			<-h.Reached()
			s.stop()
			idle.disconnected()
			shaking.disconnected()
			for i := range uint64(3) {
				p.request(wire.CmdWrite, 0, 10+i, 0, 4)
				p.send("'abcd")
				p.simple(10+i, wire.ESHUTDOWN)
				time.Sleep(60 * time.Millisecond) // longer than the last call, all in all
			}
			if ops := log.String(); ops != "" {
				t.Errorf("before the request under way ended: %s", ops)
			}
			h.Release()
			p.simple(1, 0)
			p.expect("'x")
			p.disconnected()
			if err := <-s.ended; err != nil {
				t.Error(err)
			}
			if ops := strings.Fields(log.String()); fmt.Sprint(ops) != "[R 0+1 bytes F]" {
				t.Errorf("operations %q, want the read and one flush", ops)
			}
			if _, err := nbd.Dial(context.Background(), s.uri("x")); err == nil {
				t.Error("a connection after the end")
			}
		})
	}
}

func TestShutdownReportsFlush(t *testing.T) {
	lost := errors.New("lost")
	s := start(t, nbd.Options{}, "unix", nbd.Export{Name: "x", Device: blocktest.NewFaulty(block.NewMemory(4096), blocktest.FailKind(blocktest.Flush, lost))})
	s.stop()
	if err := <-s.ended; !errors.Is(err, lost) {
		t.Errorf("Serve returned %v", err)
	}
}

// A peer that never reads its replies can't delay the end, nor keep its own other requests' memory for ever.
func TestPeerThatNeverReads(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	const size = 32 << 20
	dev := block.MemoryFrom(blocktest.Pattern(size, 1))
	ask := func(p *peer) {
		for i := range uint64(4) {
			p.request(wire.CmdRead, 0, i, 0, size)
		}
	}
	t.Run("shutdown", func(t *testing.T) {
		s := start(t, nbd.Options{ShutdownTimeout: 50 * time.Millisecond}, "unix", nbd.Export{Name: "x", Device: dev})
		p := begin(t, s.uri("x"), false)
		ask(p)
		p.read(wire.SimpleSize) // the first reply is on its way
		s.stop()
		select {
		case <-s.ended:
		case <-time.After(10 * time.Second):
			t.Fatal("the server does not end")
		}
	})
	t.Run("stall", func(t *testing.T) {
		s := start(t, nbd.Options{StallTimeout: 3 * time.Second}, "unix", nbd.Export{Name: "x", Device: dev})
		p := begin(t, s.uri("x"), false)
		ask(p)
		wait(t, "the peer is given up", func() bool { c, _ := s.Counters("x"); return c.Connections == 0 && c.InFlight == 0 })
		// A slow one is not, as long as it goes on.
		p = begin(t, s.uri("x"), false)
		p.request(wire.CmdRead, 0, 1, 0, size)
		p.simple(1, 0)
		for range size >> 20 {
			p.read(1 << 20)
			time.Sleep(120 * time.Millisecond) // 3.8 s in all
		}
		p.inSync()
	})
}

// Peers that stop, or vanish, in the middle of a message are given up, and nobody else notices.
func TestPeerThatStops(t *testing.T) {
	dev := block.MemoryFrom(blocktest.Pattern(1<<20, 1))
	s := start(t, nbd.Options{StallTimeout: 50 * time.Millisecond}, "tcp", nbd.Export{Name: "x", Device: dev})
	other := begin(t, s.uri("x"), false)
	for _, vanish := range []bool{false, true} {
		for _, part := range []string{"25609513 0000 0001 0000000000000001 0000000000000000 00001000", "25609513 0000 0001 0000000000000001 0000000000000000 00001000 4095*ff"} {
			p := begin(t, s.uri("x"), false)
			p.send(part)
			if vanish {
				p.nc.(*net.TCPConn).SetLinger(0)
				p.nc.Close()
			} else {
				p.disconnected()
			}
		}
		other.inSync()
	}
	p := begin(t, s.uri("x"), false)
	p.send("25609513 0000")
	p.nc.Close()
	wait(t, "connections are gone", func() bool { c, _ := s.Counters("x"); return c.Connections == 1 && c.InFlight == 0 })
	if !bytes.Equal(dev.Bytes(), blocktest.Pattern(1<<20, 1)) {
		t.Error("half a write was written")
	}
	other.inSync()
}

func TestIdleTimeout(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	dev := blocktest.NewFaulty(block.NewMemory(4096), nil)
	s := start(t, nbd.Options{IdleTimeout: 300 * time.Millisecond}, "unix", nbd.Export{Name: "x", Device: dev})
	begin(t, s.uri("x"), false).disconnected()
	// Who waits for an answer is not idle.
	p := begin(t, s.uri("x"), false)
	h := dev.Hold(ofKind(blocktest.Flush))
	defer h.Release()
	p.request(wire.CmdFlush, 0, 1, 0, 0)
	<-h.Reached()
	time.Sleep(900 * time.Millisecond)
	h.Release()
	p.simple(1, 0)
	p.disconnected()
}

func TestMaxConnections(t *testing.T) {
	s := start(t, nbd.Options{MaxConnections: 2}, "unix", nbd.Export{Name: "x", Device: block.NewMemory(4096)})
	a, b := dial(t, s.uri("x")), dial(t, s.uri("x"))
	if _, err := nbd.Dial(context.Background(), s.uri("x")); err == nil {
		t.Fatal("a third connection")
	}
	a.Close()
	wait(t, "another is let in", func() bool {
		c, err := nbd.Dial(context.Background(), s.uri("x"))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	if err := b.Flush(); err != nil {
		t.Error(err)
	}
}

// Exports come and go while others are served.
func TestRemove(t *testing.T) {
	dev := blocktest.NewFaulty(block.NewMemory(4096), nil)
	s := start(t, nbd.Options{}, "unix", nbd.Export{Name: "x", Device: dev}, nbd.Export{Name: "other", Device: block.NewMemory(4096)})
	s.SetDefault("x")
	p, idle, other := begin(t, s.uri("x"), false), begin(t, s.uri("x"), false), dial(t, s.uri("other"))
	h := dev.Hold(ofKind(blocktest.Flush))
	defer h.Release()
	p.request(wire.CmdFlush, 0, 1, 0, 0)
	<-h.Reached()

	soon, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := s.Remove(soon, "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("remove with a request under way: %v", err)
	}
	for _, name := range []string{"x", ""} {
		if _, err := nbd.Dial(context.Background(), s.uri(name)); err == nil || !strings.Contains(err.Error(), "no such export") {
			t.Errorf("connection to a removed export: %v", err)
		}
	}
	p.request(wire.CmdFlush, 0, 2, 0, 0)
	p.simple(2, wire.ESHUTDOWN)
	idle.disconnected()
	// The name is free at once, and the old connection has nothing to do with the new export.
	if err := s.Add(nbd.Export{Name: "x", Device: block.NewMemory(8192)}); err != nil {
		t.Fatal(err)
	}
	if c := dial(t, s.uri("")); c.Size() != 8192 {
		t.Errorf("size %d", c.Size())
	}
	h.Release()
	p.simple(1, 0)
	p.disconnected()
	if err := other.Flush(); err != nil {
		t.Errorf("the other export: %v", err)
	}
	if err := s.Remove(context.Background(), "x"); err != nil {
		t.Error(err)
	}
	if err := s.Remove(context.Background(), "x"); err == nil {
		t.Error("removed twice")
	}
}

// Once Remove has returned nothing uses the device, whatever clients do.
func TestRemoveUnderLoad(t *testing.T) {
	s := start(t, nbd.Options{}, "unix")
	for range 20 {
		dev := &closable{Memory: block.NewMemory(1 << 20), t: t}
		if err := s.Add(nbd.Export{Name: "x", Device: dev}); err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for range 2 {
			c := dial(t, s.uri("x"))
			for range 4 {
				all.Go(func() {
					b := make([]byte, 4096)
					for {
						_, err := c.WriteAt(b, 0)
						if err != nil {
							if !errors.Is(err, fs.ErrClosed) && !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "broken pipe") && !strings.Contains(err.Error(), "reset") {
								t.Error(err)
							}
							return
						}
					}
				})
			}
		}
		wait(t, "writes", func() bool { c, _ := s.Counters("x"); return c.Writes > 20 })
		if err := s.Remove(context.Background(), "x"); err != nil {
			t.Fatal(err)
		}
		dev.mu.Lock()
		dev.closed = true
		dev.mu.Unlock()
		all.Wait()
	}
}

// closable is a device that may not be used any more once closed is set.
type closable struct {
	*block.Memory // the clients here send plain writes
	t             *testing.T
	mu            sync.RWMutex
	closed        bool
}

func (c *closable) WriteAt(p []byte, off int64) (int, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.closed {
		c.t.Error("write after Remove")
	}
	return c.Memory.WriteAt(p, off)
}

func TestThousandsOfExports(t *testing.T) {
	const n = 5000
	s := start(t, nbd.Options{}, "unix")
	for i := range n {
		if err := s.Add(nbd.Export{Name: fmt.Sprintf("export-%04d", i), Device: block.NewMemory(int64(i) * 512)}); err != nil {
			t.Fatal(err)
		}
	}
	p := connect(t, s.uri(""))
	p.send("00000003")
	p.option(wire.OptList, nil)
	for i := range n {
		if name, err := wire.DecodeServer(p.skipAnswer(wire.RepServer)); err != nil || name != fmt.Sprintf("export-%04d", i) {
			t.Fatal(name, err)
		}
	}
	p.answer(wire.OptList, wire.RepAck, "")
	if c := dial(t, s.uri("export-4321")); c.Size() != 4321*512 {
		t.Errorf("size %d", c.Size())
	}
}

func TestCounters(t *testing.T) {
	s, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.NewMemory(1 << 20), CanTrim: true})
	c := dial(t, uri("x"))
	b := make([]byte, 1000)
	c.ReadAt(b, 0)
	c.WriteAt(b, 0)
	c.WriteDurableAt(b, 0)
	c.ZeroAt(0, 4000, 0)
	c.Discard(0, 512)
	c.Flush()
	c.ZeroAt(0, 1, block.KeepAllocated|block.OnlyFast) // an error
	got, ok := s.Counters("x")
	for ; ok && got.InFlight > 0; got, ok = s.Counters("x") { // a request counts until its reply has left
		time.Sleep(time.Millisecond)
	}
	if want := (nbd.Counters{Connections: 1, Reads: 1, ReadBytes: 1000, Writes: 5, WrittenBytes: 6001, Flushes: 1, Errors: 1}); got != want || !ok {
		t.Errorf("%+v, want %+v", got, want)
	}
	if _, ok := s.Counters("y"); ok {
		t.Error("counters of nothing")
	}
}

// Payloads of all connections share a budget: those that don't fit wait, small ones never do, and all get
// through.
func TestPayloadsAreBounded(t *testing.T) {
	const size = 16 << 20
	dev := blocktest.NewFaulty(block.NewMemory(size), nil)
	s := start(t, nbd.Options{MaxPayloads: 1, ShutdownTimeout: time.Second}, "unix", nbd.Export{Name: "x", Device: dev}) // 128 MiB, the least
	var holds []*blocktest.Hold
	var peers []*peer
	for i := range 5 {
		p := begin(t, s.uri("x"), true)
		h := dev.Hold(ofKind(blocktest.Read))
		defer h.Release()
		p.request(wire.CmdRead, wire.FlagDF, 1, 0, size)
		if i < 3 {
			<-h.Reached()
		}
		peers, holds = append(peers, p), append(holds, h)
	}
	small := begin(t, s.uri("x"), false)
	small.request(wire.CmdWrite, 0, 1, 0, 64<<10)
	small.write(make([]byte, 64<<10))
	small.simple(1, 0)
	select {
	case <-holds[3].Reached():
		t.Error("a fourth payload was let in: it would leave less than the connection has itself")
	default:
	}
	for _, h := range holds {
		h.Release()
	}
	for _, p := range peers {
		if got := p.chunk(1, wire.ChunkDone, wire.ChunkOffsetData); len(got) != 8+size {
			t.Errorf("%d bytes", len(got))
		}
	}
	// One that waits can be dropped.
	holds = nil
	for _, p := range peers[:3] {
		h := dev.Hold(ofKind(blocktest.Read))
		defer h.Release()
		p.request(wire.CmdRead, wire.FlagDF, 1, 0, size)
		<-h.Reached()
		holds = append(holds, h)
	}
	peers[3].request(wire.CmdRead, 0, 2, 0, size)
	s.stop()
	peers[3].errorChunk(2, wire.ESHUTDOWN)
	peers[3].disconnected()
	for i, h := range holds {
		peers[i].nc.Close()
		h.Release()
	}
	<-s.ended
}

// Goroutines end with their connections.
func TestGoroutinesEnd(t *testing.T) {
	before := runtime.NumGoroutine()
	s := start(t, nbd.Options{}, "unix", nbd.Export{Name: "x", Device: block.NewMemory(4096)})
	for range 20 {
		c, err := nbd.Dial(context.Background(), s.uri("x"))
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for range 16 {
			all.Go(func() { c.Flush() })
		}
		all.Wait()
		c.Close()
		connect(t, s.uri("x")).nc.Close()
	}
	s.stop()
	<-s.ended
	wait(t, "goroutines end", func() bool { return runtime.NumGoroutine() <= before })
}
