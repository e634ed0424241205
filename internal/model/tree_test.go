package model

import "testing"

// TestTree: copies are apart from one another, and a crash leaves what was flushed or something later.
func TestTree(t *testing.T) {
	m := NewTree("disk", 2)
	m.Copy("disk", "a")
	zeros := make([]byte, 2*Block)
	want(t, "a new node", m.Shows("a", zeros), nil)
	first := append(m.Write("a", 0), make([]byte, Block)...)
	m.Flush("a")
	m.Copy("a", "a@c")
	second := append(m.Write("a", 0), make([]byte, Block)...)
	want(t, "the node", m.Shows("a", second), nil)
	want(t, "the checkpoint", m.Shows("a@c", first), nil)
	want(t, "the node after a crash", m.Allows("a", first), nil)
	for what, err := range map[string]error{
		"an older number":               m.Shows("a", first),
		"what was flushed is lost":      m.Allows("a", zeros),
		"a write after the checkpoint":  m.Allows("a@c", second),
		"half a block":                  m.Allows("a", append(append(second[:Block/2:Block/2], first[Block/2:Block]...), zeros[Block:]...)),
		"a dropped element":             func() error { m.Drop("a@c"); return m.Shows("a@c", first) }(),
		"a block that was made zero":    func() error { m.Zero("a", 0); return m.Shows("a", second) }(),
		"a block that was rolled back":  func() error { m.Copy("disk", "a"); return m.Allows("a", second) }(),
		"a block less than there are":   m.Shows("a", zeros[:Block]),
		"an element that never existed": m.Shows("b", zeros),
	} {
		if err == nil {
			t.Errorf("%s is not noticed", what)
		}
	}
	want(t, "names", m.Names(), "[a disk]")
}
