package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// say is a server that sends the given strings: the first at once, and each other one after a read.
func say(server net.Conn, says ...string) {
	b := make([]byte, 64<<10)
	for i, text := range says {
		if i > 0 {
			if _, err := server.Read(b); err != nil {
				return
			}
		}
		if text == "" {
			continue // a pipe blocks until even an empty write is read
		}
		if _, err := server.Write(message(text)); err != nil {
			return
		}
	}
}

// against connects a client to a server that sends the given strings and then keeps reading.
func against(t *testing.T, says ...string) (*nbd.Client, error) {
	t.Helper()
	client, server := net.Pipe()
	t.Cleanup(func() { server.Close() })
	go func() {
		defer server.Close()
		say(server, says...)
		io.Copy(io.Discard, server)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	c, err := nbd.NewClient(ctx, client, "x", "x:y")
	if err == nil {
		t.Cleanup(func() { c.Close() })
	}
	return c, err
}

// What a correct server sends before the transmission: a MiB, everything offered, contexts 1 and 2.
var good = []string{
	"NBDMAGIC IHAVEOPT 0003",
	"", // client flags
	"0003e889045565a9 00000008 00000001 00000000",
	"0003e889045565a9 0000000a 00000004 00000013 00000001 'base:allocation 0003e889045565a9 0000000a 00000004 00000007 00000002 'x:y" +
		" 0003e889045565a9 0000000a 00000001 00000000",
	"0003e889045565a9 00000007 00000003 0000000c 0000 0000000000100000 0ded 0003e889045565a9 00000007 00000001 00000000",
}

// then is good with the n-th thing said replaced by what.
func then(n int, what string) []string {
	return append(append([]string{}, good[:n]...), what)
}

func TestClientHandshake(t *testing.T) {
	for _, c := range []struct {
		name string
		says []string
		want string // part of the error; "" means that it works
	}{
		{"good", good, ""},
		{"no structured replies", []string{good[0], "", "0003e889045565a9 00000008 80000001 00000000", good[4]}, ""},
		{"no contexts", []string{good[0], "", good[2], "0003e889045565a9 0000000a 80000001 00000000", good[4]}, ""},
		{"no GO", append(then(4, "0003e889045565a9 00000007 80000001 00000000"), "0000000000100000 0001"), ""},
		{"no GO, with zeroes", []string{"NBDMAGIC IHAVEOPT 0001", "", good[2], good[3], "0003e889045565a9 00000007 80000001 00000000", "0000000000100000 0001 124*00"}, ""},
		{"unknown information", then(4, "0003e889045565a9 00000007 00000003 00000003 7777 00 "+good[4]), ""},
		{"another protocol", []string{"'SSH-2.0-OpenSSH_9.2p1"}, "no NBD server"},
		{"oldstyle", []string{"NBDMAGIC 0000420281861253 0000"}, "no NBD server"},
		{"not fixed", []string{"NBDMAGIC IHAVEOPT 0000"}, "fixed newstyle"},
		{"half a greeting", []string{"NBDMAGIC IHAV"[:8]}, "deadline"},
		{"no such export", then(4, "0003e889045565a9 00000007 80000006 00000005 'sorry"), `no such export ("sorry")`},
		{"policy", then(4, "0003e889045565a9 00000007 80000002 00000000"), "error 2"},
		{"no size", then(4, "0003e889045565a9 00000007 00000001 00000000"), "size"},
		{"size of 2^63", then(4, strings.Replace(good[4], "0000000000100000", "8000000000000000", 1)), "-1 bytes"},
		{"no bytes at most", then(4, "0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00001000 00000000 "+good[4]), "0 at most"},
		{"blocks of 4096 bytes at least", then(4, "0003e889045565a9 00000007 00000003 0000000e 0003 00001000 00001000 02000000 "+good[4]), ""},
		{"blocks of no bytes", then(4, "0003e889045565a9 00000007 00000003 0000000e 0003 00000000 00001000 02000000 "+good[4]), "minimum block size of 0 bytes"},
		{"blocks of 1536 bytes", then(4, "0003e889045565a9 00000007 00000003 0000000e 0003 00000600 00001000 02000000 "+good[4]), "minimum block size of 1536 bytes"},
		{"blocks of 128 KiB", then(4, "0003e889045565a9 00000007 00000003 0000000e 0003 00020000 00020000 02000000 "+good[4]), "minimum block size of 131072 bytes"},
		{"short information", then(4, "0003e889045565a9 00000007 00000003 00000001 00"), "1 bytes"},
		{"long export information", then(4, "0003e889045565a9 00000007 00000003 0000000d 0000 0000000000100000 0ded 00"), "malformed"},
		{"bad magic", then(2, "0003e889045565aa 00000008 00000001 00000000"), "magic"},
		{"answer to another option", then(2, "0003e889045565a9 00000009 00000001 00000000"), "option 9"},
		{"answer of 4 GiB", then(2, "0003e889045565a9 00000008 00000001 ffffffff"), "4294967295 bytes"},
		{"unasked answer", then(2, "0003e889045565a9 00000008 00000002 00000000"), "unexpected"},
		{"context that was not asked for", then(3, "0003e889045565a9 0000000a 00000004 00000007 00000001 'x:z"), "not asked"},
		{"context without an ID", then(3, "0003e889045565a9 0000000a 00000004 00000002 0000"), "malformed"},
		{"answers without end", then(3, strings.Repeat("0003e889045565a9 0000000a 00000004 00000007 00000002 'x:y ", 4096)), "more than 4096"},
		{"disconnects", good[:1], "deadline"}, // our server here stays silent
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			client, err := against(t, c.says...)
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				if client.Size() != 1<<20 {
					t.Errorf("size %d", client.Size())
				}
				if blocks := client.BlockSize(); (blocks == 4096) != strings.Contains(c.name, "4096") || blocks < 512 {
					t.Errorf("blocks of %d bytes", blocks)
				}
			} else if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// What a server may answer to the first request, a read of 8 bytes at 16 or a status of as many, and what
// it may not. The latter ends the connection, and every request with it; the former never does.
func TestClientDistrustsReplies(t *testing.T) {
	const first = "0000000000000001 "
	data := func(flags, off, bytes string) string {
		b := message(bytes)
		return "668e33ef " + flags + " 0001 " + first + hex32(uint32(8+len(b))) + " 00000000000000" + off + " " + bytes + " "
	}
	hole := func(flags, off, n string) string {
		return "668e33ef " + flags + " 0002 " + first + "0000000c 00000000000000" + off + " " + n + " "
	}
	const end = "668e33ef 0001 0000 " + first + "00000000"
	for _, c := range []struct {
		name, reply, want string // part of the error; "" means that the read succeeds
		status            bool
	}{
		{name: "one chunk", reply: data("0001", "10", "0102030405060708")},
		{name: "chunks in any order", reply: data("0000", "16", "0708") + hole("0000", "10", "00000001") + data("0000", "11", "0203040506") + end},
		{name: "an unknown flag", reply: data("8001", "10", "0102030405060708")},

		{name: "error", reply: "668e33ef 0001 8001 " + first + "00000009 00000005 0003 'bad", want: `input/output error ("bad")`},
		{name: "error at an offset", reply: "668e33ef 0001 8002 " + first + "0000000e 0000001c 0000 0000000000000010", want: "no space left"},
		{name: "unknown error type", reply: "668e33ef 0001 8abc " + first + "00000006 00000016 0000", want: "invalid argument"},
		{name: "unknown error number", reply: "668e33ef 0001 8001 " + first + "00000006 00001234 0000", want: "input/output error"},
		{name: "simple error", reply: "67446698 00000005 " + first, want: "input/output error"},
		{name: "error, then data", reply: "668e33ef 0000 8001 " + first + "00000006 00000005 0000 " + data("0001", "10", "01"), want: "input/output error"},

		{name: "bad magic", reply: "668e33ee", want: "EOF"},
		{name: "bad magic, long", reply: "668e33ee 20*00", want: "magic"},
		{name: "another's cookie", reply: "668e33ef 0001 0000 0000000000000002 00000000", want: "not made"},
		{name: "simple with another's cookie", reply: "67446698 00000000 0000000000000002", want: "not made"},
		{name: "simple reply to a read", reply: "67446698 00000000 " + first + "8*00", want: "simple reply"},
		{name: "too little", reply: data("0001", "10", "01020304050607"), want: "has 7"},
		{name: "nothing", reply: end, want: "has 0"},
		{name: "too much", reply: data("0001", "10", "9*ff"), want: "answer a read"},
		{name: "before the range", reply: data("0001", "0f", "8*ff"), want: "answer a read"},
		{name: "behind the range", reply: data("0001", "11", "8*ff"), want: "answer a read"},
		{name: "4 GiB", reply: "668e33ef 0001 0001 " + first + "ffffffff 0000000000000010 8*ff", want: "answer a read"},
		{name: "the same twice", reply: data("0000", "10", "01020304") + data("0000", "10", "01020304") + end, want: "overlap"},
		{name: "overlapping", reply: data("0000", "12", "01020304") + data("0000", "10", "010203") + end, want: "overlap"},
		{name: "chunk without data", reply: "668e33ef 0001 0001 " + first + "00000008 0000000000000010", want: "without data"},
		{name: "hole too long", reply: hole("0001", "10", "00000009"), want: "answer a read"},
		{name: "hole of nothing", reply: hole("0001", "10", "00000000"), want: "answer a read"},
		{name: "hole of a wrong length", reply: "668e33ef 0001 0002 " + first + "0000000b 11*00", want: "type 2"},
		{name: "NONE that is not the last", reply: "668e33ef 0000 0000 " + first + "00000000", want: "type 0"},
		{name: "unknown type", reply: "668e33ef 0001 0777 " + first + "00000000", want: "type 1911"},
		{name: "status that was not asked", reply: "668e33ef 0001 0005 " + first + "0000000c 00000002 00000008 00000000", want: "type 5"},
		{name: "error message longer than the chunk", reply: "668e33ef 0001 8001 " + first + "00000006 00000005 0001", want: "malformed"},
		{name: "error of a MiB", reply: "668e33ef 0001 8001 " + first + "00100000", want: "type 32769"},
		{name: "disconnects", reply: "disconnect", want: "EOF"},

		{name: "status", status: true, reply: "668e33ef 0000 0005 " + first + "0000000c 00000001 00000008 00000000 668e33ef 0001 0005 " + first + "0000000c 00000002 00000008 00000003"},
		{name: "status, last one longer than asked", status: true, reply: "668e33ef 0001 0005 " + first + "00000014 00000002 00000004 00000003 ffffffff 00000003"},
		{name: "status, error", status: true, reply: "668e33ef 0001 8001 " + first + "00000006 00000005 0000", want: "input/output error"},
		{name: "status of other contexts only", status: true, reply: "668e33ef 0001 0005 " + first + "0000000c 00000001 00000008 00000000", want: "has none"},
		{name: "status without descriptors", status: true, reply: "668e33ef 0001 0005 " + first + "00000004 00000002", want: "has none"},
		{name: "status twice", status: true, reply: strings.Repeat("668e33ef 0000 0005 "+first+"0000000c 00000002 00000008 00000000 ", 2) + end, want: "twice"},
		{name: "status of nothing", status: true, reply: "668e33ef 0001 0005 " + first + "0000000c 00000002 00000000 00000000", want: "empty"},
		{name: "status behind the range", status: true, reply: "668e33ef 0001 0005 " + first + "00000014 00000002 00000008 00000000 00000001 00000000", want: "behind"},
		{name: "status, half a descriptor", status: true, reply: "668e33ef 0001 0005 " + first + "00000008 00000002 00000008", want: "malformed"},
		{name: "status of 4 GiB", status: true, reply: "668e33ef 0001 0005 " + first + "ffffffff 00000002 00000008", want: "type 5"},
		{name: "data for a status", status: true, reply: data("0001", "10", "01"), want: "type 1"},
		{name: "simple reply to a status", status: true, reply: "67446698 00000000 " + first, want: "simple reply"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			client, server := net.Pipe()
			go func() {
				defer server.Close()
				say(server, append(append([]string{}, good...), strings.Replace(c.reply, "disconnect", "", 1))...)
			}()
			cl, err := nbd.NewClient(context.Background(), client, "x", "x:y")
			if err != nil {
				t.Fatal(err)
			}
			defer cl.Close()
			buf := bytes.Repeat([]byte{0xee}, 24)
			if c.status {
				var list []block.Extent
				list, err = cl.BlockStatus("x:y", 16, 8)
				if err == nil && (list[0].Flags != 3 || list[len(list)-1].Length > 8) {
					t.Errorf("status %v", list)
				}
			} else {
				_, err = cl.ReadAt(buf[8:16], 16)
				if !bytes.Equal(buf[:8], bytes.Repeat([]byte{0xee}, 8)) || !bytes.Equal(buf[16:], buf[:8]) {
					t.Errorf("bytes around the buffer have changed: %x", buf)
				}
				if err == nil && !bytes.Equal(buf[9:16], []byte{2, 3, 4, 5, 6, 7, 8}) {
					t.Errorf("read %x", buf[8:16])
				}
			}
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			var remote *nbd.RemoteError
			if _, again := cl.ReadAt(buf[:1], 0); again == nil || err != nil && !errors.As(err, &remote) && !errors.Is(again, err) {
				t.Errorf("after it: %v, want %v", again, err)
			}
		})
	}
}

// A thousand single bytes, every other one, then the rest: any order is taken, but not without a bound.
func TestClientScatteredChunks(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for _, n := range []int{4096, 4097} {
		says := append(append([]string{}, good...), "")
		for i := range n {
			says[len(says)-1] += fmt.Sprintf("668e33ef 0000 0001 0000000000000001 00000009 %s aa ", hex64(uint64(2*i)))
		}
		for i := range n {
			says[len(says)-1] += fmt.Sprintf("668e33ef 0000 0001 0000000000000001 00000009 %s aa ", hex64(uint64(2*i+1)))
		}
		says[len(says)-1] += "668e33ef 0001 0000 0000000000000001 00000000"
		c, err := against(t, says...)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 2*n)
		_, err = c.ReadAt(b, 0)
		if n <= 4096 && (err != nil || !bytes.Equal(b, bytes.Repeat([]byte{0xaa}, 2*n))) || n > 4096 && (err == nil || !strings.Contains(err.Error(), "scattered")) {
			t.Errorf("%d gaps: %v", n, err)
		}
	}
}

func TestRemoteErrors(t *testing.T) {
	for errno, want := range map[wire.Errno]error{
		wire.EPERM: block.ErrReadOnly, wire.ENOTSUP: block.ErrNotFast, wire.ESHUTDOWN: fs.ErrClosed, wire.EIO: syscall.EIO,
		wire.ENOSPC: syscall.ENOSPC, wire.EINVAL: syscall.EINVAL, wire.ENOMEM: syscall.ENOMEM, wire.EOVERFLOW: syscall.EOVERFLOW, 4711: syscall.EIO,
	} {
		if err := error(&nbd.RemoteError{Errno: errno}); !errors.Is(err, want) {
			t.Errorf("error %d is not %v", errno, want)
		}
	}
}

// A client closes at once, also when the server takes nothing in any more.
func TestClientCloses(t *testing.T) {
	c, err := against(t, good...)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Flush() }()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, fs.ErrClosed) {
		t.Errorf("the request under way: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
}

func TestDialFails(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for _, uri := range []string{"nbd+unix:///x?socket=" + t.TempDir() + "/none", "nbd://127.0.0.1:1/x", "x"} {
		if _, err := nbd.Dial(ctx, uri); err == nil {
			t.Errorf("%s: connected", uri)
		}
	}
	// A server that sends nothing.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	short, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := nbd.Dial(short, "nbd://"+l.Addr().String()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a silent server: %v", err)
	}
}

// FuzzReplies has a server say anything in the transmission.
func FuzzReplies(f *testing.F) {
	f.Add(message("668e33ef 0001 0001 0000000000000001 00000010 0000000000000010 0102030405060708"))
	f.Add(message("668e33ef 0000 0002 0000000000000001 0000000c 0000000000000010 00000008 668e33ef 0001 0000 0000000000000001 00000000"))
	f.Add(message("668e33ef 0001 8001 0000000000000001 00000009 00000005 0003 'bad"))
	f.Add(message("668e33ef 0001 0005 0000000000000002 0000000c 00000001 00000008 00000000"))
	f.Fuzz(func(t *testing.T, reply []byte) {
		client, server := net.Pipe()
		go func() {
			defer server.Close()
			say(server, good...)
			server.Read(make([]byte, 4096))
			server.SetWriteDeadline(time.Now().Add(time.Second))
			server.Write(reply)
		}()
		c, err := nbd.NewClient(context.Background(), client, "x", "x:y")
		if err != nil {
			t.Fatal(err)
		}
		buf := bytes.Repeat([]byte{0xee}, 24)
		c.ReadAt(buf[8:16], 16)
		c.BlockStatus("x:y", 16, 8)
		c.Close()
		if !bytes.Equal(buf[:8], bytes.Repeat([]byte{0xee}, 8)) || !bytes.Equal(buf[16:], buf[:8]) {
			t.Errorf("bytes around the buffer have changed: %x", buf)
		}
	})
}

// FuzzServer has a client say anything, from its first byte on.
func FuzzServer(f *testing.F) {
	f.Add(message("00000003 IHAVEOPT 00000008 00000000 IHAVEOPT 0000000a 0000001c 00000001 'x 00000001 0000000f 'base:allocation IHAVEOPT 00000007 00000007 00000001 'x 0000"))
	f.Add(message("00000003 IHAVEOPT 00000001 00000001 'x 25609513 0001 0001 0000000000000001 0000000000000000 00000002 7788 25609513 0000 0002 24*00"))
	f.Add(message("00000001 IHAVEOPT 00000001 00000001 'x 25609513 0000 0000 0000000000000001 0000000000000000 00001000 25609513 0000 0006 0000000000000001 0000000000000000 00001000"))
	f.Add(message("00000003 IHAVEOPT 00000003 00000000 IHAVEOPT 00000009 00000009 00000001 'x 00000000 IHAVEOPT 00000006 0000000b 00000001 'x 0002 0001 0002"))
	f.Fuzz(func(t *testing.T, says []byte) {
		s := nbd.NewServer(nbd.Options{HandshakeTimeout: time.Second, StallTimeout: time.Second})
		s.Add(nbd.Export{Name: "x", Description: "y", Device: block.NewMemory(8192), CanTrim: true})
		client, server := net.Pipe()
		ended := make(chan struct{})
		go func() {
			s.ServeConn(context.Background(), server)
			close(ended)
		}()
		go io.Copy(io.Discard, client)
		client.SetWriteDeadline(time.Now().Add(5 * time.Second))
		client.Write(says)
		client.Close()
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Error("the connection does not end")
		}
		if c, _ := s.Counters("x"); c.InFlight != 0 || c.Connections != 0 {
			t.Errorf("left: %+v", c)
		}
	})
}
