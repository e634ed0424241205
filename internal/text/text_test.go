package text

import "testing"

func TestShellWords(t *testing.T) {
	for in, want := range map[string]string{"/dev/vg/a-cow": "/dev/vg/a-cow", "": "''", "a b": "'a b'", "it's": `'it'\''s'`, "$HOME": "'$HOME'", "\n": "'\n'"} {
		if got := ShellWords(in); got != want {
			t.Errorf("%q becomes %s, want %s", in, got, want)
		}
	}
	if got := ShellWords("a", "b c"); got != "a 'b c'" {
		t.Errorf("two words become %s", got)
	}
}

func TestNamesAndCounts(t *testing.T) {
	for in, want := range map[string]string{"disk": "disk", "a b": `"a b"`, "\x1b[": `"\x1b["`, "é": "é", "": ""} {
		if got := Name(in); got != want {
			t.Errorf("%q is printed as %s, want %s", in, got, want)
		}
	}
	if one, two := Count(1, "range"), Count(2, "range"); one != "1 range" || two != "2 ranges" {
		t.Errorf("%s, %s", one, two)
	}
}
