package stream

import (
	"sync"

	"github.com/klauspost/compress/zstd"
)

// A buffer has the data of one frame, or that data packed, which may be a few bytes more until it is given up.
const bufferLength = maxData + 4096

var buffers = sync.Pool{New: func() any { return new([bufferLength]byte) }}

// frameBuffer returns bufferLength bytes, whose content is anything; recycle gives them up.
func frameBuffer() []byte { return buffers.Get().(*[bufferLength]byte)[:] }

// buffer returns n ≤ maxData bytes, whose content is anything; recycle gives them up. That of many small frames is not
// kept in buffers of a whole one.
func buffer(n int) []byte {
	if n <= maxData/2 {
		return make([]byte, n)
	}
	return frameBuffer()[:n]
}

// recycle gives up a buffer, of which b is the beginning.
func recycle(b []byte) {
	if cap(b) == bufferLength {
		buffers.Put((*[bufferLength]byte)(b[:bufferLength]))
	}
}

// pack makes the new bytes one zstd frame, where that is shorter.
func (f *frame) pack() {
	if packed := encoder().EncodeAll(f.packed, frameBuffer()[:0]); len(packed) < len(f.packed) {
		recycle(f.packed)
		f.packing, f.packed = packedZstd, packed
	} else {
		recycle(packed)
	}
}

// encoder and decoder are made once; both are safe for concurrent use. The window is a whole frame: a longer one would only
// take memory.
var encoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false), zstd.WithWindowSize(maxData),
		zstd.WithLowerEncoderMem(true), zstd.WithEncoderConcurrency(workers()))
	if err != nil {
		panic(err) // the options are constants
	}
	return e
})

var decoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(2*maxData), zstd.WithDecoderConcurrency(workers()))
	if err != nil {
		panic(err)
	}
	return d
})
