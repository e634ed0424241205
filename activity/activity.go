// Package activity observes what is done to a device: how often, how long it takes, how many bytes, how many errors, and
// which parts of the disk are written.
//
//	a := activity.Observe(dev)
//	_, err := a.WriteAt(p, off) // as on dev
//	c := a.Counts()
//	cells := a.Writes(64) // in 64 parts of the disk, how many requests changed each
//
// # Guarantees
//
//   - An observed device passes on every request, every ability and every error of the underlying device. It adds two readings of
//     the clock and a few atomic additions to a request, about a tenth of a microsecond, and no lock.
//   - All methods may be called concurrently. Counters never become smaller; those of one call of Counts may be of slightly
//     different moments.
package activity

import (
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/latency"
)

// regions is how many parts of a disk are distinguished.
const regions = 512

// A Device is an observed device. Its methods may be called concurrently.
type Device struct {
	block.Forward
	size int64

	reads, writes, flushes latency.Recorder
	readBytes, writeBytes  atomic.Uint64
	errors                 atomic.Uint64
	written                [regions]atomic.Uint32
}

// Observe returns dev, observed. A disk that grows later is mapped by the size that it has now: what lies behind it
// counts as its last part.
func Observe(dev block.Device) *Device {
	return &Device{Forward: block.NewForward(dev), size: max(dev.Size(), 1)}
}

// Counts are what was done to a device since it is observed. Durations include waiting for other requests.
type Counts struct {
	Reads, Writes, Flushes latency.Histogram // writes include zeroing, discards and durable writes
	ReadBytes              uint64
	WriteBytes             uint64 // written, zeroed or discarded
	Errors                 uint64 // requests that failed
}

// Counts returns what was counted so far. Requests that end meanwhile may be in a part of the numbers.
func (d *Device) Counts() Counts {
	return Counts{Reads: d.reads.Histogram(), Writes: d.writes.Histogram(), Flushes: d.flushes.Histogram(),
		ReadBytes: d.readBytes.Load(), WriteBytes: d.writeBytes.Load(), Errors: d.errors.Load()}
}

// Writes returns for each of n ≥ 1 equal parts of the disk how many requests changed something there, modulo 2^32. n is
// at most 512; more are 512.
func (d *Device) Writes(n int) []uint32 {
	n = min(max(n, 1), regions)
	cells := make([]uint32, n)
	for i := range regions {
		cells[i*n/regions] += d.written[i].Load()
	}
	return cells
}

// region is the part of the disk that holds the byte at off.
func (d *Device) region(off int64) int {
	if off < 0 {
		return 0
	}
	return int(min(uint64(float64(off)/float64(d.size)*regions), regions-1))
}

// changed counts a request that changed n bytes at off.
func (d *Device) changed(began latency.Instant, off, n int64, err error) {
	d.writes.Add(began.Since())
	if err != nil {
		d.errors.Add(1)
		return
	}
	d.writeBytes.Add(uint64(n))
	if n <= 0 {
		return
	}
	for i, last := d.region(off), d.region(off+n-1); i <= last; i++ {
		d.written[i].Add(1)
	}
}

// ReadAt reads from the underlying device.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	began := latency.Now()
	n, err := d.Forward.ReadAt(p, off)
	d.reads.Add(began.Since())
	d.readBytes.Add(uint64(n))
	if err != nil {
		d.errors.Add(1)
	}
	return n, err
}

// ReadCached executes reads on the underlying device. Each that is done is counted, with its share of the time.
func (d *Device) ReadCached(reads []block.Read) int {
	began := latency.Now()
	n := d.Forward.ReadCached(reads)
	if n == 0 {
		return 0
	}
	each := began.Since() / time.Duration(n)
	for i := range reads {
		if reads[i].Done {
			d.reads.Add(each)
			d.readBytes.Add(uint64(len(reads[i].P)))
		}
	}
	return n
}

// WriteAt writes to the underlying device.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	began := latency.Now()
	n, err := d.Forward.WriteAt(p, off)
	d.changed(began, off, int64(n), err)
	return n, err
}

// WriteDurableAt writes durably to the underlying device. What that lacks is not counted: the caller writes and flushes.
func (d *Device) WriteDurableAt(p []byte, off int64) error {
	began := latency.Now()
	err := d.Forward.WriteDurableAt(p, off)
	if err != block.ErrUnsupported {
		d.changed(began, off, int64(len(p)), err)
	}
	return err
}

// WriteLastAt writes to the underlying device whatever failed there before.
func (d *Device) WriteLastAt(p []byte, off int64) error {
	began := latency.Now()
	err := d.Forward.WriteLastAt(p, off)
	if err != block.ErrUnsupported {
		d.changed(began, off, int64(len(p)), err)
	}
	return err
}

// ZeroAt zeroes a range of the underlying device. Where that is not fast it is not counted: the caller writes.
func (d *Device) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	began := latency.Now()
	err := d.Forward.ZeroAt(off, n, flags)
	if err != block.ErrNotFast {
		d.changed(began, off, n, err)
	}
	return err
}

// Discard discards a range of the underlying device.
func (d *Device) Discard(off, n int64) error {
	began := latency.Now()
	err := d.Forward.Discard(off, n)
	d.changed(began, off, n, err)
	return err
}

// Flush flushes the underlying device.
func (d *Device) Flush() error {
	began := latency.Now()
	err := d.Forward.Flush()
	d.flushes.Add(began.Since())
	if err != nil {
		d.errors.Add(1)
	}
	return err
}
