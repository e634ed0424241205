package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// A fullDevice has no space for what is written below byte full until space is made; its error is a block.RetryLater.
type fullDevice struct {
	*block.Memory

	mu      sync.Mutex
	full    int64
	changed chan struct{}
	written [][]byte // below full, in order
}

func newFullDevice(size, full int64) *fullDevice {
	return &fullDevice{Memory: block.NewMemory(size), full: full, changed: make(chan struct{})}
}

// noRoomYet is a block.RetryLater.
type noRoomYet struct {
	error
	changed chan struct{}
}

func (e noRoomYet) Retry() <-chan struct{} { return e.changed }
func (e noRoomYet) Unwrap() error          { return e.error }

func (d *fullDevice) room(off int64) error {
	select {
	case <-d.changed:
		return nil
	default:
	}
	if off < d.full {
		return noRoomYet{syscall.ENOSPC, d.changed}
	}
	return nil
}

func (d *fullDevice) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.room(off); err != nil {
		return 0, err
	}
	if off < d.full {
		d.written = append(d.written, bytes.Clone(p))
	}
	return d.Memory.WriteAt(p, off)
}

func (d *fullDevice) WriteDurableAt(p []byte, off int64) error {
	_, err := d.WriteAt(p, off)
	return err
}

func (d *fullDevice) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.room(off); err != nil {
		return err
	}
	return d.Memory.ZeroAt(off, n, flags)
}

func (d *fullDevice) makeRoom() { close(d.changed) }

// content returns what was written below full.
func (d *fullDevice) content() [][]byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.written
}

func waitingIs(s *nbd.Server, n int64) func() bool {
	return func() bool { c, _ := s.Counters("x"); return c.Waiting == n }
}

// TestWaitingGoesOn: every change waits for space, with FUA too, and is answered when there is some; others of the same
// connection go on meanwhile.
func TestWaitingGoesOn(t *testing.T) {
	dev := newFullDevice(1<<20, 64<<10)
	s := start(t, nbd.Options{}, "unix", nbd.Export{Name: "x", Device: dev, CanTrim: true})
	p := begin(t, s.uri("x"), false)
	p.request(wire.CmdWrite, 0, 1, 0, 4096)
	p.write(bytes.Repeat([]byte{1}, 4096))
	p.request(wire.CmdWrite, wire.FlagFUA, 2, 4096, 4096)
	p.write(bytes.Repeat([]byte{2}, 4096))
	p.request(wire.CmdWriteZeroes, 0, 3, 8192, 4096)
	wait(t, "three wait", waitingIs(s.Server, 3))
	p.request(wire.CmdWrite, 0, 4, 64<<10, 4096)
	p.write(make([]byte, 4096))
	p.simple(4, 0)
	p.inSync()
	dev.makeRoom()
	for range 3 {
		p.anySimple()
	}
	if c, _ := s.Counters("x"); c.Waiting != 0 || c.Writes != 4 || c.Errors != 0 {
		t.Errorf("%+v", c)
	}
}

// TestDeadConnectionWritesNothing: what waited for space when its client went away is not written, although room is made
// at that very moment, and so is nothing that lay in the socket behind it. The client has connected again and written
// the same place.
func TestDeadConnectionWritesNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for _, network := range []string{"unix", "tcp"} {
		for _, n := range []int{1, 70} { // 70: no worker is left to read, and to see the end of the stream
			for _, disc := range []bool{false, true} {
				dev := newFullDevice(1<<20, 512<<10)
				s := start(t, nbd.Options{}, network, nbd.Export{Name: "x", Device: dev})
				old := begin(t, s.uri("x"), false)
				for i := range n {
					old.request(wire.CmdWrite, 0, uint64(i), uint64(i)*4096, 4096)
					old.write(bytes.Repeat([]byte{1}, 4096))
				}
				wait(t, "all wait", waitingIs(s.Server, int64(min(n, 64))))
				if disc {
					old.request(wire.CmdDisconnect, 0, 99, 0, 0)
				}
				old.nc.Close()
				if network == "tcp" {
					wait(t, "the end arrives", waitingIs(s.Server, 0)) // not at once, as with a local socket
				}
				dev.makeRoom()
				again := begin(t, s.uri("x"), false)
				again.request(wire.CmdWrite, 0, 1, 0, 4096)
				again.write(bytes.Repeat([]byte{2}, 4096))
				again.simple(1, 0)
				wait(t, "the old connection ends", func() bool { c, _ := s.Counters("x"); return c.Connections == 1 && c.InFlight == 0 })
				if got := dev.content(); len(got) != 1 || got[0][0] != 2 {
					t.Errorf("%s, %d writes of the dead connection, disconnect %v: %d writes were made, the last of %d", network, n, disc, len(got), got[len(got)-1][0])
				}
			}
		}
	}
}

// TestWaitingIsAnswered: a client that disconnects in order, a removed export and a server that ends answer with
// ESHUTDOWN what waits.
func TestWaitingIsAnswered(t *testing.T) {
	for how, end := range map[string]func(s *serving, p *peer){
		"disconnect": func(s *serving, p *peer) { p.request(wire.CmdDisconnect, 0, 9, 0, 0) },
		"remove": func(s *serving, p *peer) {
			if err := s.Remove(context.Background(), "x"); err != nil {
				t.Error(err)
			}
		},
		"shutdown": func(s *serving, p *peer) { s.stop() },
	} {
		t.Run(how, func(t *testing.T) {
			dev := newFullDevice(1<<20, 64<<10)
			s := start(t, nbd.Options{}, "unix", nbd.Export{Name: "x", Device: dev})
			p := begin(t, s.uri("x"), false)
			p.request(wire.CmdWrite, 0, 1, 0, 4096)
			p.write(bytes.Repeat([]byte{1}, 4096))
			wait(t, "it waits", waitingIs(s.Server, 1))
			began := time.Now()
			go end(s, p)
			p.simple(1, wire.ESHUTDOWN)
			p.disconnected()
			if took := time.Since(began); took > 4*time.Second {
				t.Errorf("it took %v", took)
			}
			if got := dev.content(); len(got) > 0 {
				t.Error("it was written all the same")
			}
		})
	}
}

// TestWaitingPayloadsLeaveAShare: clients whose long writes wait take no more than a part of the memory for payloads.
// Long requests of others go on, on the same export and on another; and clients that are gone give their part back.
func TestWaitingPayloadsLeaveAShare(t *testing.T) {
	const long, size = 32 << 20, 64 << 20
	dev := newFullDevice(size, long)
	s := start(t, nbd.Options{MaxPayloads: 1}, "unix", nbd.Export{Name: "x", Device: dev}, nbd.Export{Name: "other", Device: block.NewMemory(size)})
	var hogs []*peer
	var writers sync.WaitGroup
	for range 6 {
		p := begin(t, s.uri("x"), false)
		hogs = append(hogs, p)
		writers.Go(func() { // most of it stays in the socket
			for cookie := range uint64(2) {
				b := wire.Request{Magic: wire.MagicRequest, Command: wire.CmdWrite, Cookie: cookie, Length: long}.Append(nil)
				p.nc.SetDeadline(time.Now().Add(time.Minute))
				if _, err := p.nc.Write(append(b, make([]byte, long)...)); err != nil {
					return
				}
			}
		})
	}
	wait(t, "one waits for space", waitingIs(s.Server, 1))
	good := func() {
		t.Helper()
		for _, name := range []string{"x", "other"} {
			p := begin(t, s.uri(name), false)
			p.request(wire.CmdWrite, 0, 1, long, 1<<20)
			p.write(make([]byte, 1<<20))
			p.simple(1, 0)
			p.request(wire.CmdRead, 0, 2, 0, 1<<20)
			p.simple(2, 0)
			p.read(1 << 20)
			p.nc.Close()
		}
	}
	good()
	for _, p := range hogs {
		p.nc.Close()
	}
	writers.Wait()
	wait(t, "closed connections have nothing", func() bool { c, _ := s.Counters("x"); return c.Connections == 0 && c.InFlight == 0 && c.Waiting == 0 })
	good()
	p := begin(t, s.uri("x"), false)
	dev.makeRoom()
	p.request(wire.CmdWrite, 0, 1, 0, long)
	p.write(make([]byte, long))
	p.simple(1, 0)
	if got := dev.content(); len(got) != 1 {
		t.Errorf("%d writes were made, want the one of the connection that is open", len(got))
	}
}

// Without a channel there is nothing to wait for.
func TestNothingToWaitFor(t *testing.T) {
	if ch := block.CanRetry(errors.Join(noRoomYet{syscall.ENOSPC, nil})); ch != nil {
		t.Error("a channel")
	}
}
