package nbd_test

import (
	"bytes"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

const cachedSize = 1 << 20

// together serves a device, sends READs of 512 bytes at these offsets in one piece after many quick ones, and has check receive the
// replies. It does so until the READs were executed together: a machine that was slow a moment ago has them executed one by one.
func together(t *testing.T, cold int64, offs []uint64, check func(d *blocktest.Cold, p *peer, content []byte)) {
	one := func(cookie, off uint64) []byte {
		return wire.Request{Magic: wire.MagicRequest, Command: wire.CmdRead, Cookie: cookie, Offset: off, Length: 512}.Append(nil)
	}
	for range 100 {
		content := blocktest.Pattern(cachedSize, 4)
		d := &blocktest.Cold{Memory: block.MemoryFrom(content), From: cold, Free: make(chan struct{})}
		_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: d})
		p := begin(t, uri("x"), false)
		for i := range uint64(200) {
			p.write(one(i, 0))
			p.simple(i, 0)
			p.read(512)
		}
		var piece []byte
		for i, off := range offs {
			piece = append(piece, one(1000+uint64(i), off)...)
		}
		p.write(piece)
		check(d, p, content)
		p.nc.Close()
		if d.Together.Load() >= int64(len(offs))/2 {
			return
		}
	}
	t.Fatal("no READs were executed together")
}

// READs that arrive together are executed together, and each gets its own bytes. One that is illegal among them gets an error.
func TestReadsTogether(t *testing.T) {
	offs := make([]uint64, 50)
	for i := range offs {
		offs[i] = uint64(i) * 20_000
	}
	offs[7] = cachedSize - 100
	together(t, cachedSize, offs, func(d *blocktest.Cold, p *peer, content []byte) {
		left := map[uint64]bool{}
		for i := range offs {
			left[1000+uint64(i)] = true
		}
		for range offs {
			cookie, errno := p.anyReply()
			if !left[cookie] {
				t.Fatalf("a second reply to %d", cookie)
			}
			delete(left, cookie)
			if illegal := cookie == 1007; illegal != (errno == wire.EINVAL) || !illegal && errno != 0 {
				t.Fatalf("request %d: error %d", cookie, errno)
			} else if off := offs[cookie-1000]; !illegal && !bytes.Equal(p.read(512), content[off:off+512]) {
				t.Fatalf("other bytes at %d", off)
			}
		}
	})
}

// What is not in memory is waited for by nobody else: neither by READs that came with it, nor by later ones.
func TestReadsTogetherLeaveSlowOnes(t *testing.T) {
	offs := []uint64{0, 512, cachedSize / 2, 1024, cachedSize - 512, 2048}
	slow := map[uint64]bool{1002: true, 1004: true}
	together(t, cachedSize/2, offs, func(d *blocktest.Cold, p *peer, content []byte) {
		for range len(offs) - len(slow) {
			cookie := p.anySimple()
			if off := offs[cookie-1000]; slow[cookie] || !bytes.Equal(p.read(512), content[off:off+512]) {
				t.Fatalf("reply to %d, with other bytes or too early", cookie)
			}
		}
		p.request(wire.CmdCache, 0, 5000, 0, 1)
		p.simple(5000, 0)
		close(d.Free)
		for range slow {
			cookie := p.anySimple()
			if off := offs[cookie-1000]; !slow[cookie] || !bytes.Equal(p.read(512), content[off:off+512]) {
				t.Fatalf("reply to %d, or with other bytes", cookie)
			}
		}
		if d.Waiting.Load() != int64(len(slow)) {
			t.Errorf("%d reads had to wait", d.Waiting.Load())
		}
	})
}
