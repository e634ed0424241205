package main

import (
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// A signal ends a verb that waits for a server while it opens a disk.
func TestInterruptedWhileOpening(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	k := newKit(t)
	ref := "oci://" + l.Addr().String() + "/golden/disk"
	for _, args := range []string{"export REF OUT", "inspect REF", "serve REF COW --socket SOCKET", "compact COW OUT --origin REF", "diff REF COW", "push ORIGIN REF", "send REF --output OUT"} {
		k.path["REF"] = ref
		p := launch(t, append(k.expand(args), "--cache-dir="+t.TempDir())...)
		l.(*net.TCPListener).SetDeadline(time.Now().Add(20 * time.Second))
		var conn net.Conn
		for sent := 0; sent == 0; { // without a request: a connection that the program before had made as well
			if conn, err = l.Accept(); err != nil {
				t.Fatalf("%s: %v, %s", args, err, p.stderr.String())
			}
			sent, _ = conn.Read(make([]byte, 1)) // then it waits for the response
			if sent == 0 {
				conn.Close()
			}
		}
		if err := p.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		if status := p.end(t); status != exitSignal+int(syscall.SIGINT) && status != -1 {
			t.Errorf("%s: status %d, %s", args, status, p.stderr.String())
		}
		go io.Copy(io.Discard, conn)
		conn.Close()
		if _, err := os.Stat(k.path["OUT"]); err == nil {
			t.Errorf("%s: there is an output", args)
		}
	}
}
