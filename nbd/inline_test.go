package nbd_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// After many quick requests the next ones are carried out by the worker that reads them. One of those that the
// device delays then still delays nobody: neither the replies of those before it that came with it, nor
// those behind it. Afterwards requests of its kind are not trusted, and more of them may be delayed at once.
func TestInlineRequestThatBlocks(t *testing.T) {
	for _, k := range []blocktest.Kind{blocktest.Read, blocktest.Write} {
		t.Run(fmt.Sprint(k), func(t *testing.T) {
			dev := blocktest.NewFaulty(block.MemoryFrom([]byte(strings.Repeat("x", 4096))), nil)
			_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: dev})
			p := begin(t, uri("x"), false)
			one := func(cookie uint64) []byte {
				r := wire.Request{Magic: wire.MagicRequest, Command: wire.CmdRead, Cookie: cookie, Length: 1}
				if k == blocktest.Write {
					r.Command, r.Offset = wire.CmdWrite, 512
					return append(r.Append(nil), 0xff)
				}
				return r.Append(nil)
			}
			answered := func() (cookie uint64) {
				t.Helper()
				cookie = p.anySimple()
				if k == blocktest.Read {
					p.expect("'x")
				}
				return cookie
			}
			for i := range uint64(1000) {
				p.write(one(i))
				answered()
			}
			// Four that come in one piece, of which the fourth is delayed, and one more. (Where the machine was
			// slow a moment ago they may be carried out in any order.)
			seen := 0
			hold := dev.Hold(func(op blocktest.Op) bool {
				if op.Kind == k {
					seen++
				}
				return op.Kind == k && seen == 4
			})
			defer hold.Release()
			var four []byte
			left := map[uint64]bool{}
			for i := range uint64(5) {
				left[2000+i] = true
				if i < 4 {
					four = append(four, one(2000+i)...)
				}
			}
			p.write(four)
			<-hold.Reached()
			for range 3 {
				delete(left, answered())
			}
			p.write(one(2004))
			delete(left, answered())
			// It was slow, once it has ended: so 63 others may be.
			hold.Release()
			if last := answered(); !left[last] || len(left) != 1 {
				t.Fatalf("reply to %d, left are %v", last, left)
			}
			for i := range uint64(63) {
				h := dev.Hold(ofKind(k))
				defer h.Release()
				p.write(one(3000 + i))
				<-h.Reached()
			}
			p.request(wire.CmdCache, 0, 4000, 0, 1)
			p.simple(4000, 0)
		})
	}
}

// Replies come whatever mixture of short and long requests is sent in pieces of any length, in one connection.
func TestManyInOnePiece(t *testing.T) {
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.MemoryFrom(blocktest.Pattern(1<<20, 1))})
	p := begin(t, uri("x"), false)
	for round := range 200 {
		var out []byte
		want := map[uint64]uint32{} // length of the data of the reply with a cookie
		for i := range uint64(40) {
			cookie := uint64(round)*100 + i
			r := wire.Request{Magic: wire.MagicRequest, Command: wire.CmdRead, Cookie: cookie, Length: uint32(1 + i*97%8000)}
			switch (uint64(round) + i) % 7 {
			case 0:
				r.Length = 100_000
			case 1, 2:
				r.Command = wire.CmdWrite
			case 3:
				r.Command, r.Length = wire.CmdFlush, 0
			}
			out = r.Append(out)
			switch r.Command {
			case wire.CmdRead:
				want[cookie] = r.Length
			case wire.CmdWrite:
				out = append(out, blocktest.Pattern(int(r.Length), cookie)...)
				want[cookie] = 0
			default:
				want[cookie] = 0
			}
		}
		cut := len(out) * (round%5 + 1) / 6 // so that a request may come in two parts
		go func() {
			p.nc.Write(out[:cut])
			p.nc.Write(out[cut:])
		}()
		for len(want) > 0 {
			cookie := p.anySimple()
			n, ok := want[cookie]
			if !ok {
				t.Fatalf("round %d: a reply to %d, which nobody waits for", round, cookie)
			}
			delete(want, cookie)
			p.read(int(n))
		}
	}
}
