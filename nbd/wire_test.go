package nbd_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// A peer is a client that speaks bytes, so that it can say what a good client would not.
type peer struct {
	t  testing.TB
	nc net.Conn
}

// connect connects to a server and reads its greeting.
func connect(t testing.TB, uri string) *peer {
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
	nc.SetDeadline(time.Now().Add(2 * time.Minute))
	p := &peer{t, nc}
	p.expect("NBDMAGIC IHAVEOPT 0003")
	return p
}

// begin connects and goes on to the transmission of an export: with flags 3, and contexts if any were
// given, which takes structured replies.
func begin(t testing.TB, uri string, structured bool, contexts ...string) *peer {
	t.Helper()
	u, err := nbd.ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	p := connect(t, uri)
	p.send("00000003")
	if structured {
		p.option(wire.OptStructuredReply, nil)
		p.answer(wire.OptStructuredReply, wire.RepAck, "")
	}
	if len(contexts) > 0 {
		p.option(wire.OptSetMetaContext, wire.MetaQuery{Export: u.Export, Queries: contexts}.Append(nil))
		for range contexts {
			p.skipAnswer(wire.RepMetaContext)
		}
		p.answer(wire.OptSetMetaContext, wire.RepAck, "")
	}
	p.option(wire.OptGo, wire.InfoRequest{Name: u.Export}.Append(nil))
	p.skipAnswer(wire.RepInfo)
	p.skipAnswer(wire.RepInfo)
	p.answer(wire.OptGo, wire.RepAck, "")
	return p
}

// message turns text into bytes: words of hexadecimal digits, of capitals as they are, of "12*00" twelve
// times a byte, and what follows a quotation mark as it is, up to the end of the word.
func message(text string) []byte {
	var b []byte
	for _, word := range strings.Fields(text) {
		times, rest, repeated := strings.Cut(word, "*")
		var n, x int
		switch {
		case word[0] == '\'':
			b = append(b, word[1:]...)
		case repeated:
			fmt.Sscanf(times, "%d", &n)
			fmt.Sscanf(rest, "%x", &x)
			b = append(b, bytes.Repeat([]byte{byte(x)}, n)...)
		case word == "NBDMAGIC" || word == "IHAVEOPT":
			b = append(b, word...)
		default:
			for i := 0; i < len(word); i += 2 {
				if _, err := fmt.Sscanf(word[i:i+2], "%x", &x); err != nil {
					panic(word)
				}
				b = append(b, byte(x))
			}
		}
	}
	return b
}

func (p *peer) send(text string) { p.write(message(text)) }

func (p *peer) write(b []byte) {
	p.t.Helper()
	if _, err := p.nc.Write(b); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) read(n int) []byte {
	p.t.Helper()
	b := make([]byte, n)
	if k, err := io.ReadFull(p.nc, b); err != nil {
		p.t.Fatalf("after %d of %d bytes: %v", k, n, err)
	}
	return b
}

// expect reads as many bytes as text has and wants them to be these.
func (p *peer) expect(text string) {
	p.t.Helper()
	want := message(text)
	if got := p.read(len(want)); !bytes.Equal(got, want) {
		p.t.Fatalf("got\n%x, want\n%x", got, want)
	}
}

// disconnected wants the connection to end, with nothing more to read.
func (p *peer) disconnected() {
	p.t.Helper()
	var b [64]byte
	n, err := p.nc.Read(b[:])
	if n != 0 || err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
		p.t.Fatalf("got %x, %v; want the connection to end", b[:n], err)
	}
}

func (p *peer) option(o wire.Option, data []byte) {
	p.t.Helper()
	p.write(append(wire.OptionHeader{Magic: wire.MagicOption, Option: o, Length: uint32(len(data))}.Append(nil), data...))
}

// skipAnswer reads one answer to an option and returns its data.
func (p *peer) skipAnswer(t wire.OptionReplyType) []byte {
	p.t.Helper()
	r := wire.DecodeOptionReply(p.read(wire.OptionReplySize))
	if r.Magic != wire.MagicOptionReply || r.Type != t {
		p.t.Fatalf("answer %+v, want type %#x", r, uint32(t))
	}
	return p.read(int(r.Length))
}

// answer wants this answer to an option; an error may have any text.
func (p *peer) answer(o wire.Option, t wire.OptionReplyType, text string) {
	p.t.Helper()
	r := wire.DecodeOptionReply(p.read(wire.OptionReplySize))
	data := p.read(int(r.Length))
	if r.Magic != wire.MagicOptionReply || r.Option != o || r.Type != t {
		p.t.Fatalf("answer %+v %q, want type %#x to option %d", r, data, uint32(t), o)
	}
	if !t.IsError() && !bytes.Equal(data, message(text)) {
		p.t.Fatalf("answer %x, want %x", data, message(text))
	}
}

func (p *peer) request(cmd wire.Command, flags wire.CommandFlags, cookie, off uint64, n uint32) {
	p.t.Helper()
	p.write(wire.Request{Magic: wire.MagicRequest, Flags: flags, Command: cmd, Cookie: cookie, Offset: off, Length: n}.Append(nil))
}

// simple wants a simple reply.
func (p *peer) simple(cookie uint64, errno wire.Errno) {
	p.t.Helper()
	if s := wire.DecodeSimple(p.read(wire.SimpleSize)); s != (wire.Simple{Magic: wire.MagicSimple, Error: errno, Cookie: cookie}) {
		p.t.Fatalf("reply %+v, want error %d to request %d", s, errno, cookie)
	}
}

// anySimple wants a simple reply without an error, and returns its cookie.
func (p *peer) anySimple() (cookie uint64) {
	p.t.Helper()
	s := wire.DecodeSimple(p.read(wire.SimpleSize))
	if s.Magic != wire.MagicSimple || s.Error != 0 {
		p.t.Fatalf("reply %+v, want one without an error", s)
	}
	return s.Cookie
}

// anyReply wants a simple reply, and returns its cookie and error.
func (p *peer) anyReply() (cookie uint64, errno wire.Errno) {
	p.t.Helper()
	s := wire.DecodeSimple(p.read(wire.SimpleSize))
	if s.Magic != wire.MagicSimple {
		p.t.Fatalf("reply %+v, want a simple one", s)
	}
	return s.Cookie, s.Error
}

// chunk wants a chunk, and returns its payload.
func (p *peer) chunk(cookie uint64, flags uint16, kind wire.ChunkType) []byte {
	p.t.Helper()
	h := wire.DecodeChunk(p.read(wire.ChunkSize))
	payload := p.read(int(h.Length))
	if h.Magic != wire.MagicChunk || h.Cookie != cookie || h.Flags != flags || h.Type != kind {
		p.t.Fatalf("chunk %+v %q, want type %#x, flags %d of request %d", h, payload, kind, flags, cookie)
	}
	return payload
}

// errorChunk wants a read or a block status to fail.
func (p *peer) errorChunk(cookie uint64, errno wire.Errno) {
	p.t.Helper()
	got, _, err := wire.DecodeError(p.chunk(cookie, wire.ChunkDone, wire.ChunkError))
	if err != nil || got != errno {
		p.t.Fatalf("error %d, %v; want %d", got, err, errno)
	}
}

// inSync wants the connection to be in sync: a request is answered.
func (p *peer) inSync() {
	p.t.Helper()
	p.request(wire.CmdFlush, 0, 0xa11fe, 0, 0)
	p.simple(0xa11fe, 0)
}

func hex64(n uint64) string { return fmt.Sprintf("%x", binary.BigEndian.AppendUint64(nil, n)) }
func hex32(n uint32) string { return fmt.Sprintf("%x", binary.BigEndian.AppendUint32(nil, n)) }
