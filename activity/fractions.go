package activity

import "github.com/dmsnap/dmsnap/block"

// cellCalls bounds how often Fractions asks for the extents of one part.
const cellCalls = 16

// Fractions returns for each of n ≥ 1 equal parts of a disk of size bytes the fraction that has extents with all flags
// of want, 0 to 1. extents is like [block.Extenter]: it may stop early. It is called at most 16 times for each part:
// where the extents of a part are many, its fraction is that of its beginning.
func Fractions(size int64, n int, want block.ExtentFlags, extents func(off, n int64) ([]block.Extent, error)) ([]float64, error) {
	n = int(min(int64(max(n, 1)), max(size/block.SectorSize, 1)))
	cells := make([]float64, n)
	bound := func(i int) int64 { // of part i, without overflow
		return size/int64(n)*int64(i) + size%int64(n)*int64(i)/int64(n)
	}
	var ahead []block.Extent // what the last call said of the bytes from at on
	at := int64(0)
	for i := range cells {
		begin, end := bound(i), bound(i+1)
		var seen, found int64
		for off, calls := begin, 0; off < end && calls < cellCalls; {
			for len(ahead) > 0 && at+ahead[0].Length <= off { // behind
				at, ahead = at+ahead[0].Length, ahead[1:]
			}
			if len(ahead) == 0 {
				calls++
				var err error
				if ahead, err = extents(off, size-off); err != nil {
					return nil, err
				}
				if at = off; len(ahead) == 0 || ahead[0].Length <= 0 {
					break
				}
			}
			k := min(end, at+ahead[0].Length) - off
			seen += k
			if ahead[0].Flags&want == want {
				found += k
			}
			off += k
		}
		if seen > 0 {
			cells[i] = float64(found) / float64(seen)
		}
	}
	return cells, nil
}
