package main

import "testing"

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
