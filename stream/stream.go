// Package stream sends what changed on a disk to another copy of that disk: what a snapshot shows and its origin
// does not, what changed between two snapshots, or a whole disk (docs/stream.md).
//
//	from, err := stream.Between(origin, monday, tuesday)
//	sent, err := stream.Send(ctx, w, from, stream.SendOptions{})          // here
//
//	r, err := stream.NewReader(rd)                                        // there
//	got, err := r.Apply(ctx, disk, stream.ApplyOptions{})
//
// A stream has, for each block of 4 KiB that changed, its new bytes, a digest of them, and a digest of the bytes
// that they replace. A block is written where the target holds the old bytes, and skipped where it holds the new ones.
// A target that holds anything else is not the disk that the stream was made for, and is refused with the place. Since
// blocks that are there already are skipped, a receiver that was interrupted is started again with the same stream.
//
// # Guarantees
//
//   - Nothing of a frame is used before its digests were verified, and nothing is written before the beginning of
//     the stream (ApplyOptions.CompareFirst bytes) was compared with the target.
//   - When Apply returns without an error the target holds the new bytes durably, and the stream was complete.
//   - Memory is bounded, whatever the stream says: see ApplyOptions.CompareFirst.
//
// Old bytes are compared, not kept: who wants to go back applies the stream to an origin with a snapshot.
package stream

import (
	"errors"
	"fmt"
)

// Block is the unit that is sent, compared and written, in bytes. The last block of a disk may be shorter.
const Block = 4096

// ErrFormat reports bytes that are no stream, or a stream that was changed, cut or continued. Errors that wrap it are
// *FormatError.
var ErrFormat = errors.New("not a whole stream")

// A FormatError is a fault of a stream, at a byte of it.
type FormatError struct {
	At      int64 // byte of the stream, that of the frame which has the fault
	Problem string
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("byte %d of the stream: %s", e.At, e.Problem)
}

// Is makes a FormatError an ErrFormat.
func (e *FormatError) Is(target error) bool { return target == ErrFormat }

// A MismatchError reports a target that holds neither what a stream replaces nor what it brings: it is another disk, or
// was written to since.
type MismatchError struct {
	Off int64 // byte of the disk
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("byte %d of the target: neither the bytes that the stream replaces nor those that it brings: "+
		"another disk, or one that was written to since", e.Off)
}

// A Kind says what a stream holds.
type Kind string

const (
	Delta Kind = "delta" // the blocks that changed
	Disk  Kind = "disk"  // a whole disk: what is in no record reads as zeros
)

// A Header is the beginning of a stream.
type Header struct {
	Kind Kind  `json:"kind"`
	Size int64 `json:"size"` // of the disk, in bytes
	// From is the byte of the disk at which the stream begins, a multiple of Block: 0, or more where it goes on after
	// an interruption.
	From int64 `json:"from,omitempty"`
}

// A Count is what a stream holds, or what became of it.
type Count struct {
	Records int64 `json:"records"`    // runs of blocks
	Data    int64 `json:"data_bytes"` // bytes of the disk that were sent
	Zero    int64 `json:"zero_bytes"` // bytes of the disk that are zeros now, and were not sent
}

func (c *Count) add(d Count) {
	c.Records += d.Records
	c.Data += d.Data
	c.Zero += d.Zero
}
