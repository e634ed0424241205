package diff

import (
	"bytes"
	"context"
	"iter"

	"github.com/dmsnap/dmsnap/ondisk"
)

// compareBytes is how much is read of each view at once.
const compareBytes = 1 << 20

// Verified reads both views wherever a store has exceptions, and yields those places, ascending and
// joined, as Changed or Copied, exact to the sector (to 512 bytes from the disk's beginning). It needs
// 2 MiB. An error is the last thing it yields: ctx's cause, or a failed read with its place.
func (d *Diff) Verified(ctx context.Context) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		c := comparison{d: d, a: make([]byte, compareBytes), b: make([]byte, compareBytes),
			yield: func(e Extent) bool { return yield(e, nil) }}
		for e := range d.Extents() {
			for end := e.Off + e.Length; e.Off < end; {
				if ctx.Err() != nil {
					c.fail(context.Cause(ctx), yield)
					return
				}
				n := min(end-e.Off, compareBytes-e.Off%compareBytes)
				if err := c.piece(e.Off, n); err != nil {
					c.fail(err, yield)
					return
				}
				if c.stopped {
					return
				}
				e.Off += n
			}
		}
		c.end()
	}
}

// comparison joins the results of pieces to extents.
type comparison struct {
	d       *Diff
	a, b    []byte
	open    Extent // still growing, when its length is not 0
	yield   func(Extent) bool
	stopped bool // yield returned false
}

// piece compares n bytes at off.
func (c *comparison) piece(off, n int64) error {
	a, b := c.a[:n], c.b[:n]
	if _, err := c.d.left.ReadAt(a, off); err != nil {
		return err
	}
	if _, err := c.d.right.ReadAt(b, off); err != nil {
		return err
	}
	if bytes.Equal(a, b) { // the usual piece, at the speed of memory
		c.add(Extent{off, n, Copied})
		return nil
	}
	for len(a) > 0 {
		k := min(ondisk.SectorSize-off%ondisk.SectorSize, int64(len(a)))
		class := Changed
		if bytes.Equal(a[:k], b[:k]) {
			class = Copied
		}
		c.add(Extent{off, k, class})
		a, b, off = a[k:], b[k:], off+k
	}
	return nil
}

func (c *comparison) add(e Extent) {
	if c.open.Length > 0 && c.open.Class == e.Class && c.open.Off+c.open.Length == e.Off {
		c.open.Length += e.Length
		return
	}
	c.end()
	c.open = e
}

// end yields the open extent.
func (c *comparison) end() {
	if c.open.Length > 0 && !c.stopped {
		c.stopped = !c.yield(c.open)
	}
	c.open = Extent{}
}

// fail yields the open extent, and then the error.
func (c *comparison) fail(err error, yield func(Extent, error) bool) {
	if c.end(); !c.stopped {
		yield(Extent{}, err)
	}
}
