package nbd_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// twoExports serves "disk", which can do everything, and "ro"; the default is "disk".
func twoExports(t *testing.T, o nbd.Options) (*nbd.Server, func(string) string) {
	all := func(off, n int64) ([]block.Extent, error) { return []block.Extent{{Length: n, Flags: 5}}, nil }
	s, uri := serve(t, o,
		nbd.Export{Name: "disk", Description: "the disk", Device: block.NewMemory(1 << 20), CanTrim: true, MultiConn: true,
			PreferredBlock: 65536, Contexts: map[string]nbd.ContextFunc{"x:y": all, "x:z": all}},
		nbd.Export{Name: "ro", Device: block.NewMemory(1 << 20), ReadOnly: true})
	s.SetDefault("disk")
	return s, uri
}

func TestHandshakeByHand(t *testing.T) {
	ack := func(option string) string { return "0003e889045565a9" + option + " 00000001 00000000 " }
	disk := "0d6d " // transmission flags: all but READ_ONLY, ROTATIONAL, DF and RESIZE
	for _, c := range []struct{ name, client, server string }{
		{"EXPORT_NAME", "00000003 IHAVEOPT 00000001 00000004 'disk", "0000000000100000 " + disk},
		{"EXPORT_NAME with zeroes", "00000001 IHAVEOPT 00000001 00000004 'disk", "0000000000100000 " + disk + " 124*00"},
		{"EXPORT_NAME of the default", "00000003 IHAVEOPT 00000001 00000000", "0000000000100000 " + disk},
		{"EXPORT_NAME, read-only", "00000003 IHAVEOPT 00000001 00000002 'ro", "0000000000100000 040f"},
		{"EXPORT_NAME after STRUCTURED_REPLY", "00000003 IHAVEOPT 00000008 00000000 IHAVEOPT 00000001 00000002 'ro",
			ack("00000008") + "0000000000100000 048f"},
		{"LIST", "00000003 IHAVEOPT 00000003 00000000",
			"0003e889045565a9 00000003 00000002 00000010 00000004 'diskthe 20 'disk 0003e889045565a9 00000003 00000002 00000006 00000002 'ro " + ack("00000003")},
		{"GO, all information, known or not", "00000003 IHAVEOPT 00000007 00000014 00000004 'disk 0005 0000 0001 0002 0003 7777",
			"0003e889045565a9 00000007 00000003 0000000c 0000 0000000000100000 " + disk +
				"0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00010000 02000000" +
				"0003e889045565a9 00000007 00000003 00000006 0001 'disk " +
				"0003e889045565a9 00000007 00000003 0000000a 0002 'the 20 'disk " + ack("00000007")},
		{"INFO goes on", "00000003 IHAVEOPT 00000006 00000008 00000002 'ro 0000 IHAVEOPT 00000002 00000000",
			"0003e889045565a9 00000006 00000003 0000000c 0000 0000000000100000 040f" +
				"0003e889045565a9 00000006 00000003 0000000e 0003 00000001 00001000 02000000 " + ack("00000006") + ack("00000002")},
		{"LIST_META_CONTEXT, all", "00000003 IHAVEOPT 00000008 00000000 IHAVEOPT 00000009 0000000c 00000004 'disk 00000000",
			ack("00000008") + "0003e889045565a9 00000009 00000004 00000013 00000000 'base:allocation " +
				"0003e889045565a9 00000009 00000004 00000007 00000000 'x:y 0003e889045565a9 00000009 00000004 00000007 00000000 'x:z " + ack("00000009")},
		{"LIST_META_CONTEXT, a namespace", "00000003 IHAVEOPT 00000008 00000000 IHAVEOPT 00000009 00000012 00000004 'disk 00000001 00000002 'x:",
			ack("00000008") + "0003e889045565a9 00000009 00000004 00000007 00000000 'x:y 0003e889045565a9 00000009 00000004 00000007 00000000 'x:z " + ack("00000009")},
		{"SET_META_CONTEXT, of the default, one unknown", "00000003 IHAVEOPT 00000008 00000000 IHAVEOPT 0000000a 00000016 00000000 00000002 00000003 'x:z 00000003 'y:y",
			ack("00000008") + "0003e889045565a9 0000000a 00000004 00000007 00000003 'x:z " + ack("0000000a")},
		{"SET_META_CONTEXT, none", "00000003 IHAVEOPT 00000008 00000000 IHAVEOPT 0000000a 00000008 00000000 00000000",
			ack("00000008") + ack("0000000a")},
		{"ABORT", "00000003 IHAVEOPT 00000002 00000000", ack("00000002")},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, uri := twoExports(t, nbd.Options{})
			p := connect(t, uri(""))
			p.send(c.client)
			p.expect(c.server)
			if strings.HasPrefix(c.name, "EXPORT_NAME") || strings.HasPrefix(c.name, "GO") {
				p.inSync()
				p.request(wire.CmdDisconnect, 0, 0, 0, 0)
			} else if !strings.Contains(c.client, "00000002 00000000") {
				p.option(wire.OptAbort, nil)
				p.answer(wire.OptAbort, wire.RepAck, "")
			}
			p.disconnected()
		})
	}
}

// What is refused, and that the handshake goes on.
func TestHandshakeRefuses(t *testing.T) {
	name := func(s string) []byte { return append(message(hex32(uint32(len(s)))), s...) }
	query := func(export string, queries ...string) []byte {
		return wire.MetaQuery{Export: export, Queries: queries}.Append(nil)
	}
	long := strings.Repeat("x", 4097)
	for _, c := range []struct {
		what   string
		option wire.Option
		data   []byte
		want   wire.OptionReplyType
	}{
		{"unknown option", 77, nil, wire.RepErrUnsup},
		{"unknown option with data", 77, make([]byte, 1000), wire.RepErrUnsup},
		{"withdrawn PEEK_EXPORT", 4, nil, wire.RepErrUnsup},
		{"STARTTLS", wire.OptStartTLS, nil, wire.RepErrUnsup},
		{"EXTENDED_HEADERS", wire.OptExtendedHeaders, nil, wire.RepErrUnsup},
		{"over-long option", 77, make([]byte, 64<<10+1), wire.RepErrTooBig},
		{"over-long LIST", wire.OptList, make([]byte, 1<<20), wire.RepErrTooBig},
		{"LIST with data", wire.OptList, []byte{1}, wire.RepErrInvalid},
		{"STRUCTURED_REPLY with data", wire.OptStructuredReply, []byte{1}, wire.RepErrInvalid},
		{"GO without data", wire.OptGo, nil, wire.RepErrInvalid},
		{"GO, name longer than the data", wire.OptGo, message("00000005 'disk 0000"), wire.RepErrInvalid},
		{"GO, name of 4 GiB", wire.OptGo, message("ffffffff 'disk 0000"), wire.RepErrInvalid},
		{"GO, fewer types than announced", wire.OptGo, append(name("disk"), 0, 2, 0, 1), wire.RepErrInvalid},
		{"GO, bytes behind the types", wire.OptGo, append(name("disk"), 0, 0, 1), wire.RepErrInvalid},
		{"GO, no such export", wire.OptGo, append(name("disc"), 0, 0), wire.RepErrUnknown},
		{"INFO, no such export", wire.OptInfo, append(name("Disk"), 0, 0), wire.RepErrUnknown},
		{"GO, name with NUL", wire.OptGo, append(name("di\x00k"), 0, 0), wire.RepErrInvalid},
		{"GO, name not UTF-8", wire.OptGo, append(name("di\xffk"), 0, 0), wire.RepErrInvalid},
		{"GO, long name", wire.OptGo, append(name(long), 0, 0), wire.RepErrInvalid},
		{"SET_META_CONTEXT, no such export", wire.OptSetMetaContext, query("disc", "base:allocation"), wire.RepErrUnknown},
		{"SET_META_CONTEXT, no namespace", wire.OptSetMetaContext, query("disk", "base"), wire.RepErrInvalid},
		{"SET_META_CONTEXT, truncated", wire.OptSetMetaContext, query("disk", "base:allocation")[:20], wire.RepErrInvalid},
		{"SET_META_CONTEXT, 4 G queries", wire.OptSetMetaContext, append(name("disk"), 255, 255, 255, 255), wire.RepErrInvalid},
		{"LIST_META_CONTEXT, bytes behind", wire.OptListMetaContext, append(query("disk"), 0), wire.RepErrInvalid},
	} {
		t.Run(c.what, func(t *testing.T) {
			_, uri := twoExports(t, nbd.Options{})
			p := connect(t, uri(""))
			p.send("00000003")
			if c.option != wire.OptStructuredReply {
				p.option(wire.OptStructuredReply, nil)
				p.answer(wire.OptStructuredReply, wire.RepAck, "")
			}
			p.option(c.option, c.data)
			p.answer(c.option, c.want, "")
			p.option(wire.OptGo, wire.InfoRequest{Name: "disk"}.Append(nil))
			p.skipAnswer(wire.RepInfo)
			p.skipAnswer(wire.RepInfo)
			p.answer(wire.OptGo, wire.RepAck, "")
			p.inSync()
		})
	}
	t.Run("meta contexts without structured replies", func(t *testing.T) {
		_, uri := twoExports(t, nbd.Options{})
		p := connect(t, uri(""))
		p.send("00000003")
		for _, o := range []wire.Option{wire.OptListMetaContext, wire.OptSetMetaContext} {
			p.option(o, query("disk", "base:allocation"))
			p.answer(o, wire.RepErrInvalid, "")
		}
	})
}

func TestHandshakeDisconnects(t *testing.T) {
	for what, client := range map[string]string{
		"unknown client flag":      "00000007",
		"bad option magic":         "00000003 4948415645xx4f5054 00000003 00000000",
		"option of 4 GiB":          "00000003 IHAVEOPT 00000003 ffffffff",
		"EXPORT_NAME of no export": "00000003 IHAVEOPT 00000001 00000004 'disc",
		"EXPORT_NAME of 65 KiB":    "00000003 IHAVEOPT 00000001 00010001",
		"ABORT":                    "00000003 IHAVEOPT 00000002 00000000",
	} {
		t.Run(what, func(t *testing.T) {
			_, uri := twoExports(t, nbd.Options{})
			p := connect(t, uri(""))
			p.send(strings.ReplaceAll(client, "xx", "00"))
			if what == "ABORT" {
				p.answer(wire.OptAbort, wire.RepAck, "")
			}
			p.disconnected()
		})
	}
	t.Run("a flood of options", func(t *testing.T) {
		_, uri := twoExports(t, nbd.Options{})
		p := connect(t, uri(""))
		p.send("00000003")
		for range 4096 {
			p.option(77, nil)
			p.skipAnswer(wire.RepErrUnsup)
		}
		p.disconnected()
	})
	for _, part := range []string{"", "0000", "00000003", "00000003 IHAVEOPT 0000", "00000003 IHAVEOPT 00000007 00000020 0000"} {
		t.Run(fmt.Sprintf("half a message, %q", part), func(t *testing.T) {
			_, uri := twoExports(t, nbd.Options{HandshakeTimeout: 50 * time.Millisecond})
			p := connect(t, uri(""))
			p.send(part)
			p.disconnected()
		})
	}
}

// Contexts chosen for one export don't go along to another, nor do those of an earlier choice stay.
func TestMetaContextsAreOfOneExport(t *testing.T) {
	_, uri := twoExports(t, nbd.Options{})
	for _, last := range []wire.MetaQuery{{Export: "disk", Queries: []string{"base:allocation"}}, {Export: "ro"}, {Export: "none", Queries: []string{"base:allocation"}}} {
		p := connect(t, uri(""))
		p.send("00000003")
		p.option(wire.OptStructuredReply, nil)
		p.answer(wire.OptStructuredReply, wire.RepAck, "")
		p.option(wire.OptSetMetaContext, wire.MetaQuery{Export: "ro", Queries: []string{"base:allocation"}}.Append(nil))
		p.skipAnswer(wire.RepMetaContext)
		p.answer(wire.OptSetMetaContext, wire.RepAck, "")
		p.option(wire.OptSetMetaContext, last.Append(nil))
		switch last.Export {
		case "disk":
			p.skipAnswer(wire.RepMetaContext)
			fallthrough
		case "ro":
			p.answer(wire.OptSetMetaContext, wire.RepAck, "")
		default:
			p.answer(wire.OptSetMetaContext, wire.RepErrUnknown, "")
		}
		p.option(wire.OptGo, wire.InfoRequest{Name: "ro"}.Append(nil))
		p.skipAnswer(wire.RepInfo)
		p.skipAnswer(wire.RepInfo)
		p.answer(wire.OptGo, wire.RepAck, "")
		p.request(wire.CmdBlockStatus, 0, 1, 0, 4096)
		p.errorChunk(1, wire.EINVAL)
	}
}

func TestAddRefuses(t *testing.T) {
	s := nbd.NewServer(nbd.Options{})
	dev := block.NewMemory(4096)
	if err := s.Add(nbd.Export{Name: "a", Device: dev}); err != nil {
		t.Fatal(err)
	}
	context := func(name string) map[string]nbd.ContextFunc { return map[string]nbd.ContextFunc{name: nil} }
	for what, e := range map[string]nbd.Export{
		"taken":        {Name: "a", Device: dev},
		"long":         {Name: strings.Repeat("x", 4097), Device: dev},
		"NUL":          {Name: "\x00", Device: dev},
		"UTF-8":        {Name: "\xff", Device: dev},
		"description":  {Name: "b", Description: "\xff", Device: dev},
		"block":        {Name: "b", PreferredBlock: 4097, Device: dev},
		"long block":   {Name: "b", PreferredBlock: 64 << 20, Device: dev},
		"context":      {Name: "b", Contexts: context("xy"), Device: dev},
		"base context": {Name: "b", Contexts: context("base:xy"), Device: dev},
	} {
		if err := s.Add(e); err == nil {
			t.Errorf("%s: added", what)
		}
	}
	if names := s.Names(); len(names) != 1 {
		t.Errorf("exports %q", names)
	}
}
