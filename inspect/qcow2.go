package inspect

import (
	"context"
	"errors"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/qcow2"
)

// A QCOW2 describes the inside of a qcow2 image. Names are as they are in the image.
type QCOW2 struct {
	SizeBytes   int64  `json:"size_bytes"` // of the disk in it
	ClusterSize int64  `json:"cluster_size"`
	Compression string `json:"compression"`
	// Encryption is the method, of an image that is encrypted and can't be read.
	Encryption string `json:"encryption,omitempty"`
	Dirty      bool   `json:"dirty"`   // its reference counts may be wrong, which does not matter for reading
	Corrupt    bool   `json:"corrupt"` // it is marked so
	// Backing and DataFile are the names of further files that it needs; they are not opened.
	Backing       string          `json:"backing_file,omitempty"`
	BackingFormat string          `json:"backing_format,omitempty"`
	DataFile      string          `json:"data_file,omitempty"`
	ExternalData  bool            `json:"-"`         // it has a data file, also one without a name
	Snapshots     []QCOW2Snapshot `json:"snapshots"` // internal ones
	Bitmaps       []QCOW2Bitmap   `json:"bitmaps"`
	Check         *QCOW2Check     `json:"check,omitempty"` // by CheckImage
	Error         string          `json:"error,omitempty"` // why something of this could not be read
}

// A QCOW2Check is what a check of an image found: reference counts, and the entries of its tables.
type QCOW2Check struct {
	Errors   int64    `json:"errors"`
	Leaks    int64    `json:"leaks"`           // clusters that are lost space, and no damage
	Problems []string `json:"problems"`        // the first of them
	Error    string   `json:"error,omitempty"` // why it could not be finished
}

// Sound reports whether nothing was found.
func (c *QCOW2Check) Sound() bool { return c.Errors+c.Leaks == 0 && c.Error == "" }

// A QCOW2Snapshot is an internal snapshot.
type QCOW2Snapshot struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Time      time.Time `json:"time"`
	SizeBytes int64     `json:"size_bytes"`
}

// A QCOW2Bitmap is a dirty bitmap.
type QCOW2Bitmap struct {
	Name        string `json:"name"`
	Granularity int64  `json:"granularity"` // bytes of the disk that a bit stands for
	Auto        bool   `json:"auto"`        // it records writes
	InUse       bool   `json:"in_use"`      // its content is wrong: a program that had it open was killed
	// Stale: a program that knows no bitmaps changed the disk; the content is wrong.
	Stale bool `json:"stale"`
	// DirtyBytes is how much of the disk it marks; absent where that is unknown.
	DirtyBytes *int64 `json:"dirty_bytes,omitempty"`
}

// countedBitmaps is of how many bitmaps the marks are counted.
const countedBitmaps = 16

// lookAtImage reads what an image says of itself.
func lookAtImage(ctx context.Context, dev block.Device) *QCOW2 {
	q := &QCOW2{Snapshots: []QCOW2Snapshot{}, Bitmaps: []QCOW2Bitmap{}}
	note := func(err error) {
		if err != nil && q.Error == "" {
			q.Error = err.Error()
		}
	}
	info, err := qcow2.ReadInfo(dev)
	note(err)
	if info == nil || err != nil {
		return q
	}
	q.SizeBytes, q.ClusterSize, q.Compression = info.Size, info.ClusterSize, info.Compression.String()
	q.Encryption, q.Dirty, q.Corrupt = info.Encryption, info.Dirty, info.Corrupt
	q.Backing, q.BackingFormat, q.DataFile, q.ExternalData = info.Backing, info.BackingFormat, info.DataFile, info.ExternalData
	snapshots, err := qcow2.Snapshots(dev, info)
	note(err)
	for _, s := range snapshots {
		q.Snapshots = append(q.Snapshots, QCOW2Snapshot{s.ID, s.Name, s.Time.UTC(), s.Size})
	}
	bitmaps, consistent, err := qcow2.Bitmaps(dev, info)
	note(err)
	for n, b := range bitmaps {
		found := QCOW2Bitmap{Name: b.Name, Granularity: b.Granularity, Auto: b.Auto, InUse: b.InUse, Stale: !consistent}
		if consistent && !b.InUse && n < countedBitmaps {
			var dirty int64
			err := qcow2.DirtyRanges(ctx, dev, info, b, func(r block.Range) error {
				dirty += r.Length
				return nil
			})
			if note(err); err == nil {
				found.DirtyBytes = &dirty
			}
		}
		q.Bitmaps = append(q.Bitmaps, found)
	}
	return q
}

// CheckImage checks the qcow2 image on dev, which Look has examined. Damage is no error.
func (q *QCOW2) CheckImage(ctx context.Context, dev block.Device) error {
	info, err := qcow2.ReadInfo(dev)
	var r *qcow2.Report
	if err == nil {
		r, err = qcow2.Check(ctx, dev, info)
	}
	q.Check = &QCOW2Check{Problems: []string{}}
	var corrupt *ondisk.CorruptError
	switch {
	case errors.As(err, &corrupt), errors.Is(err, qcow2.ErrTooLarge), errors.Is(err, qcow2.ErrUnsupportedFeature):
		q.Check.Error = err.Error()
		return nil
	case err != nil:
		return err
	}
	q.Check.Errors, q.Check.Leaks = r.Errors, r.Leaks
	for _, p := range r.Problems {
		q.Check.Problems = append(q.Check.Problems, p.String())
	}
	return nil
}
