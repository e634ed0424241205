package stream

import (
	"crypto/sha256"
	"encoding/binary"
)

// Sealed sets the digests of a stream's header and frames, so that fuzzing reaches what is behind them.
func Sealed(s []byte) []byte {
	s = append([]byte(nil), s...)
	if len(s) < headerFixed {
		return s
	}
	n := int(binary.LittleEndian.Uint32(s[len(magic):]))
	at := headerFixed + n + digestLength
	if n > maxHeader || len(s) < at {
		return s
	}
	d := digestOf(s[:headerFixed+n])
	copy(s[headerFixed+n:], d[:])
	all := sha256.New()
	all.Write(s[:at])
	for len(s)-at >= frameFixed {
		heads, packed := int(binary.LittleEndian.Uint32(s[at+4:])), int(binary.LittleEndian.Uint32(s[at+12:]))
		end := at + frameFixed + heads
		if heads > len(s) || packed > len(s) || end+packed > len(s) {
			return s
		}
		if s[at] == kindLast && heads == lastLength {
			copy(s[end-sha256.Size:end], all.Sum(nil))
		}
		f := frame{packing: s[at+1], heads: s[at+frameFixed : end], packed: s[end : end+packed]}
		d := f.digest(s[at : at+16])
		copy(s[at+16:], d[:])
		all.Write(s[at:end])
		at = end + packed
	}
	return s
}
