package layer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/dmsnap/dmsnap/layer"
)

// made is a layer in memory.
type made struct {
	layer.Layer
	data, index bytes.Buffer
}

// load is a Load of an index in memory.
func load(index []byte) layer.Load {
	checked := map[int64]bool{}
	return func(id layer.PageID) ([]byte, error) {
		b := index[id.Number*layer.PageBytes:][:layer.PageBytes]
		if checked[id.Number] {
			return b, nil
		}
		checked[id.Number] = true
		return b, id.Check(b)
	}
}

// write makes a layer of the sectors of content for which has is true.
func write(t testing.TB, content []byte, has func(sector int) bool) *made {
	t.Helper()
	m := &made{}
	l, err := layer.Write(context.Background(), &m.data, &m.index, int64(len(content)), func(emit func(layer.Unit) error) error {
		for at := 0; at < len(content); at += layer.UnitBytes {
			var u layer.Unit
			data := layer.Buffer()[:0]
			for s := at; s < min(at+layer.UnitBytes, len(content)); s += 512 {
				if !has(s / 512) {
					continue
				}
				p := content[s : s+512]
				zero := layer.IsZero(p)
				if !zero {
					data = append(data, p...)
				}
				if k := len(u.Pieces) - 1; k >= 0 && u.Pieces[k].Zero == zero && u.Pieces[k].Place+u.Pieces[k].Length == int64(s) {
					u.Pieces[k].Length += 512
				} else {
					u.Pieces = append(u.Pieces, layer.Piece{Place: int64(s), Length: 512, Zero: zero})
				}
			}
			u.Data = data
			if len(u.Pieces) > 0 {
				if err := emit(u); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	m.Layer = l
	return m
}

// read returns the disk of an index.
func read(t testing.TB, size int64, x layer.Index, index []byte, layers []*made) []byte {
	t.Helper()
	var ls []layer.Layer
	for _, m := range layers {
		ls = append(ls, m.Layer)
	}
	tree, err := layer.NewTree(x, size, ls)
	if err != nil {
		t.Fatal(err)
	}
	disk := make([]byte, size)
	for off := int64(0); off < size; {
		run, err := tree.Find(off, load(index))
		if err != nil {
			t.Fatal(err)
		}
		if run.Hole {
			off = run.Until
			continue
		}
		if !run.Zero() {
			f := run.Frame
			content, err := f.Unpack(make([]byte, 0, f.Length+layer.Spare), layers[f.Layer].data.Bytes()[f.Off:][:f.Packed])
			if err != nil {
				t.Fatal(err)
			}
			copy(disk[run.Place:run.End()], content[run.Skip:])
		}
		off = run.End()
	}
	return disk
}

// The disk that the merged index shows is that of a model, for random layers; the tree has up to three levels.
func TestMergedIndex(t *testing.T) {
	for seed := range uint64(6) {
		r := rand.New(rand.NewPCG(16, seed))
		size := (1 + r.IntN(7_000)) * 512
		model := make([]byte, size)
		var layers []*made
		var index layer.Index
		var merged []byte
		for n := range 1 + r.IntN(5) {
			content, dense := make([]byte, size), r.IntN(4)
			changed := make([]bool, size/512)
			for s := range changed {
				if changed[s] = n == 0 || r.IntN(1<<(2*dense)) == 0; !changed[s] {
					continue
				}
				p := content[s*512:][:512]
				if r.IntN(3) > 0 { // else zeros over what is below
					for i := range p {
						p[i] = byte(r.IntN(3))
					}
				}
				copy(model[s*512:], p)
			}
			m := write(t, content, func(s int) bool { return changed[s] && (n > 0 || !layer.IsZero(content[s*512:][:512])) })
			if n == 0 {
				layers, index, merged = []*made{m}, m.Index, m.index.Bytes()
				continue
			}
			m.ChunkSectors = 1
			lower, err := layer.NewTree(index, int64(size), descriptions(layers))
			if err != nil {
				t.Fatal(err)
			}
			upper, err := layer.NewTree(m.Index, int64(size), []layer.Layer{m.Layer})
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			w := layer.NewIndexWriter(&out, int64(size))
			if err := layer.Merge(w, lower.Entries(load(merged)), upper.Entries(load(m.index.Bytes())), n); err != nil {
				t.Fatal(err)
			}
			if index, err = w.Close(); err != nil {
				t.Fatal(err)
			}
			layers, merged = append(layers, m), out.Bytes()
		}
		if index.Size != int64(len(merged)) || index.Digest != layer.DigestOf(merged) {
			t.Fatal("the index is not that of its description")
		}
		if got := read(t, int64(size), index, merged, layers); !bytes.Equal(got, model) {
			t.Fatalf("seed %d: another disk", seed)
		}
		checkDescription(t, &layer.Description{Version: layer.Version, Size: int64(size), Index: index, Layers: descriptions(layers)})
	}
}

func descriptions(layers []*made) (ls []layer.Layer) {
	for _, m := range layers {
		ls = append(ls, m.Layer)
	}
	return ls
}

func checkDescription(t *testing.T, d *layer.Description) {
	t.Helper()
	text, err := d.Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := layer.ParseDescription(text)
	if err != nil {
		t.Fatal(err)
	}
	if second, err := again.Encode(); err != nil || !bytes.Equal(text, second) {
		t.Fatalf("%s, %v", second, err)
	}
}

// The bytes of a layer depend on its content alone, and zstd(1) unpacks its data.
func TestDataIsZstd(t *testing.T) {
	content := bytes.Repeat([]byte("abcdefgh"), 64<<10)
	content = content[:len(content)-512]
	all := func(int) bool { return true }
	a, b := write(t, content, all), write(t, content, all)
	if a.Layer != b.Layer || a.Data.Digest != layer.DigestOf(a.data.Bytes()) {
		t.Error("two layers of one content differ")
	}
	d, err := zstd.NewReader(&a.data)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if got, err := io.ReadAll(d); err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// A bit that changed anywhere in an index or a frame is found.
func TestChangedAnywhere(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	content := make([]byte, 200*512)
	for i := range content {
		content[i] = byte(r.Uint32())
	}
	m := write(t, content, func(s int) bool { return s%2 == 0 })
	tree, err := layer.NewTree(m.Index, int64(len(content)), []layer.Layer{m.Layer})
	if err != nil {
		t.Fatal(err)
	}
	run, err := tree.Find(int64(len(content))-1024, load(m.index.Bytes()))
	if err != nil || run.Hole {
		t.Fatalf("%+v, %v", run, err)
	}
	packed := bytes.Clone(m.data.Bytes()[run.Frame.Off:][:run.Frame.Packed])
	for i := 0; i < len(packed); i += 7 {
		packed[i] ^= 4
		// A bit of the frame's header may have no meaning; the content is that of the digest in any case.
		if got, err := run.Frame.Unpack(make([]byte, 0, run.Frame.Length+layer.Spare), packed); err == nil && layer.DigestOf(got) != run.Frame.Content || err != nil && !errors.Is(err, layer.ErrCorrupt) {
			t.Fatalf("byte %d of the frame: %v", i, err)
		}
		packed[i] ^= 4
	}
	index := m.index.Bytes()
	for i := range index {
		if i%31 != 0 {
			continue
		}
		index[i] ^= 1
		failed := false
		for _, err := range tree.Entries(load(index)) {
			failed = failed || errors.Is(err, layer.ErrCorrupt)
		}
		if !failed {
			t.Fatalf("byte %d of the index: nothing was noticed", i)
		}
		index[i] ^= 1
	}
}

// An error of the writer or of the producer ends Write.
func TestWriteFails(t *testing.T) {
	broken := errors.New("broken")
	unit := func() layer.Unit {
		return layer.Unit{Pieces: []layer.Piece{{Place: 0, Length: 512}}, Data: layer.Buffer()[:512]}
	}
	_, err := layer.Write(context.Background(), failing{broken}, io.Discard, 1<<20, func(emit func(layer.Unit) error) error {
		for {
			if err := emit(unit()); err != nil {
				return err
			}
		}
	})
	if !errors.Is(err, broken) {
		t.Error(err)
	}
	_, err = layer.Write(context.Background(), io.Discard, io.Discard, 1<<20, func(func(layer.Unit) error) error { return broken })
	if !errors.Is(err, broken) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(broken)
	_, err = layer.Write(ctx, io.Discard, io.Discard, 1<<40, func(emit func(layer.Unit) error) error {
		for at := int64(0); ; at += layer.UnitBytes {
			u := unit()
			u.Pieces[0].Place = at
			if err := emit(u); err != nil {
				return err
			}
		}
	})
	if !errors.Is(err, broken) {
		t.Error(err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

func TestDescriptionsRefused(t *testing.T) {
	m := write(t, make([]byte, 1024), func(int) bool { return false })
	good := layer.Description{Version: 1, Size: 1024, Index: m.Index, Layers: []layer.Layer{m.Layer}}
	checkDescription(t, &good)
	for what, change := range map[string]func(d *layer.Description){
		"version":         func(d *layer.Description) { d.Version = 2 },
		"negative":        func(d *layer.Description) { d.Size = -512 },
		"half a sector":   func(d *layer.Description) { d.Size = 1000 },
		"no layer":        func(d *layer.Description) { d.Layers = nil },
		"too many":        func(d *layer.Description) { d.Layers = make([]layer.Layer, layer.MaxLayers+1) },
		"entries":         func(d *layer.Description) { d.Index.Entries = 1 << 50 },
		"length of index": func(d *layer.Description) { d.Index.Size++; d.Layers[0].Index.Size++ },
		"another index":   func(d *layer.Description) { d.Index.Root[0]++ },
		"chunks":          func(d *layer.Description) { d.Layers[0].ChunkSectors = 8 },
		"no data":         func(d *layer.Description) { d.Layers[0].Data.Size = 3 },
	} {
		d := good
		d.Layers = []layer.Layer{m.Layer}
		change(&d)
		if _, err := d.Encode(); !errors.Is(err, layer.ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, text := range []string{"", "{", `{"version":1,"index":{"digest":"md5:00"}}`, strings.Repeat(" ", layer.MaxDescription) + "{}"} {
		if _, err := layer.ParseDescription([]byte(text)); !errors.Is(err, layer.ErrCorrupt) {
			t.Errorf("%.20q: %v", text, err)
		}
	}
}
