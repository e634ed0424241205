package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"github.com/dmsnap/dmsnap/block"
)

// maxWindow is the largest window of a zstd frame that is accepted, in bytes: QEMU's limit. No window is allocated: a
// frame is decoded into the cluster, which is its own history.
const maxWindow = 128 << 20

// compressedAt returns where the data of a compressed cluster begins, by its L2 entry, and how many further sectors it has
// behind the one with that byte (docs/spec/qcow2.md §5.4). bits is the log2 of the cluster size.
func compressedAt(entry uint64, bits uint) (host, sectors int64) {
	x := 62 - (bits - 8)
	return int64(entry & (1<<x - 1)), int64(entry &^ (compressedFlag | copiedFlag) >> x)
}

// cluster returns the content of a compressed cluster. off is a byte of the disk, for errors.
func (i *Image) cluster(entry uint64, off int64) ([]byte, error) {
	host, sectors := compressedAt(entry, i.bits)
	place := fmt.Sprintf("compressed cluster at byte %d of the disk, image byte %d", off&^(i.info.ClusterSize-1), host)
	if host>>56 != 0 {
		return nil, corrupt(place, "reserved bits are set in the L2 entry 0x%016x", entry)
	}
	if host >= i.file.Size() {
		return nil, corrupt(place, "the file ends at byte %d: is it truncated?", i.file.Size())
	}
	return i.clusters.get(int64(entry&^copiedFlag), func() ([]byte, error) {
		in := make([]byte, (sectors+1)*block.SectorSize-host%block.SectorSize)
		if n := min(int64(len(in)), i.file.Size()-host); n > 0 {
			if _, err := i.file.ReadAt(in[:n], host); err != nil {
				return nil, fmt.Errorf("%s: %w", place, err)
			}
		}
		out := make([]byte, i.info.ClusterSize)
		decode := inflate
		if i.info.Compression == Zstd {
			decode = decodeZstd
		}
		if err := decode(out, in); err != nil {
			return nil, corrupt(place, "%s: %v", i.info.Compression, err)
		}
		return out, nil
	})
}

var inflaters = sync.Pool{New: func() any { return flate.NewReader(bytes.NewReader(nil)) }}

// inflate fills out with what in, a raw deflate stream, begins with.
func inflate(out, in []byte) error {
	r := inflaters.Get().(io.ReadCloser)
	defer inflaters.Put(r)
	if err := r.(flate.Resetter).Reset(bytes.NewReader(in), nil); err != nil {
		return err
	}
	n, err := io.ReadFull(r, out)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the stream ends after %d of %d bytes", n, len(out))
	}
	return err
}

var zstdDecoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		panic(err) // the options are constant
	}
	return d
})

// decodeZstd fills out with the frames that in begins with. They must end where out does; what follows is not looked at.
func decodeZstd(out, in []byte) error {
	done := 0
	for done < len(out) {
		n, err := frameBytes(in)
		if err != nil {
			return err
		}
		got, err := zstdDecoder().DecodeAll(in[:n], out[done:done:len(out)])
		if err != nil {
			return err
		}
		done, in = done+len(got), in[n:]
	}
	return nil
}

// frameBytes returns the length of the zstd frame that b begins with (RFC 8878, section 3.1).
func frameBytes(b []byte) (int, error) {
	var h zstd.Header
	if err := h.Decode(b); err != nil {
		return 0, err
	}
	n := int64(h.HeaderSize)
	if h.Skippable {
		n += int64(h.SkippableSize)
	}
	for last := h.Skippable; !last; {
		if int64(len(b))-n < 3 {
			return 0, io.ErrUnexpectedEOF
		}
		word := uint32(binary.LittleEndian.Uint16(b[n:])) | uint32(b[n+2])<<16
		size := int64(word >> 3)
		if word>>1&3 == 1 { // a run of one byte
			size = 1
		}
		last = word&1 != 0
		n += 3 + size
	}
	if h.HasCheckSum && !h.Skippable {
		n += 4
	}
	if n > int64(len(b)) {
		return 0, io.ErrUnexpectedEOF
	}
	return int(n), nil
}
