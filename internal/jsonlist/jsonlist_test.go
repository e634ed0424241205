package jsonlist

import (
	"strings"
	"testing"
)

func TestWriter(t *testing.T) {
	for want, elements := range map[string][]int{"[]\n": nil, "[\n1\n]\n": {1}, "[\n1,\n2\n]\n": {1, 2}} {
		var b strings.Builder
		l := New(&b)
		for _, e := range elements {
			if err := l.Add(e); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.End(); err != nil || b.String() != want {
			t.Errorf("%v: %q, %v, want %q", elements, b.String(), err, want)
		}
	}
	if err := New(new(strings.Builder)).Add(make(chan int)); err == nil {
		t.Error("a channel was written as JSON")
	}
}
