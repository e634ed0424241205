package main

import (
	"testing"
)

// FuzzSize: what parseSize takes is never negative, and says the same when it is printed in bytes.
func FuzzSize(f *testing.F) {
	for _, s := range []string{"4KiB", "64M", "16s", "1e3", "-1", "9223372036854775807", "8388608T"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseSize(s)
		if err != nil {
			return
		}
		flag := sizeFlag{n, true}
		if again, err := parseSize(flag.String()); n < 0 || err != nil || again != n {
			t.Errorf("%q is %d bytes, and %q is %d, %v", s, n, flag.String(), again, err)
		}
	})
}
