package stream

import (
	"sync"

	"github.com/klauspost/compress/zstd"
)

// buffers are for data of one frame each. That of many small frames is not kept in them.
var buffers = sync.Pool{New: func() any { return new([maxData]byte) }}

// buffer returns n ≤ maxData bytes, whose content is anything; recycle gives them up.
func buffer(n int) []byte {
	if n <= maxData/2 {
		return make([]byte, n)
	}
	return buffers.Get().(*[maxData]byte)[:n]
}

func recycle(b []byte) {
	if cap(b) == maxData {
		buffers.Put((*[maxData]byte)(b[:maxData]))
	}
}

// encoder and decoder are made once; both are safe for concurrent use.
var encoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false))
	if err != nil {
		panic(err) // the options are constants
	}
	return e
})

var decoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(2*maxData), zstd.WithDecoderConcurrency(0))
	if err != nil {
		panic(err)
	}
	return d
})
