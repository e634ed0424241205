package nbd_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// Whole conversations, byte by byte. The export is 64 KiB long: 4 KiB of 0x11, a hole, at 32 KiB 4 KiB of
// 0x22, and a hole.
func TestRequestsByHand(t *testing.T) {
	const (
		ok    = "67446698 00000000 "
		req   = "25609513 0000 "
		first = "0000000000000001 "
	)
	simple := func(errno string) string { return "67446698 000000" + errno + " " + first }
	for _, c := range []struct {
		name           string
		structured     bool
		client, server string
	}{
		{"READ", false, req + "0000 " + first + "0000000000000ffe 00000004", ok + first + "1111 0000"},
		{"READ, FUA is ignored", false, "25609513 0001 0000 " + first + "0000000000000000 00000002", ok + first + "1111"},
		{"READ, structured", true, req + "0000 " + first + "0000000000000ffe 00000004",
			"668e33ef 0001 0001 " + first + "0000000c 0000000000000ffe 1111 0000"},
		{"READ, a hole", true, req + "0000 " + first + "0000000000001000 00001000",
			"668e33ef 0001 0002 " + first + "0000000c 0000000000001000 00001000"},
		{"READ, a hole, DF", true, "25609513 0004 0000 " + first + "0000000000001000 00000010",
			"668e33ef 0001 0001 " + first + "00000018 0000000000001000 16*00"},
		{"WRITE", false, req + "0001 " + first + "0000000000000000 00000002 7788", ok + first},
		{"WRITE, structured", true, req + "0001 " + first + "0000000000000000 00000002 7788", ok + first},
		{"WRITE, FUA", false, "25609513 0001 0001 " + first + "0000000000000000 00000002 7788", ok + first},
		{"FLUSH", true, req + "0003 " + first + "0000000000000000 00000000", ok + first},
		{"TRIM, FUA", true, "25609513 0001 0004 " + first + "0000000000000000 00010000", ok + first},
		{"CACHE", true, req + "0005 " + first + "0000000000000000 00010000", ok + first},
		{"WRITE_ZEROES", true, req + "0006 " + first + "0000000000000000 00010000", ok + first},
		{"WRITE_ZEROES, all flags", true, "25609513 0013 0006 " + first + "0000000000000000 00001000", simple("5f")}, // a hole must not appear, and memory knows no other fast way
		{"WRITE_ZEROES, fast", true, "25609513 0010 0006 " + first + "0000000000000000 00001000", ok + first},
		{"BLOCK_STATUS", true, req + "0007 " + first + "0000000000000800 0000f000",
			"668e33ef 0000 0005 " + first + "00000024 00000001 00000800 00000000 00007000 00000003 00001000 00000000 00006800 00000003" +
				" 668e33ef 0001 0005 " + first + "0000000c 00000002 0000f000 00000001"},
		{"BLOCK_STATUS, REQ_ONE", true, "25609513 0008 0007 " + first + "0000000000000800 0000f000",
			"668e33ef 0000 0005 " + first + "0000000c 00000001 00000800 00000000" +
				" 668e33ef 0001 0005 " + first + "0000000c 00000002 0000f000 00000001"},

		{"unknown command", false, req + "0009 " + first + "0000000000000000 00000000", simple("16")},
		{"withdrawn command RESIZE", false, req + "0008 " + first + "0000000000000000 00000000", simple("16")},
		{"unknown flag", false, "25609513 0020 0003 " + first + "0000000000000000 00000000", simple("16")},
		{"DF without structured replies", false, "25609513 0004 0000 " + first + "0000000000000000 00000001", simple("16")},
		{"WRITE with DF", true, "25609513 0004 0001 " + first + "0000000000000000 00000001 ff", simple("16")},
		{"TRIM with FAST_ZERO", true, "25609513 0010 0004 " + first + "0000000000000000 00000001", simple("16")},
		{"BLOCK_STATUS without contexts", false, req + "0007 " + first + "0000000000000000 00000001", simple("16")},
		{"FLUSH of a range", false, req + "0003 " + first + "0000000000000000 00000001", simple("16")},
		{"READ of nothing", false, req + "0000 " + first + "0000000000000000 00000000", simple("16")},
		{"WRITE of nothing", false, req + "0001 " + first + "0000000000000000 00000000", simple("16")},
		{"READ past the end", false, req + "0000 " + first + "000000000000ffff 00000002", simple("16")},
		{"READ far away", false, req + "0000 " + first + "ffffffffffffffff 00000002", simple("16")},
		{"READ too long", false, req + "0000 " + first + "0000000000000000 02000001", simple("16")},
		{"READ of 4 GiB", false, req + "0000 " + first + "0000000000000000 ffffffff", simple("16")},
		{"WRITE past the end", false, req + "0001 " + first + "000000000000ffff 00000002 ffff", simple("1c")},
		{"WRITE_ZEROES past the end", false, req + "0006 " + first + "0000000000008000 00008001", simple("1c")},
		{"TRIM past the end", false, req + "0004 " + first + "0000000000008000 00008001", simple("16")},
		{"CACHE past the end", false, req + "0005 " + first + "0000000000008000 00008001", simple("16")},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem := block.NewMemory(64 << 10)
			mem.WriteAt(bytes.Repeat([]byte{0x11}, 4096), 0)
			mem.WriteAt(bytes.Repeat([]byte{0x22}, 4096), 32<<10)
			_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: mem, CanTrim: true, Contexts: map[string]nbd.ContextFunc{
				"x:y": func(off, n int64) ([]block.Extent, error) { // answers in pieces, and more than was asked
					return []block.Extent{{Length: min(n, 100), Flags: 1}, {Length: 1 << 40, Flags: 1}}, nil
				}}})
			contexts := []string{"base:allocation", "x:y"}
			if !c.structured {
				contexts = nil
			}
			p := begin(t, uri("x"), c.structured, contexts...)
			before := mem.Bytes()
			p.send(c.client)
			p.expect(c.server)
			p.inSync()
			if after := mem.Bytes(); !strings.HasPrefix(c.server, ok) && !bytes.Equal(before, after) {
				t.Error("a refused request changed the device")
			} else if strings.HasPrefix(c.name, "WRITE") && strings.HasPrefix(c.server, ok) && bytes.Equal(before, after) {
				t.Error("a write changed nothing")
			}
		})
	}
}

func TestReadOnlyExport(t *testing.T) {
	mem := block.MemoryFrom(blocktest.Pattern(4096, 1))
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: mem, ReadOnly: true, CanTrim: true})
	p := begin(t, uri("x"), false)
	for i, cmd := range []wire.Command{wire.CmdWrite, wire.CmdWriteZeroes, wire.CmdTrim} {
		p.request(cmd, 0, uint64(i), 0, 2)
		if cmd == wire.CmdWrite {
			p.send("ffff")
		}
		p.simple(uint64(i), wire.EPERM)
	}
	p.inSync()
	if !bytes.Equal(mem.Bytes(), blocktest.Pattern(4096, 1)) {
		t.Error("the device has changed")
	}
}

func TestTrimMustBeOffered(t *testing.T) {
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.NewMemory(4096)})
	p := begin(t, uri("x"), false)
	p.request(wire.CmdTrim, 0, 1, 0, 512)
	p.simple(1, wire.EINVAL)
}

// A long write is skipped, so that the next request is found; an absurd one isn't.
func TestWriteTooLong(t *testing.T) {
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.NewMemory(128 << 20)})
	for _, n := range []uint32{32<<20 + 1, 64 << 20} {
		p := begin(t, uri("x"), false)
		p.request(wire.CmdWrite, 0, 1, 0, n)
		p.write(make([]byte, n))
		p.simple(1, wire.EINVAL)
		p.inSync()
	}
	p := begin(t, uri("x"), false)
	p.request(wire.CmdWrite, 0, 1, 0, 64<<20+1)
	p.disconnected()
	p = begin(t, uri("x"), true)
	p.request(wire.CmdRead, wire.FlagDF, 1, 0, 32<<20+1)
	p.errorChunk(1, wire.EOVERFLOW)
	p.inSync()
}

func TestBadRequestMagicDisconnects(t *testing.T) {
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.NewMemory(4096)})
	p := begin(t, uri("x"), false)
	p.send("25609514 0000 0003 0000000000000001 0000000000000000 00000000")
	p.disconnected()
}

// A long read is answered with holes and data in order, whatever its device knows of holes.
func TestLongReadHasHoles(t *testing.T) {
	mem := block.NewMemory(1 << 20)
	mem.WriteAt(bytes.Repeat([]byte{1}, 64<<10), 128<<10)
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: mem})
	p := begin(t, uri("x"), true)
	p.request(wire.CmdRead, 0, 1, 0, 1<<20)
	for i, want := range []string{hex64(0) + hex32(128<<10), "", hex64(192<<10) + hex32(832<<10)} {
		flags := uint16(i/2) * wire.ChunkDone
		if want == "" {
			got := p.chunk(1, 0, wire.ChunkOffsetData)
			if !bytes.Equal(got[:8], message(hex64(128<<10))) || !bytes.Equal(got[8:], bytes.Repeat([]byte{1}, 64<<10)) {
				t.Error("the data is wrong")
			}
		} else if got := p.chunk(1, flags, wire.ChunkOffsetHole); !bytes.Equal(got, message(want)) {
			t.Errorf("hole %x, want %s", got, want)
		}
	}
	// Data to both ends of the range; and none of it a hole.
	for _, c := range []struct {
		off   uint64
		n     uint32
		kinds []wire.ChunkType
	}{
		{128 << 10, 192 << 10, []wire.ChunkType{wire.ChunkOffsetData, wire.ChunkOffsetHole}},
		{64 << 10, 128 << 10, []wire.ChunkType{wire.ChunkOffsetHole, wire.ChunkOffsetData}},
		{0, 128 << 10, []wire.ChunkType{wire.ChunkOffsetHole}},
	} {
		p.request(wire.CmdRead, 0, 2, c.off, c.n)
		for i, k := range c.kinds {
			flags := uint16(0)
			if i == len(c.kinds)-1 {
				flags = wire.ChunkDone
			}
			p.chunk(2, flags, k)
		}
	}
	p.request(wire.CmdRead, wire.FlagDF, 3, 0, 1<<20)
	if got := p.chunk(3, wire.ChunkDone, wire.ChunkOffsetData); !bytes.Equal(got[8:], mem.Bytes()) {
		t.Error("a read in one piece is wrong")
	}
}

// A status of more pieces than a reply can have is returned in part, and continues where it ended.
func TestBlockStatusIsBounded(t *testing.T) {
	stripes := func(off, n int64) ([]block.Extent, error) {
		var list []block.Extent
		for end := off + n; off < end; {
			x := block.Extent{Length: min(512-off%512, end-off), Flags: block.ExtentFlags(off / 512 % 2)}
			list, off = append(list, x), off+x.Length
		}
		return list, nil
	}
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.NewMemory(64 << 20), Contexts: map[string]nbd.ContextFunc{"x:stripes": stripes}})
	c := dial(t, uri("x"), "x:stripes", "x:missing")
	if got := c.Info().Contexts; fmt.Sprint(got) != "[base:allocation x:stripes]" {
		t.Errorf("contexts %q", got)
	}
	replies := 0
	for off := int64(100); off < c.Size(); replies++ {
		list, err := c.BlockStatus("x:stripes", off, c.Size()-off)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range list {
			if x.Flags != block.ExtentFlags(off/512%2) || x.Length != min(512-off%512, c.Size()-off) {
				t.Fatalf("%+v at %d", x, off)
			}
			off += x.Length
		}
	}
	if replies < 16 {
		t.Errorf("%d replies had 131072 descriptors", replies)
	}
	if _, err := c.BlockStatus("x:missing", 0, 512); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a context that the server lacks: %v", err)
	}
}

// Every error that a device can have reaches the client as a number, once, and the connection goes on. The
// text stays with the server.
func TestDeviceErrors(t *testing.T) {
	for _, c := range []struct {
		err  error
		want wire.Errno
	}{
		{syscall.EIO, wire.EIO}, {errors.New("snapshot is invalid"), wire.EIO}, {syscall.ENOSPC, wire.ENOSPC},
		{syscall.EDQUOT, wire.ENOSPC}, {syscall.EFBIG, wire.ENOSPC}, {syscall.ENOMEM, wire.ENOMEM},
		{fs.ErrClosed, wire.ESHUTDOWN}, {block.ErrReadOnly, wire.EPERM}, {fmt.Errorf("x: %w", block.ErrNotFast), wire.ENOTSUP},
		{&block.RangeError{Op: "write"}, wire.ENOSPC}, {&block.RangeError{Op: "read"}, wire.EINVAL},
	} {
		var mu sync.Mutex
		var log []string
		dev := &failing{block.NewMemory(1 << 20), c.err}
		_, uri := serve(t, nbd.Options{Log: func(s string) { mu.Lock(); log = append(log, s); mu.Unlock() }},
			nbd.Export{Name: "x", Device: dev, CanTrim: true})
		for _, structured := range []bool{false, true} {
			var contexts []string
			if structured {
				contexts = []string{"base:allocation"}
			}
			p := begin(t, uri("x"), structured, contexts...)
			for i, cmd := range []wire.Command{wire.CmdRead, wire.CmdWrite, wire.CmdFlush, wire.CmdTrim, wire.CmdWriteZeroes, wire.CmdBlockStatus} {
				n := uint32(512)
				if cmd == wire.CmdFlush {
					n = 0
				}
				p.request(cmd, 0, uint64(i), 0, n)
				switch {
				case cmd == wire.CmdWrite:
					p.write(make([]byte, n))
					p.simple(uint64(i), c.want)
				case structured && cmd == wire.CmdRead, structured && cmd == wire.CmdBlockStatus:
					p.errorChunk(uint64(i), c.want)
				case cmd == wire.CmdBlockStatus:
					p.simple(uint64(i), wire.EINVAL)
				case cmd == wire.CmdWriteZeroes && errors.Is(c.err, block.ErrNotFast):
					p.simple(uint64(i), wire.ENOTSUP) // what it writes instead fails the same way
				default:
					p.simple(uint64(i), c.want)
				}
			}
			p.request(wire.CmdCache, 0, 9, 0, 1)
			p.simple(9, 0)
		}
		mu.Lock()
		if c.want == wire.EIO && (len(log) != 6 || !strings.Contains(log[0], c.err.Error())) {
			t.Errorf("log: %q, want a line for each command that failed", log)
		}
		if all := strings.Join(log, "\n"); c.want == wire.EIO && !(strings.Contains(all, "trim of 512 bytes at byte 0") && strings.Contains(all, "write zeroes of")) {
			t.Errorf("log: %q, want the names of commands", log)
		}
		mu.Unlock()
	}
}

// failing is a device that always fails.
type failing struct {
	*block.Memory
	err error
}

func (f *failing) ReadAt([]byte, int64) (int, error)            { return 0, f.err }
func (f *failing) WriteAt([]byte, int64) (int, error)           { return 0, f.err }
func (f *failing) WriteDurableAt([]byte, int64) error           { return f.err }
func (f *failing) Flush() error                                 { return f.err }
func (f *failing) ZeroAt(int64, int64, block.ZeroFlags) error   { return f.err }
func (f *failing) Discard(int64, int64) error                   { return f.err }
func (f *failing) Extents(int64, int64) ([]block.Extent, error) { return nil, f.err }

// FUA is durable when the reply is there, for each command that changes data: what is written without it
// may be lost at a power cut, what is written with it may not.
func TestFUAIsDurable(t *testing.T) {
	for _, fua := range []bool{false, true} {
		dev := blocktest.NewCrash(blocktest.Pattern(64<<10, 1))
		_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: dev, CanTrim: true})
		p := begin(t, uri("x"), false)
		flags := wire.CommandFlags(0)
		if fua {
			flags = wire.FlagFUA
		}
		want := dev.Bytes()
		for i, cmd := range []wire.Command{wire.CmdWrite, wire.CmdWriteZeroes, wire.CmdTrim} {
			off := i * 8192
			p.request(cmd, flags, uint64(i), uint64(off), 4096)
			fill := byte(0)
			if cmd == wire.CmdWrite {
				fill = 9
				p.write(bytes.Repeat([]byte{fill}, 4096))
			}
			p.simple(uint64(i), 0)
			copy(want[off:], bytes.Repeat([]byte{fill}, 4096))
			if got := bytes.Equal(dev.Durable()[off:off+4096], dev.Bytes()[off:off+4096]); got != fua {
				t.Errorf("command %d with FUA %v: durable %v", cmd, fua, got)
			}
		}
		p.inSync() // a flush
		if !bytes.Equal(dev.Durable(), dev.Bytes()) {
			t.Error("after a flush something is not durable")
		}
		if got := dev.Bytes(); !bytes.Equal(got[:16<<10], want[:16<<10]) {
			t.Error("the content is wrong")
		}
	}
}
