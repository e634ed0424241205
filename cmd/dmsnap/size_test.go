package main

import (
	"strings"
	"testing"
)

func TestParseSize(t *testing.T) {
	good := map[string]int64{
		"0": 0, "512": 512, "512b": 512, "16s": 8192, "4k": 4096, "4K": 4096, "4KiB": 4096, "4kib": 4096, "4Ki": 4096,
		"4kB": 4000, "64M": 64 << 20, "1MB": 1e6, "10GiB": 10 << 30, "2T": 2 << 40, "1PiB": 1 << 50,
		"9223372036854775807": 1<<63 - 1,
	}
	for s, want := range good {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "k", "-1", "+1", "1.5G", "4 KiB", "4x", "0x10", "4KiBB", " 1", "1k1"} {
		if got, err := parseSize(s); err == nil || !strings.Contains(err.Error(), "not a size") {
			t.Errorf("parseSize(%q) = %d, %v, want an error that says what a size is", s, got, err)
		}
	}
	for _, s := range []string{"9223372036854775808", "99999999999999999999999", "8388608T", "18014398509481984s"} {
		if got, err := parseSize(s); err == nil || !strings.Contains(err.Error(), "too large") {
			t.Errorf("parseSize(%q) = %d, %v, want too large", s, got, err)
		}
	}
}

func TestChunkSize(t *testing.T) {
	for s, want := range map[string]uint32{"512": 1, "1s": 1, "4KiB": 8, "1GiB": 2097152} {
		var f sizeFlag
		if err := f.Set(s); err != nil {
			t.Fatal(err)
		}
		if got, err := f.chunkSectors(); err != nil || got != want {
			t.Errorf("chunk size %s: %d sectors, %v, want %d", s, got, err, want)
		}
	}
	for _, n := range []int64{0, 7, 513, 1536, 2 << 30, 1 << 41, 1<<63 - 512, -512, -(1<<32 - 1) * 512} {
		f := sizeFlag{n, true}
		if got, err := f.chunkSectors(); err == nil {
			t.Errorf("chunk size of %d bytes: %d sectors, want an error", n, got)
		}
	}
	if got, err := new(sizeFlag).chunkSectors(); err != nil || got != 8 {
		t.Errorf("default chunk: %d, %v, want 8", got, err)
	}
}

func TestBytesText(t *testing.T) {
	for n, want := range map[int64]string{0: "0 bytes", 1023: "1023 bytes", 1024: "1 KiB", 1536: "1.5 KiB", 64 << 20: "64 MiB", 1<<63 - 1: "8 EiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("bytesText(%d) = %q, want %q", n, got, want)
		}
	}
}
