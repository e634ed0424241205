package vhost

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"
)

// TestHostileInFlightArea: in-flight memory is the front-end's, which may write anything there: what is broken is refused by its own
// reason, and nothing outside of the area is looked at.
func TestHostileInFlightArea(t *testing.T) {
	const n, used = 8, 100
	put16 := func(b []byte, at int, v uint16) { binary.LittleEndian.PutUint16(b[at:], v) }
	entry := func(head int) int { return inflightHeader + inflightEntry*head }
	for name, c := range map[string]struct {
		says   string
		change func(b []byte) []byte
	}{
		"too small":     {"too small", func(b []byte) []byte { return b[:entry(n)-1] }},
		"version":       {"version 77", func(b []byte) []byte { put16(b, 8, 77); return b }},
		"another ring":  {"for a ring of 4, not 8", func(b []byte) []byte { put16(b, 10, n/2); return b }},
		"used index":    {"does not match the used ring", func(b []byte) []byte { put16(b, 14, used-n-1); return b }},
		"batch outside": {"batch list is broken", func(b []byte) []byte { put16(b, 12, n); put16(b, 14, used-1); return b }},
		"batch leaves": {"batch list is broken", func(b []byte) []byte {
			put16(b, 12, 3)
			put16(b, 14, used-2)
			put16(b, entry(3)+6, 0xffff)
			return b
		}},
		"nothing": {"", func(b []byte) []byte { return b }},
	} {
		b := make([]byte, entry(n))
		put16(b, 8, inflightVersion)
		put16(b, 10, n)
		put16(b, 14, used)
		b[entry(5)], b[entry(2)] = 1, 1
		binary.LittleEndian.PutUint64(b[entry(5)+8:], 1)
		binary.LittleEndian.PutUint64(b[entry(2)+8:], 1<<63)
		f := inflight{area: slices.Clip(c.change(b))}
		heads, err := f.recover(n, used)
		switch {
		case c.says == "" && (err != nil || !slices.Equal(heads, []uint16{5, 2})):
			t.Errorf("%s: heads %v, %v", name, heads, err)
		case c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
}
