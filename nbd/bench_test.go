package nbd_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// BenchmarkServer sends requests of 4 KiB in batches of a depth, from a client that does next to nothing. Its
// allocations are the server's.
func BenchmarkServer(b *testing.B) {
	const size, length = 64 << 20, 4096
	for _, cmd := range []wire.Command{wire.CmdRead, wire.CmdWrite} {
		for _, depth := range []int{1, 32} {
			name := strings.Fields("read write")[cmd]
			b.Run(fmt.Sprintf("%s/depth=%d", name, depth), func(b *testing.B) {
				mem := block.NewMemory(size)
				for off := int64(0); off < size; off += 1 << 20 {
					mem.WriteAt(make([]byte, 1<<20), off)
				}
				_, uri := serve(b, nbd.Options{}, nbd.Export{Name: "x", Device: mem})
				nc := begin(b, uri("x"), false).nc
				nc.SetDeadline(time.Time{})
				out, in := make([]byte, 0, depth*(wire.RequestSize+length)), make([]byte, depth*(wire.SimpleSize+length))
				payload := make([]byte, length)
				each := wire.SimpleSize + length
				if cmd == wire.CmdWrite {
					each = wire.SimpleSize
				}
				b.SetBytes(length)
				b.ReportAllocs()
				b.ResetTimer()
				for n := 0; n < b.N; n += depth {
					out = out[:0]
					for i := range depth {
						r := wire.Request{Magic: wire.MagicRequest, Command: cmd, Cookie: uint64(i), Offset: uint64(rand.IntN(size/length)) * length, Length: length}
						out = r.Append(out)
						if cmd == wire.CmdWrite {
							out = append(out, payload...)
						}
					}
					if _, err := nc.Write(out); err != nil {
						b.Fatal(err)
					}
					if _, err := io.ReadFull(nc, in[:depth*each]); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
