package wire_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// Each message with no field zero, its bytes by hand, and read back.
func TestRoundTrips(t *testing.T) {
	for _, c := range []struct {
		name    string
		message any
		encoded []byte
		want    string
		decoded func(b []byte) any
		size    int
	}{
		{"option header", wire.OptionHeader{Magic: wire.MagicOption, Option: wire.OptGo, Length: 0x01020304},
			wire.OptionHeader{Magic: wire.MagicOption, Option: wire.OptGo, Length: 0x01020304}.Append(nil),
			"49484156454f5054 00000007 01020304", func(b []byte) any { return wire.DecodeOptionHeader(b) }, wire.OptionHeaderSize},
		{"option reply", wire.OptionReply{Magic: wire.MagicOptionReply, Option: wire.OptList, Type: wire.RepErrTooBig, Length: 0x01020304},
			wire.OptionReply{Magic: wire.MagicOptionReply, Option: wire.OptList, Type: wire.RepErrTooBig, Length: 0x01020304}.Append(nil),
			"0003e889045565a9 00000003 80000009 01020304", func(b []byte) any { return wire.DecodeOptionReply(b) }, wire.OptionReplySize},
		{"request", wire.Request{Magic: wire.MagicRequest, Flags: wire.FlagFastZero | wire.FlagFUA, Command: wire.CmdWriteZeroes, Cookie: 0x0102030405060708, Offset: 0x1112131415161718, Length: 0x21222324},
			wire.Request{Magic: wire.MagicRequest, Flags: wire.FlagFastZero | wire.FlagFUA, Command: wire.CmdWriteZeroes, Cookie: 0x0102030405060708, Offset: 0x1112131415161718, Length: 0x21222324}.Append(nil),
			"25609513 0011 0006 0102030405060708 1112131415161718 21222324", func(b []byte) any { return wire.DecodeRequest(b) }, wire.RequestSize},
		{"simple reply", wire.Simple{Magic: wire.MagicSimple, Error: wire.ESHUTDOWN, Cookie: 0x0102030405060708},
			wire.Simple{Magic: wire.MagicSimple, Error: wire.ESHUTDOWN, Cookie: 0x0102030405060708}.Append(nil),
			"67446698 0000006c 0102030405060708", func(b []byte) any { return wire.DecodeSimple(b) }, wire.SimpleSize},
		{"chunk", wire.Chunk{Magic: wire.MagicChunk, Flags: wire.ChunkDone, Type: wire.ChunkErrorOffset, Cookie: 0x0102030405060708, Length: 0x11121314},
			wire.Chunk{Magic: wire.MagicChunk, Flags: wire.ChunkDone, Type: wire.ChunkErrorOffset, Cookie: 0x0102030405060708, Length: 0x11121314}.Append(nil),
			"668e33ef 0001 8002 0102030405060708 11121314", func(b []byte) any { return wire.DecodeChunk(b) }, wire.ChunkSize},

		{"info request", wire.InfoRequest{Name: "disk", Types: []wire.InfoType{wire.InfoBlockSize, wire.InfoName}},
			wire.InfoRequest{Name: "disk", Types: []wire.InfoType{wire.InfoBlockSize, wire.InfoName}}.Append(nil),
			"00000004 6469736b 0002 0003 0001", whole(wire.DecodeInfoRequest), 0},
		{"export info", wire.ExportInfo{Size: 0x0102030405060708, Flags: wire.HasFlags | wire.SendFastZero},
			wire.ExportInfo{Size: 0x0102030405060708, Flags: wire.HasFlags | wire.SendFastZero}.Append(nil),
			"0000 0102030405060708 0801", whole(wire.DecodeExportInfo), 0},
		{"block sizes", wire.BlockSizes{Min: 1, Preferred: 0x01020304, Max: 0x11121314},
			wire.BlockSizes{Min: 1, Preferred: 0x01020304, Max: 0x11121314}.Append(nil),
			"0003 00000001 01020304 11121314", whole(wire.DecodeBlockSizes), 0},
		{"meta query", wire.MetaQuery{Export: "disk", Queries: []string{"a:b", "c:"}},
			wire.MetaQuery{Export: "disk", Queries: []string{"a:b", "c:"}}.Append(nil),
			"00000004 6469736b 00000002 00000003 613a62 00000002 633a", whole(wire.DecodeMetaQuery), 0},
		{"meta context", wire.MetaContext{ID: 0x01020304, Name: "a:b"}, wire.MetaContext{ID: 0x01020304, Name: "a:b"}.Append(nil),
			"01020304 613a62", whole(wire.DecodeMetaContext), 0},
		{"export in a list", "disk", wire.AppendServer(nil, "disk", "d"), "00000004 6469736b 64", whole(wire.DecodeServer), 0},
		{"block status", status{7, []wire.Descriptor{{0x01020304, 3}, {0x11121314, 0x21222324}}},
			wire.AppendBlockStatus(nil, 7, []wire.Descriptor{{0x01020304, 3}, {0x11121314, 0x21222324}}),
			"00000007 01020304 00000003 11121314 21222324", whole(decodeStatus), 0},
		{"error", failure{wire.ENOSPC, "full"}, wire.AppendError(nil, wire.ENOSPC, "full"), "0000001c 0004 66756c6c", whole(decodeFailure), 0},
		{"hole", hole{0x0102030405060708, 0x11121314}, wire.AppendHole(nil, 0x0102030405060708, 0x11121314), "0102030405060708 11121314", whole(decodeHole), 0},
		{"offset", uint64(0x0102030405060708), wire.AppendOffset(nil, 0x0102030405060708), "0102030405060708",
			func(b []byte) any { return wire.DecodeOffset(b) }, 8},
	} {
		want, err := hex.DecodeString(strings.ReplaceAll(c.want, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(c.encoded, want) {
			t.Errorf("%s: encoded %x, want %x", c.name, c.encoded, want)
		}
		if got := c.decoded(want); !reflect.DeepEqual(got, c.message) {
			t.Errorf("%s: decoded %+v, want %+v", c.name, got, c.message)
		}
		if c.size != 0 {
			if c.size != len(want) {
				t.Errorf("%s: size %d, want %d", c.name, c.size, len(want))
			}
			continue
		}
		for n := range want {
			if got := c.decoded(want[:n]); !isMalformed(got) && !prefixIsWhole(c.name, n) {
				t.Errorf("%s: %d of %d bytes are %+v", c.name, n, len(want), got)
			}
		}
		if got := c.decoded(append(want, 0)); !isMalformed(got) && c.name != "export in a list" && c.name != "error" {
			t.Errorf("%s: with a byte too many it is %+v", c.name, got)
		}
	}
}

// prefixIsWhole: some messages end anywhere, since what is around them has the length.
func prefixIsWhole(name string, n int) bool {
	return name == "meta context" && n >= 4 || name == "export in a list" && n >= 8 || name == "block status" && n >= 4 && (n-4)%8 == 0
}

type (
	status struct {
		id uint32
		ds []wire.Descriptor
	}
	failure struct {
		errno   wire.Errno
		message string
	}
	hole struct {
		off uint64
		n   uint32
	}
)

func decodeStatus(b []byte) (status, error) {
	id, ds, err := wire.DecodeBlockStatus(b)
	return status{id, ds}, err
}

func decodeFailure(b []byte) (failure, error) {
	e, m, err := wire.DecodeError(b)
	return failure{e, m}, err
}

func decodeHole(b []byte) (hole, error) {
	off, n, err := wire.DecodeHole(b)
	return hole{off, n}, err
}

// whole makes one result of two: the error where there is one.
func whole[T any](decode func([]byte) (T, error)) func([]byte) any {
	return func(b []byte) any {
		m, err := decode(b)
		if err != nil {
			return err
		}
		return m
	}
}

func isMalformed(v any) bool {
	err, ok := v.(error)
	return ok && errors.Is(err, wire.ErrMalformed)
}

func TestValidName(t *testing.T) {
	for name, want := range map[string]bool{"": true, "disk": true, "ä/ö": true, strings.Repeat("x", 4096): true,
		strings.Repeat("x", 4097): false, "a\x00b": false, "\xff": false} {
		if wire.ValidName(name) != want {
			t.Errorf("%.20q: %v", name, !want)
		}
	}
}

func TestIsError(t *testing.T) {
	if wire.RepMetaContext.IsError() || !wire.RepErrUnsup.IsError() || wire.ChunkBlockStatus.IsError() || !wire.ChunkError.IsError() {
		t.Error("the top bit marks errors")
	}
}

// FuzzDecode gives any bytes to every decoder of a payload: no panic, memory in proportion, and what was
// read can be written and read again.
func FuzzDecode(f *testing.F) {
	f.Add(wire.InfoRequest{Name: "disk", Types: []wire.InfoType{1, 3}}.Append(nil))
	f.Add(wire.MetaQuery{Export: "disk", Queries: []string{"a:b", "c:"}}.Append(nil))
	f.Add(wire.ExportInfo{Size: 1, Flags: 2}.Append(nil))
	f.Add(wire.BlockSizes{Min: 1, Preferred: 2, Max: 3}.Append(nil))
	f.Add(wire.AppendBlockStatus(nil, 7, []wire.Descriptor{{1, 3}}))
	f.Add(wire.AppendError(nil, wire.EIO, "bad"))
	f.Fuzz(func(t *testing.T, b []byte) {
		again := func(what string, first any, encoded []byte, decode func([]byte) any) {
			if second := decode(encoded); !reflect.DeepEqual(first, second) {
				t.Errorf("%s: %+v became %+v", what, first, second)
			}
		}
		if m, err := wire.DecodeInfoRequest(b); err == nil {
			again("info request", m, m.Append(nil), whole(wire.DecodeInfoRequest))
		}
		if m, err := wire.DecodeMetaQuery(b); err == nil {
			again("meta query", m, m.Append(nil), whole(wire.DecodeMetaQuery))
		}
		if m, err := wire.DecodeMetaContext(b); err == nil {
			again("meta context", m, m.Append(nil), whole(wire.DecodeMetaContext))
		}
		if m, err := wire.DecodeExportInfo(b); err == nil {
			again("export info", m, m.Append(nil), whole(wire.DecodeExportInfo))
		}
		if m, err := wire.DecodeBlockSizes(b); err == nil {
			again("block sizes", m, m.Append(nil), whole(wire.DecodeBlockSizes))
		}
		if m, err := wire.DecodeServer(b); err == nil {
			again("server", m, wire.AppendServer(nil, m, ""), whole(wire.DecodeServer))
		}
		if m, err := decodeStatus(b); err == nil {
			again("block status", m, wire.AppendBlockStatus(nil, m.id, m.ds), whole(decodeStatus))
		}
		if m, err := decodeFailure(b); err == nil {
			again("error", m, wire.AppendError(nil, m.errno, m.message), whole(decodeFailure))
		}
		if m, err := decodeHole(b); err == nil {
			again("hole", m, wire.AppendHole(nil, m.off, m.n), whole(decodeHole))
		}
	})
}
