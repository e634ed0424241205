package snapshot

import "github.com/dmsnap/dmsnap/block"

// A payload is the new content of a write request: bytes, or zeros when data is nil.
type payload struct {
	data    []byte
	zero    block.ZeroFlags // how, when data is nil
	durable bool            // the caller needs it durable: FUA
}

// part is the payload of bytes [from, from+n) of the request.
func (pl payload) part(from, n int64) payload {
	if pl.data != nil {
		pl.data = pl.data[from : from+n]
	}
	return pl
}

// put applies pl to n bytes of dev at off.
func (pl payload) put(dev block.Device, off, n int64) error {
	switch {
	case pl.data == nil:
		if err := block.Zero(dev, off, n, pl.zero); err != nil || !pl.durable {
			return err
		}
		return dev.Flush()
	case pl.durable:
		return block.WriteDurable(dev, pl.data, off)
	}
	_, err := dev.WriteAt(pl.data, off)
	return err
}

// lay copies pl to b, which has the same length.
func (pl payload) lay(b []byte) {
	if pl.data == nil {
		clear(b)
		return
	}
	copy(b, pl.data)
}
