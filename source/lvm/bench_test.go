package lvm

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/testhost"
)

// BenchmarkRead reads a linear volume of a disk image, and an image with the same content beside it, in turn. raw/volume is the
// median time of a read of the one by that of the other: above 1 the volume is faster. Medians, so that a busy machine does not
// decide.
func BenchmarkRead(b *testing.B) {
	dir := b.TempDir()
	open := func(name string, content []byte) *block.File {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			b.Fatal(err)
		}
		f, err := block.Open(path, block.Options{ReadOnly: true})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { f.Close() })
		return f
	}
	volume := mustOpen(b, scan(b, []Disk{{"disk", open("disk", testhost.Unpack(b, "testdata/single/disk0.gz"))}}), "plain", Active)
	content := make([]byte, volume.Size())
	if _, err := volume.ReadAt(content, 0); err != nil {
		b.Fatal(err)
	}
	raw := open("raw", content)
	for name, size := range map[string]int64{"4KiB": 4 << 10, "1MiB": 1 << 20} {
		b.Run(name, func(b *testing.B) {
			p := make([]byte, size)
			b.SetBytes(size)
			var took [2][]time.Duration
			for i := range b.N {
				off := int64(i) * 7919 * size % (volume.Size() - size + 1) &^ 4095
				for j := range 2 {
					k := (i + j) % 2
					began := time.Now()
					if _, err := []block.Device{raw, volume}[k].ReadAt(p, off); err != nil {
						b.Fatal(err)
					}
					took[k] = append(took[k], time.Since(began))
				}
			}
			for k := range took {
				slices.Sort(took[k])
			}
			b.ReportMetric(float64(took[0][b.N/2])/float64(took[1][b.N/2]), "raw/volume")
		})
	}
}
