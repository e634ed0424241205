package nbd_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// begin speaks just enough of the handshake to reach the transmission with simple replies.
func begin(t testing.TB, uri string) net.Conn {
	t.Helper()
	u, err := nbd.ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	nc, err := net.Dial(u.Network, u.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	b := []byte{0, 0, 0, wire.FlagFixedNewstyle | wire.FlagNoZeroes}
	b = wire.OptionHeader{Magic: wire.MagicOption, Option: wire.OptExportName, Length: uint32(len(u.Export))}.Append(b)
	nc.Write(append(b, u.Export...))
	if _, err := io.ReadFull(nc, make([]byte, 18+10)); err != nil {
		t.Fatal(err)
	}
	return nc
}

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
				nc := begin(b, uri("x"))
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
