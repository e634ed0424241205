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

func TestWithoutSecrets(t *testing.T) {
	for s, want := range map[string]string{
		"disk.img: no such file":                                     "disk.img: no such file",
		"http://me:s3cr3t@host:1/disk.img?sig=s3cr3t":                "http://host:1/disk.img",
		"https://host?sig=s3cr3t: gone":                              "https://host: gone",
		`Get "https://h/x?a=s3cr3t&b=s3cr3t": EOF (http://s3cr3t@h)`: `Get "https://h/x": EOF (http://h)`,
		"'https://h/x?s3cr3t', twice https://s3cr3t:@h/a@b":          "'https://h/x', twice https://h/a@b",
		"oci://host/repo@sha256:12 and s3://b/k":                     "oci://host/repo@sha256:12 and s3://b/k",
		"nbd+unix:///vm1?socket=/run/s.sock":                         "nbd+unix:///vm1?socket=/run/s.sock",
		"ftp://user:s3cr3t@host/x?k=s3cr3t":                          "ftp://host/x",
	} {
		if got := WithoutSecrets(s); got != want {
			t.Errorf("%s: %s, not %s", s, got, want)
		}
	}
}
