package layer_test

import (
	"bytes"
	"testing"

	"github.com/dmsnap/dmsnap/layer"
)

// FuzzIndex gives a tree pages with right digests and any content: what is found lies within the disk, the unit and the blob.
func FuzzIndex(f *testing.F) {
	content := bytes.Repeat([]byte{1, 2, 3, 4}, 40<<10)
	m := write(f, content, func(s int) bool { return s%5 < 2 })
	f.Add(m.index.Bytes(), m.Index.Entries)
	f.Fuzz(func(t *testing.T, index []byte, entries int64) {
		if len(index) > 1<<20 {
			return
		}
		const size = 1 << 30
		x := layer.Index{Blob: layer.Blob{Size: int64(len(index))}, Entries: entries}
		if len(index) >= layer.PageBytes {
			x.Root = layer.DigestOf(index[len(index)-layer.PageBytes:])
		}
		blob := layer.Layer{Data: layer.Blob{Size: 1 << 20}}
		tree, err := layer.NewTree(x, size, []layer.Layer{blob})
		if err != nil {
			return
		}
		at := int64(0)
		for e, err := range tree.Entries(load(index)) {
			if err != nil {
				return
			}
			if e.Place < at || e.Length <= 0 || e.End() > size {
				t.Fatalf("%+v after byte %d", e, at)
			}
			if f := e.Frame; !e.Zero() && (f.Off < 0 || f.Off+int64(f.Packed) > blob.Data.Size || e.Skip+e.Length > int64(f.Length) || f.Length > layer.UnitBytes) {
				t.Fatalf("%+v", e)
			}
			at = e.End()
		}
	})
}

// FuzzFrame unpacks anything: nothing is written beyond the length that the index has and the spare bytes.
func FuzzFrame(f *testing.F) {
	m := write(f, bytes.Repeat([]byte{7}, 4096), func(int) bool { return true })
	f.Add(m.data.Bytes()[24:], 4096)
	f.Fuzz(func(t *testing.T, packed []byte, length int) {
		if length < 0 || length > layer.UnitBytes {
			return
		}
		end := length + layer.Spare
		room := make([]byte, end+1)
		room[end] = 0x5a
		frame := layer.Frame{Packed: len(packed), Length: length}
		if got, err := frame.Unpack(room, packed); err == nil && layer.DigestOf(got) != frame.Content || room[end] != 0x5a {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	})
}

// FuzzDescription: what is accepted is encoded to what is accepted.
func FuzzDescription(f *testing.F) {
	m := write(f, make([]byte, 1024), func(int) bool { return false })
	d := layer.Description{Version: 1, Size: 1024, Index: m.Index, Layers: []layer.Layer{m.Layer}}
	text, err := d.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		if d, err := layer.ParseDescription(text); err == nil {
			if _, err := d.Encode(); err != nil {
				t.Fatal(err)
			}
		}
	})
}
