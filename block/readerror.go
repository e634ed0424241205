package block

import (
	"errors"
	"fmt"
	"strings"
)

// A ReadError says which bytes of a disk could not be read, for a disk that is made of other devices.
type ReadError struct {
	Off, Length int64
	From        string // what holds them; may be empty
	Err         error
}

// NewReadError returns err as one of a read of n bytes at off of a disk. Where a device beneath has said that of the same bytes, which it holds
// at the same place, it is err itself.
func NewReadError(off, n int64, from string, err error) error {
	var beneath *ReadError
	if errors.As(err, &beneath) && beneath.Off >= off && beneath.Off < off+n {
		return err
	}
	return &ReadError{off, n, from, err}
}

func (e *ReadError) Error() string {
	from, text := e.From, e.Err.Error()
	if from != "" {
		from = " from " + from
	}
	text = strings.TrimPrefix(text, "read ") // of a file: its name, and the byte of it, follow
	return fmt.Sprintf("read %d bytes of the disk at byte %d%s: %s", e.Length, e.Off, from, text)
}

func (e *ReadError) Unwrap() error { return e.Err }
