package lvm

import (
	"encoding/binary"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/testhost"
)

// openAll opens and reads every layer of every volume: no panic, no byte outside of the disk, bounded time.
func openAll(t *testing.T, content []byte) {
	set, err := Scan([]Disk{{"disk", block.MemoryFrom(content)}}, 0)
	if err != nil {
		t.Fatal(err) // the disk can be read
	}
	buf := make([]byte, 512)
	for _, g := range set.Groups {
		for _, v := range g.Volumes {
			for _, layer := range []Layer{Active, Real, COW} {
				dev, err := v.Open(layer)
				if err != nil {
					continue
				}
				if layer == Active && !v.Readable {
					t.Errorf("%s is open and not readable: %s", v.Name, v.Reason)
				}
				for _, off := range []int64{0, dev.Size() - 512} {
					if _, err := dev.ReadAt(buf, off); err != nil {
						t.Errorf("%s %s at %d of %d: %v", v.Name, layer, off, dev.Size(), err)
					}
				}
			}
		}
	}
}

// realTexts are the texts of a real lvm2, as if the made disk were their first physical volume.
func realTexts(f *testing.F) (texts []string) {
	packed, err := filepath.Glob("testdata/*/disk0.gz")
	if err != nil || len(packed) < 20 {
		f.Fatal(len(packed), err)
	}
	for _, path := range packed {
		set := scan(f, []Disk{{"disk", block.MemoryFrom(testhost.Unpack(f, path))}})
		for _, g := range set.Groups {
			texts = append(texts, strings.ReplaceAll(g.meta.text, g.meta.pvs[0].id, id(1)))
		}
	}
	return texts
}

// FuzzText reads hostile texts with good checksums.
func FuzzText(f *testing.F) {
	f.Add(groupText(1, 1, textVolume{"a", "", linear(0, 10, "pv1", 3)}, textVolume{"z", "", seg(0, 5, "zero", "")}))
	f.Add(groupText(1, 1, textVolume{"base", "", linear(0, 32, "pv1", 0)}, textVolume{"cow", "", linear(0, 64, "pv1", 40)},
		snapshotText("s0", 32, `origin = "base" cow_store = "cow"`)))
	f.Add(groupText(1, 1, textVolume{"r", "", seg(0, 10, "raid1", `device_count = 1 raids = ["m", "i"]`)},
		textVolume{"m", "", linear(0, 1, "pv1", 0)}, textVolume{"i", "", linear(0, 10, "pv1", 10)}))
	f.Add(groupText(1, 1, textVolume{"s", "", seg(0, 20, "striped", `stripe_count = 2 stripe_size = 2 stripes = ["pv1", 0, "pv1", 50]`)}))
	for _, text := range realTexts(f) {
		f.Add(text)
	}
	f.Add("a = [ 1, \"x\\\"\" ] # c\nb { c = 1.5 }")
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) == 0 || len(text) > int(madeSpan.size)-madeText {
			return
		}
		openAll(t, madeBytes(1, text))
	})
}

// FuzzHeaders reads hostile labels and headers of metadata areas, whose checksums are made good.
func FuzzHeaders(f *testing.F) {
	content := madeBytes(1, groupText(1, 1, textVolume{"a", "", linear(0, 10, "pv1", 3)}))
	f.Add(content[512:1024], content[madeArea:][:512])
	putLabel(content, 1, id(1), madeSpan, span{64 << 10, 4096})
	f.Add(content[512:1024], content[madeArea:][:512])
	f.Fuzz(func(t *testing.T, label, area []byte) {
		disk := madeBytes(1, groupText(1, 1, textVolume{"a", "", linear(0, 10, "pv1", 3)}))
		copy(disk[512:1024], label)
		sumLabel(disk[512:1024])
		h := disk[madeArea:][:512]
		copy(h, area)
		le := binary.LittleEndian
		if off, n := le.Uint64(h[40:]), le.Uint64(h[48:]); off < madeSpan.size && n < madeSpan.size && off+n < madeSpan.size {
			le.PutUint32(h[56:], checksum(disk[madeArea+off:][:n]))
		}
		sumArea(h)
		openAll(t, disk)
	})
}
