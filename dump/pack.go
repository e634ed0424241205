package dump

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/block"
)

// packedLine begins a packed dump: one line that says what it is, then the text, by gzip.
const packedLine = "dmsnap packed store 1"

// Pack writes the metadata of dev to w, compressed: some bytes a run of exceptions, and none of the data, so
// that it can go with a bug report. [Restore] reads it. Errors are those of [Text].
func Pack(ctx context.Context, w io.Writer, dev block.Device, o Options) error {
	o.Data = false
	if _, err := io.WriteString(w, packedLine+"\n"); err != nil {
		return err
	}
	z := gzip.NewWriter(w)
	err := Text(ctx, z, dev, o)
	if err != nil && !errors.Is(err, ErrUnreadable) {
		return err
	}
	return errors.Join(err, z.Close())
}

// unpack returns the text of a packed dump whose first line was read.
func unpack(r io.Reader) (io.Reader, error) {
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, &SyntaxError{0, fmt.Sprintf("packed dump: %v", err)}
	}
	return z, nil
}
