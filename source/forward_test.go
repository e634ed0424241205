package source

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/nbd"
)

// TestPassesOn: a disk passes on what the device below it can do.
func TestPassesOn(t *testing.T) {
	blocktest.RunForward(t, func(_ *testing.T, dev block.Device) block.Device { return &Disk{Forward: block.NewForward(dev)} })
}

// TestExportPassesOn: an export passes on what reads and the protocol has a request for, and refuses every change.
func TestExportPassesOn(t *testing.T) {
	blocktest.RunForward(t, func(t *testing.T, dev block.Device) block.Device {
		s := nbd.NewServer(nbd.Options{})
		if err := s.Add(nbd.Export{Name: "x", Device: dev}); err != nil {
			t.Fatal(err)
		}
		socket := filepath.Join(testhost.ShortDir(t), "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- s.Serve(ctx, l) }()
		e, err := OpenExport("nbd+unix:///x?socket="+socket, NBDOptions{Reconnect: time.Second})
		t.Cleanup(func() {
			if err == nil {
				err = e.Close()
			}
			if cancel(); err != nil {
				t.Error(err)
			}
			<-served
		})
		if err != nil {
			t.Fatal(err)
		}
		return e
	}, "WriteAt", "WriteDurableAt", "WriteLastAt", "ZeroAt", "Allocate", "Discard", "Flush", "Grow", "CanGrow", // it is only read
		"ReadCached", "BeginFlush", "BeginRead", "DropCache", "Refresh", "BlockSize", "Identity") // no request of the protocol
}
