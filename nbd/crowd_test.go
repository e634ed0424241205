package nbd_test

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// Two thousand peers that misbehave, each in one of these ways, and stay. One that behaves is served meanwhile, and
// what the server holds for the others is what docs/nbd.md says at most: 4 MiB of short payloads, since that is
// all they ask for, and in the mean far less.
func TestCrowd(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	const size = 1 << 20
	dev := block.MemoryFrom(blocktest.Pattern(size, 1))
	s := start(t, nbd.Options{ShutdownTimeout: 50 * time.Millisecond}, "unix", nbd.Export{Name: "x", Device: dev})
	good := begin(t, s.uri("x"), false)

	ways := []func() *peer{
		func() *peer { return connect(t, s.uri("x")) }, // sends nothing
		func() *peer { // stops in the handshake
			p := connect(t, s.uri("x"))
			p.send("00000003 IHAVEOPT 0000")
			return p
		},
		func() *peer { // asks for the list again and again, and takes no answer
			p := connect(t, s.uri("x"))
			p.send("00000003")
			for range 200 {
				p.option(wire.OptList, nil)
			}
			return p
		},
		func() *peer { // stops in a request's header
			p := begin(t, s.uri("x"), false)
			p.send("25609513 0000")
			return p
		},
		func() *peer { // owes a payload of 32 MiB, behind the end
			p := begin(t, s.uri("x"), false)
			p.request(wire.CmdWrite, 0, 1, 0, 32<<20)
			return p
		},
		func() *peer { // owes the end of a payload
			p := begin(t, s.uri("x"), false)
			p.request(wire.CmdWrite, 0, 1, 0, 4096)
			p.send("4095*ff")
			return p
		},
		func() *peer { // takes no replies
			p := begin(t, s.uri("x"), true)
			for i := range uint64(100) {
				p.request(wire.CmdRead, 0, i, 4096*i, 4096)
			}
			return p
		},
		func() *peer { // writes one place many times at once, and takes no replies
			p := begin(t, s.uri("x"), false)
			for i := range uint64(20) {
				p.request(wire.CmdWrite, 0, i, 512*i, 8192)
				p.write(blocktest.Pattern(8192, i))
			}
			return p
		},
		func() *peer { // vanishes with much under way
			p := begin(t, s.uri("x"), false)
			for i := range uint64(50) {
				p.request(wire.CmdRead, 0, i, 0, 64<<10)
			}
			p.nc.Close()
			return p
		},
	}
	peers := 2000
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil && files.Cur < uint64(2*peers+100) {
		peers = int(files.Cur/2) - 50
		t.Logf("%d peers: no more files may be open here", peers)
	}
	before := heap()
	var crowd []*peer
	for i := range peers {
		crowd = append(crowd, ways[i%len(ways)]())
		if i%10 == 0 { // the good one's data is its own: the second half of the disk
			off := uint64(size/2 + i*256)
			good.request(wire.CmdWrite, 0, uint64(i), off, 256)
			good.write(blocktest.Pattern(256, uint64(i)))
			good.simple(uint64(i), 0)
			good.request(wire.CmdRead, 0, uint64(i)+1, off, 256)
			good.simple(uint64(i)+1, 0)
			if got := good.read(256); string(got) != string(blocktest.Pattern(256, uint64(i))) {
				t.Fatalf("after %d peers the good one read something else", i)
			}
		}
	}
	perPeer := (int64(heap()) - int64(before)) / int64(peers)
	t.Logf("%d bytes for each of %d peers, the test's own share included", perPeer, peers)
	if perPeer > 512<<10 {
		t.Errorf("%d bytes for each of %d peers", perPeer, peers)
	}
	for _, p := range crowd {
		p.nc.Close()
	}
	wait(t, "the crowd is gone", func() bool { c, _ := s.Counters("x"); return c.Connections == 1 && c.InFlight == 0 })
	good.inSync()
}

// heap is how many bytes are reachable.
func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}
