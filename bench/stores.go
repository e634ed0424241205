package main

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"

	"github.com/dmsnap/dmsnap/ondisk"
)

const million = 1 << 20 // of exceptions and chunks, as elsewhere in the project

// sparse makes a file of a size with nothing in it.
func sparse(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// spread is a bijection on [0, space), without pattern: one on the next power of two, repeated until it is inside.
func spread(i, space uint64) uint64 {
	mask := uint64(1)<<bits.Len64(space-1) - 1
	for {
		for range 3 {
			i = (i*0x9E3779B97F4A7C15 + 0x1234567) & mask
			i ^= i >> 13
		}
		if i < space {
			return i
		}
	}
}

// scatteredOver is how many chunks the origin has for each scattered exception.
const scatteredOver = 4

// writeStore writes a store of n exceptions with chunks of 4 KiB, and a sparse origin for it. Data chunks are holes.
// The exceptions are of origin chunks 0 to n-1 in order, or scattered over an origin four times as large.
func writeStore(origin, cow string, n uint64, scattered bool) error {
	l, err := ondisk.NewLayout(8)
	if err != nil {
		return err
	}
	chunks := n * scatteredOver
	if err := sparse(origin, int64(chunks)*l.ChunkBytes()); err != nil {
		return err
	}
	if err := sparse(cow, int64(l.ChunksNeeded(n))*l.ChunkBytes()); err != nil {
		return err
	}
	f, err := os.OpenFile(cow, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	area := make([]byte, l.ChunkBytes())
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: ondisk.Version, ChunkSectors: l.ChunkSectors}.Encode(area)
	if _, err := f.WriteAt(area, 0); err != nil {
		return err
	}
	slots := l.SlotsPerArea()
	for first := uint64(0); first < n; first += slots {
		clear(area)
		for i := first; i < min(first+slots, n); i++ {
			old := i
			if scattered {
				old = spread(i, chunks)
			}
			e := ondisk.Exception{Old: ondisk.OriginChunk(old), New: l.DataChunk(i)}
			e.Encode(area[(i-first)*ondisk.SlotSize:])
		}
		if _, err := f.WriteAt(area, l.COWOffset(l.AreaChunk(first/slots))); err != nil {
			return err
		}
	}
	return f.Close()
}

// bigStore returns the paths of a store of n exceptions and its origin, made when they are first asked for.
func (l *lab) bigStore(ctx context.Context, n uint64, scattered bool) (origin, cow string, err error) {
	name := fmt.Sprintf("sequential%d", n)
	if scattered {
		name = fmt.Sprintf("scattered%d", n)
	}
	l, err = l.in("big", 0)
	if err != nil {
		return "", "", err
	}
	origin, cow = l.path(name+".img"), l.path(name+".cow")
	if _, err := os.Stat(cow); err == nil {
		return origin, cow, nil
	}
	if err := writeStore(origin, cow, n, scattered); err != nil {
		return "", "", err
	}
	settle()
	// Once before it counts: its pages are in the cache afterwards, and holes of the file are not.
	return origin, cow, command(ctx, l.binary, "status", cow)
}

// dropStores removes what bigStore made.
func dropStores(l *lab) error { return os.RemoveAll(l.path("big")) }
