package merge

import (
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// Estimate guesses how long Offline takes with these devices, with the writing of an undo store before it
// if so asked. It reads samples of the COW device, for a third of a second at most, and takes it that all
// else that is read and written goes as fast: a cache makes the guess too short, an origin on a slower disk
// than the COW device does too. Errors: as Plan; of a read.
func Estimate(origin, cow block.Device, undo bool) (time.Duration, error) {
	m, err := load(origin, cow)
	if err != nil {
		return 0, err
	}
	defer m.Close()
	w := workOf(m.Store(), origin.Size())
	if w.Bytes == 0 {
		return 0, nil
	}
	used := min(int64(m.Store().Usage().Allocated)*ondisk.SectorSize, cow.Size())
	read, took, err := sample(cow, used)
	if err != nil {
		return 0, err
	}
	moved := 2 * w.Bytes // read and written
	if undo {
		moved += 2 * w.Bytes
	}
	return time.Duration(float64(took) / float64(read) * float64(moved)), nil
}

// sample reads pieces here and there in the first so many bytes of dev.
func sample(dev block.Device, used int64) (read int64, took time.Duration, err error) {
	const (
		pieces   = 32
		patience = time.Second / 3
	)
	buf := make([]byte, min(1<<20, used))
	began := time.Now()
	for i := int64(0); i < pieces && took < patience; i++ {
		at := (used - int64(len(buf))) / pieces * i
		if _, err := dev.ReadAt(buf, at); err != nil {
			return 0, 0, err
		}
		read += int64(len(buf))
		took = max(1, time.Since(began))
	}
	return read, took, nil
}
