package qcow2

import (
	"bytes"
	"errors"
	"runtime"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// data writes n bytes, at most a buffer, within the reach of one L2 table.
func (e *exporter) data(off, n int64) error {
	b := e.buf[:n]
	if _, err := e.src.ReadAt(b, off); err != nil {
		return err
	}
	if tail := n % e.cs; tail != 0 { // the disk ends within the cluster
		b = e.buf[:n+e.cs-tail]
		clear(b[n:])
	}
	var plain []int64 // bytes of b
	packed := e.compress(b)
	for i := int64(0); i < int64(len(b)); i += e.cs {
		switch c := b[i : i+e.cs]; {
		case bytes.Equal(c, e.zero):
			if err := e.zeros(off+i, e.cs); err != nil {
				return err
			}
		case packed != nil && packed[i/e.cs] != nil:
			if err := e.compressed(off+i, packed[i/e.cs]); err != nil {
				return err
			}
		default:
			plain = append(plain, i)
		}
	}
	for _, i := range plain { // together, so that compressed ones are too
		at, err := e.cluster(b[i : i+e.cs])
		if err != nil {
			return err
		}
		if err := e.set(off+i, uint64(at)|copiedFlag); err != nil {
			return err
		}
	}
	return nil
}

// compress returns each cluster of b compressed, nil for those of zeros and those that don't become smaller.
func (e *exporter) compress(b []byte) [][]byte {
	if !e.o.Compress {
		return nil
	}
	packed := make([][]byte, int64(len(b))/e.cs)
	next := make(chan int, len(packed))
	for i := range packed {
		next <- i
	}
	close(next)
	var all sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(packed)) {
		all.Go(func() {
			for i := range next {
				c := b[int64(i)*e.cs:][:e.cs]
				if bytes.Equal(c, e.zero) {
					continue
				}
				pack := deflate
				if e.o.Compression == Zstd {
					pack = encodeZstd
				}
				if p := pack(c); int64(len(p)) < e.cs {
					packed[i] = p
				}
			}
		})
	}
	all.Wait()
	return packed
}

var deflaters = sync.Pool{New: func() any {
	w, err := flate.NewWriterWindow(nil, window)
	if err != nil {
		panic(err) // the window is constant
	}
	return w
}}

// deflate returns p as a raw deflate stream.
func deflate(p []byte) []byte {
	w := deflaters.Get().(*flate.Writer)
	defer deflaters.Put(w)
	b := bytes.NewBuffer(make([]byte, 0, len(p)))
	w.Reset(b)
	_, err := w.Write(p)
	if err = errors.Join(err, w.Close()); err != nil {
		panic(err) // a buffer takes everything
	}
	return b.Bytes()
}

var zstdEncoder = sync.OnceValue(func() *zstd.Encoder {
	w, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(true))
	if err != nil {
		panic(err) // the options are constant
	}
	return w
})

// encodeZstd returns p as one zstd frame.
func encodeZstd(p []byte) []byte { return zstdEncoder().EncodeAll(p, make([]byte, 0, len(p))) }

// cluster writes a whole cluster at the next cluster boundary and returns where.
func (e *exporter) cluster(b []byte) (at int64, err error) {
	if err := e.settle(); err != nil {
		return 0, err
	}
	if err := e.out.align(e.cs); err != nil {
		return 0, err
	}
	at = e.out.position()
	e.count(at, at)
	return at, e.out.write(b)
}

// compressed writes a compressed cluster behind what was written last.
func (e *exporter) compressed(off int64, b []byte) error {
	if err := e.settle(); err != nil {
		return err
	}
	at := e.out.position()
	if i := at>>e.bits - e.base; i < int64(len(e.counts)) && e.counts[i] >= maxSharers {
		if err := e.out.align(e.cs); err != nil {
			return err
		}
		at = e.out.position()
	}
	last := at + int64(len(b)) - 1
	e.count(at, last)
	if err := e.out.write(b); err != nil {
		return err
	}
	return e.set(off, compressedFlag|uint64(last>>9-at>>9)<<(62-(e.bits-8))|uint64(at))
}
