package main

import (
	"fmt"
	"strconv"

	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/ondisk"
)

// A sizeFlag is the value of an option that takes a size, in bytes.
type sizeFlag struct {
	bytes int64
	set   bool
}

func (f *sizeFlag) String() string {
	if !f.set {
		return ""
	}
	return strconv.FormatInt(f.bytes, 10)
}

func (f *sizeFlag) Set(s string) (err error) {
	f.bytes, err = bytesize.Parse(s)
	f.set = err == nil
	return err
}

func (f *sizeFlag) Type() string { return "SIZE" }

// chunkSectors returns f as a chunk size in sectors; the default if it was not given.
func (f *sizeFlag) chunkSectors() (uint32, error) {
	if !f.set {
		return ondisk.DefaultChunkSectors, nil
	}
	sectors, err := ondisk.ChunkSectors(f.bytes)
	if err != nil {
		return 0, fmt.Errorf("--chunk-size: %w", err)
	}
	return sectors, nil
}

// bytesText formats a number of bytes: "1.5 GiB".
func bytesText(n int64) string { return bytesize.Text(n) }
