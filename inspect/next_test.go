package inspect

import "testing"

func TestWithoutExtension(t *testing.T) {
	for in, want := range map[string]string{"a.cow": "a", "/a.b/c": "/a.b/c", "/a/.cow": "/a/.cow", "x.y.z": "x.y"} {
		if got := withoutExtension(in); got != want {
			t.Errorf("%q without its extension is %q, want %q", in, got, want)
		}
	}
}
