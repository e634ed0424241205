package nbd_test

import (
	"errors"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// An export of Options.Open is opened for a connection, and closed when that ends, however it ends.
func TestOpenedExports(t *testing.T) {
	var opened, closed atomic.Int64
	dev := block.NewMemory(1 << 20)
	if _, err := dev.WriteAt([]byte("content"), 4096); err != nil {
		t.Fatal(err)
	}
	changed := func(off, n int64) ([]block.Extent, error) { return []block.Extent{{Length: n, Flags: 1}}, nil }
	o := nbd.Options{
		Open: func(name string) (*nbd.Export, func()) {
			if !strings.HasPrefix(name, "sealed") {
				return nil, nil
			}
			opened.Add(1)
			return &nbd.Export{Device: dev, ReadOnly: true, Contexts: map[string]nbd.ContextFunc{"x:changed": changed}}, func() { closed.Add(1) }
		},
		Authorize: func(_ nbd.ClientInfo, name string) nbd.Access {
			if name == "sealed-secret" {
				return nbd.AccessNone
			}
			return nbd.AccessWrite
		},
	}
	s := start(t, o, "unix", nbd.Export{Name: "added", Device: block.NewMemory(4096)})
	balanced := func(want int64) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); closed.Load() < want && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		if opened.Load() != want || closed.Load() != want {
			t.Fatalf("opened %d, closed %d, want %d", opened.Load(), closed.Load(), want)
		}
	}

	c, err := nbd.Dial(t.Context(), s.uri("sealed1"), "x:changed")
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Info(); !got.ReadOnly || got.Size != 1<<20 || !slices.Contains(got.Contexts, "x:changed") {
		t.Errorf("%+v", got)
	}
	b := make([]byte, 7)
	if _, err := c.ReadAt(b, 4096); err != nil || string(b) != "content" {
		t.Errorf("read %q, %v", b, err)
	}
	if _, err := c.WriteAt(b, 0); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("write: %v", err)
	}
	if list, err := c.BlockStatus("x:changed", 0, 4096); err != nil || len(list) != 1 || list[0].Flags != 1 {
		t.Errorf("status %v, %v", list, err)
	}
	if opened.Load() != 1 || closed.Load() != 0 { // by the option for contexts; GO uses the same
		t.Errorf("opened %d, closed %d while it is used", opened.Load(), closed.Load())
	}
	c.Close()
	balanced(1)

	// A client that vanishes, one that asks and does not begin, and one that asks for another export.
	p := begin(t, s.uri("sealed2"), false)
	p.nc.(*net.UnixConn).Close()
	balanced(2)
	p = connect(t, s.uri(""))
	p.send("00000003")
	for _, name := range []string{"sealed3", "sealed3", "sealed4"} {
		p.option(wire.OptInfo, wire.InfoRequest{Name: name}.Append(nil))
		p.skipAnswer(wire.RepInfo)
		p.skipAnswer(wire.RepInfo)
		p.answer(wire.OptInfo, wire.RepAck, "")
	}
	if opened.Load() != 4 || closed.Load() != 3 {
		t.Errorf("opened %d, closed %d: one connection has one open", opened.Load(), closed.Load())
	}
	p.nc.Close()
	balanced(4)

	for name, want := range map[string]string{"sealed-secret": "no right", "other": "no such export"} {
		if _, err := nbd.Dial(t.Context(), s.uri(name)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	balanced(4)
	if names := s.Names(); len(names) != 1 {
		t.Errorf("listed: %q", names)
	}
}

// MoreContexts are those of the moment of the handshake, beside Contexts.
func TestMoreContexts(t *testing.T) {
	var more atomic.Pointer[map[string]nbd.ContextFunc]
	status := func(flags block.ExtentFlags) nbd.ContextFunc {
		return func(off, n int64) ([]block.Extent, error) { return []block.Extent{{Length: n, Flags: flags}}, nil }
	}
	more.Store(&map[string]nbd.ContextFunc{})
	s := start(t, nbd.Options{}, "unix", nbd.Export{Name: "x", Device: block.NewMemory(4096),
		Contexts:     map[string]nbd.ContextFunc{"x:fixed": status(1)},
		MoreContexts: func() map[string]nbd.ContextFunc { return *more.Load() }})
	asked := []string{"x:fixed", "x:later"}
	has := func(want ...string) *nbd.Client {
		t.Helper()
		c, err := nbd.Dial(t.Context(), s.uri("x"), asked...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if got := c.Info().Contexts; !slices.Equal(got, append([]string{"base:allocation"}, want...)) {
			t.Fatalf("contexts %q, want %q", got, want)
		}
		return c
	}
	has("x:fixed")
	more.Store(&map[string]nbd.ContextFunc{"x:later": status(2), "x:fixed": status(3), "illegal": status(4), "base:allocation": status(5)})
	c := has("x:fixed", "x:later")
	more.Store(&map[string]nbd.ContextFunc{})
	for name, want := range map[string]block.ExtentFlags{"x:fixed": 1, "x:later": 2} {
		if list, err := c.BlockStatus(name, 0, 4096); err != nil || len(list) != 1 || list[0].Flags != want {
			t.Errorf("%s: %v, %v", name, list, err)
		}
	}
	has("x:fixed")
}
