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
	k := newKit(t)
	for _, args := range []string{"export REF OUT", "inspect REF", "serve REF COW --socket SOCKET", "compact COW OUT --origin REF", "diff REF COW", "push ORIGIN REF", "push REF localhost:1/disk", "send REF --output OUT"} {
		l, err := net.Listen("tcp", "127.0.0.1:0") // its own: a verb may connect more than once
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		k.path["REF"] = "oci://" + l.Addr().String() + "/golden/disk"
		p := launch(t, append(k.expand(args), "--cache-dir="+t.TempDir())...)
		l.(*net.TCPListener).SetDeadline(time.Now().Add(20 * time.Second))
		conn, err := l.Accept()
		if err != nil {
			t.Fatalf("%s: %v, %s", args, err, p.stderr.String())
		}
		if n, err := conn.Read(make([]byte, 1)); n != 1 { // it waits for the response
			t.Fatalf("%s: %v", args, err)
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
