package bytesize

import (
	"strconv"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	good := map[string]int64{
		"0": 0, "512": 512, "512b": 512, "16s": 8192, "4k": 4096, "4K": 4096, "4KiB": 4096, "4kib": 4096, "4Ki": 4096,
		"4kB": 4000, "64M": 64 << 20, "1MB": 1e6, "10GiB": 10 << 30, "2T": 2 << 40, "1PiB": 1 << 50,
		"9223372036854775807": 1<<63 - 1,
	}
	for s, want := range good {
		if got, err := Parse(s); err != nil || got != want {
			t.Errorf("Parse(%q) = %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "k", "-1", "+1", "1.5G", "4 KiB", "4x", "0x10", "4KiBB", " 1", "1k1"} {
		if got, err := Parse(s); err == nil || !strings.Contains(err.Error(), "not a size") {
			t.Errorf("Parse(%q) = %d, %v, want an error that says what a size is", s, got, err)
		}
	}
	for _, s := range []string{"9223372036854775808", "99999999999999999999999", "8388608T", "18014398509481984s"} {
		if got, err := Parse(s); err == nil || !strings.Contains(err.Error(), "too large") {
			t.Errorf("Parse(%q) = %d, %v, want too large", s, got, err)
		}
	}
}

func TestBytesText(t *testing.T) {
	for n, want := range map[int64]string{0: "0 bytes", 1023: "1023 bytes", 1024: "1 KiB", 1536: "1.5 KiB", 64 << 20: "64 MiB", 1<<63 - 1: "8 EiB"} {
		if got := Text(n); got != want {
			t.Errorf("Text(%d) = %q, want %q", n, got, want)
		}
	}
}

// FuzzSize: what Parse takes is never negative, and says the same when it is printed in bytes.
func FuzzSize(f *testing.F) {
	for _, s := range []string{"4KiB", "64M", "16s", "1e3", "-1", "9223372036854775807", "8388608T"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := Parse(s)
		if err != nil {
			return
		}
		text := strconv.FormatInt(n, 10)
		if again, err := Parse(text); n < 0 || err != nil || again != n {
			t.Errorf("%q is %d bytes, and %q is %d, %v", s, n, text, again, err)
		}
	})
}
