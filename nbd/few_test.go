package nbd

import (
	"testing"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// TestInHandWhileClientsAreFew: quick requests are carried out in hand only while there are no more connections
// than processors.
func TestInHandWhileClientsAreFew(t *testing.T) {
	s := NewServer(Options{})
	c := &conn{server: s}
	r := wire.Request{Command: wire.CmdRead, Length: 4096}
	c.hand.reads.Store(quickTrial)
	for range s.processors {
		s.admit()
		if !c.inHand(r) {
			t.Errorf("not with %d connections on %d processors", s.connections.Load(), s.processors)
		}
	}
	s.admit()
	if c.inHand(r) {
		t.Errorf("still with %d connections on %d processors", s.connections.Load(), s.processors)
	}
	s.dismiss()
	if !c.inHand(r) {
		t.Error("not again when one has gone")
	}
}
