package inspect

import (
	"time"

	"github.com/dmsnap/dmsnap/block"
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
	Snapshots     []QCOW2Snapshot `json:"snapshots"` // internal ones
	Bitmaps       []QCOW2Bitmap   `json:"bitmaps"`
	Error         string          `json:"error,omitempty"` // why something of this could not be read
}

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
}

// lookAtImage reads what an image says of itself.
func lookAtImage(dev block.Device) *QCOW2 {
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
	q.Backing, q.BackingFormat, q.DataFile = info.Backing, info.BackingFormat, info.DataFile
	snapshots, err := qcow2.Snapshots(dev, info)
	note(err)
	for _, s := range snapshots {
		q.Snapshots = append(q.Snapshots, QCOW2Snapshot{s.ID, s.Name, s.Time.UTC(), s.Size})
	}
	bitmaps, _, err := qcow2.Bitmaps(dev, info)
	note(err)
	for _, b := range bitmaps {
		q.Bitmaps = append(q.Bitmaps, QCOW2Bitmap{b.Name, b.Granularity, b.Auto, b.InUse})
	}
	return q
}
