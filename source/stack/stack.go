// Package stack has disks made of sealed layers: exception stores that are never changed any more, one over the other,
// over a base.
//
//	golden := stack.New(base, base.Size())
//	first := golden.With(stack.NewLayer(st), golden.Size()) // golden can still be used
//	for first.Compact() {                                   // in the background
//	}
//	origin := snapshot.NewOrigin(first)                     // and a snapshot of it on top, which can be written to
//
// A read finds the newest layer that holds a byte in a merged index, so that it takes about as long through 64 layers
// as through one. The index is shared by all chains with the same layers.
//
// # Index
//
// The index of a [Chain] is a list of segments, newest first. A segment says which chunks some adjacent layers hold, and
// where. That of a new layer is the map of its store; Compact merges adjacent segments, where the newer layer's exceptions
// replace the older one's:
//
//	layers      5   4   3   2   1   base            bottom-up 1 to 5
//	segments   [5] [4] [3] [2   1]                   before
//	           [5   4   3] [2   1]                   after a step
//
// A merged segment maps an origin chunk to a virtual chunk. Each layer has a range of them, so that one number says
// which layer and which COW chunk:
//
//	layer               1              2                  3
//	virtual chunk  0 … used-1 | base … base+used-1 | base …
//
// A segment is merged with all newer ones unless it is more than four times as large as they are together. So there are
// few of them however many layers there are, and each exception is merged a few times only. Layers with chunks of another size have segments
// of their own.
//
// # Guarantees
//
// A chain can only be read. All methods may be called concurrently. Nothing may write to a device of a layer, or add
// exceptions to its store. The base may change while it is read, if its own reads allow for that.
package stack

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"weak"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// A Layer is one sealed exception store.
type Layer struct {
	cow    block.Device
	layout ondisk.Layout
	count  uint64                      // exceptions
	used   uint64                      // its COW chunks are below
	store  atomic.Pointer[store.Store] // nil: durable

	mu      sync.Mutex
	own     weak.Pointer[segment]   // of it alone, as long as a chain has it
	merged  []weak.Pointer[segment] // whose uppermost layer it is, as long as a chain has them
	merging sync.Mutex              // one such segment is made at a time
}

// NewLayer returns the layer of a store without an error (store.Store.Err), from which nothing is reserved and to which
// nothing is added from now on. It need not be durable yet; see SetDurable.
func NewLayer(st *store.Store) *Layer {
	l := &Layer{cow: st.Device(), layout: st.Layout(), count: st.Len()}
	l.used = st.Usage().Allocated / uint64(l.layout.ChunkSectors)
	l.store.Store(st)
	return l
}

// SetDurable says that the store's Sync succeeded after the layer was made. Before, reads of COW chunks that the store
// lost when its Sync failed are errors (store.ErrDataLost). Afterwards l does not refer to the store, whose memory is
// freed when no chain has the layer in a segment of its own: call it when the layer is in a chain.
func (l *Layer) SetDurable() { l.store.Store(nil) }

// Device is the COW device.
func (l *Layer) Device() block.Device { return l.cow }

// Layout is the arithmetic of the layer.
func (l *Layer) Layout() ondisk.Layout { return l.layout }

// Len is the number of exceptions.
func (l *Layer) Len() uint64 { return l.count }

// check returns an error when n > 0 bytes at off of the COW device were lost.
func (l *Layer) check(off, n int64) error {
	if st := l.store.Load(); st != nil {
		return st.CheckData(off, n)
	}
	return nil
}

// A Chain is a disk made of a base and layers over it. It is a block.Device that can only be read. Its content never
// changes unless that of the base does.
type Chain struct {
	base     block.Device
	baseSize int64 // bytes; behind them are zeros
	size     int64 // bytes
	block    int   // logical block size
	layers   []*Layer

	index      atomic.Pointer[[]*segment] // newest first
	compacting sync.Mutex                 // one step at a time
}

var _ interface {
	block.Device
	block.Extenter
	block.BlockSizer
	block.EarlyReader
} = (*Chain)(nil)

// New returns the chain without layers. It has size bytes, of which those behind the base read as zeros. It panics when
// the base has more.
func New(base block.Device, size int64) *Chain {
	c := &Chain{base: base, baseSize: base.Size(), size: size, block: block.BlockSize(base)}
	if size < c.baseSize {
		panic(fmt.Sprintf("stack: %d bytes over a base of %d", size, c.baseSize))
	}
	c.index.Store(new([]*segment))
	return c
}

// With returns the chain that has l above the layers of c, and size bytes, of which those behind c read as zeros where l
// has nothing. It shares the index with c, which is not changed. It panics when c has more bytes, or when the memory of l
// was freed (see Layer.SetDurable).
func (c *Chain) With(l *Layer, size int64) *Chain {
	if size < c.size {
		panic(fmt.Sprintf("stack: %d bytes over a chain of %d", size, c.size))
	}
	d := &Chain{base: c.base, baseSize: c.baseSize, size: size, block: max(c.block, block.BlockSize(l.cow))}
	d.layers = append(slices.Clip(c.layers), l)
	index := *c.index.Load()
	if l.count > 0 {
		index = slices.Concat([]*segment{l.segment(len(c.layers), size)}, index)
	}
	d.index.Store(&index)
	return d
}

// Layers returns the layers bottom-up. The caller must not change them.
func (c *Chain) Layers() []*Layer { return c.layers }

// Base is the device under the layers.
func (c *Chain) Base() block.Device { return c.base }

// Size is in bytes.
func (c *Chain) Size() int64 { return c.size }

// BlockSize is the largest logical block size of the devices, in bytes.
func (c *Chain) BlockSize() int { return c.block }

// WriteAt returns block.ErrReadOnly.
func (c *Chain) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }

// Flush does nothing: there is nothing to make durable.
func (c *Chain) Flush() error { return nil }
