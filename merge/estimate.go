package merge

import (
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// Estimate guesses how long Offline takes with these devices, with the writing of an undo store before it
// if so asked. It reads samples of the COW device, for a third of a second at most, and takes it that all
// else is read as fast, and written no faster than fastestWrite: what is cached says nothing of a disk. An
// origin on a slower disk than the COW device makes the guess too short. Errors: as Plan; of a read.
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
	reading := float64(took) / float64(read) // nanoseconds a byte
	writing := max(reading, float64(time.Second)/fastestWrite)
	moved := float64(w.Bytes)
	if undo {
		moved *= 2
	}
	return time.Duration(moved * (reading + writing)), nil
}

// fastestWrite is the most that is expected to become durable on a disk in a second, in bytes.
const fastestWrite = 400 << 20

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
