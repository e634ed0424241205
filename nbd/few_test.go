package nbd

import (
	"testing"

	"github.com/dmsnap/dmsnap/internal/inline"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// TestInlineWhileClientsAreFew: quick requests are executed inline only while there are no more connections than
// processors.
func TestInlineWhileClientsAreFew(t *testing.T) {
	s := NewServer(Options{})
	c := &conn{server: s}
	r := wire.Request{Command: wire.CmdRead, Length: 4096}
	for range inline.TrialLength {
		c.inline.reads.Took(0)
	}
	for range s.processors {
		s.admit()
		if !c.mayInline(r) {
			t.Errorf("not with %d connections on %d processors", s.connections.Load(), s.processors)
		}
	}
	s.admit()
	if c.mayInline(r) {
		t.Errorf("still with %d connections on %d processors", s.connections.Load(), s.processors)
	}
	s.dismiss()
	if !c.mayInline(r) {
		t.Error("not again when one has gone")
	}
}

// TestWhichRequestsAreInline: short reads and writes, and block status of one extent, each after its own trial.
func TestWhichRequestsAreInline(t *testing.T) {
	quick := []wire.Request{
		{Command: wire.CmdRead, Length: quickRead},
		{Command: wire.CmdWrite, Length: quickWrite},
		{Command: wire.CmdBlockStatus, Flags: wire.FlagReqOne, Length: 1 << 31},
	}
	for i, r := range quick {
		c := &conn{server: NewServer(Options{})}
		for range inline.TrialLength {
			c.inline.trial(r).Took(0)
		}
		for k, other := range quick {
			if got := c.mayInline(other); got != (k == i) {
				t.Errorf("after a trial of command %d, command %d is executed inline: %v", r.Command, other.Command, got)
			}
		}
	}
	for _, r := range []wire.Request{
		{Command: wire.CmdRead, Length: quickRead + 1}, {Command: wire.CmdWrite, Flags: wire.FlagFUA, Length: 1},
		{Command: wire.CmdBlockStatus, Length: 1}, {Command: wire.CmdFlush}, {Command: wire.CmdTrim, Length: 1},
	} {
		if short(r) {
			t.Errorf("command %d, flags 0x%x, %d bytes counts as short", r.Command, r.Flags, r.Length)
		}
	}
}
