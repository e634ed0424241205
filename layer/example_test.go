package layer_test

import (
	"bytes"
	"context"
	"fmt"
	"log"

	"github.com/dmsnap/dmsnap/layer"
)

// A layer with one unit is written, found by its index, and unpacked.
func Example() {
	const size = 1 << 20
	content := bytes.Repeat([]byte("0123456789abcdef"), 4096/16)
	var data, index bytes.Buffer
	l, err := layer.Write(context.Background(), &data, &index, size, func(emit func(layer.Unit) error) error {
		return emit(layer.Unit{Pieces: []layer.Piece{{Place: 128 << 10, Length: 4096}}, Data: content})
	})
	if err != nil {
		log.Fatal(err)
	}

	tree, err := layer.NewTree(l.Index, size, []layer.Layer{l})
	if err != nil {
		log.Fatal(err)
	}
	run, err := tree.Find(128<<10, load(index.Bytes()))
	if err != nil {
		log.Fatal(err)
	}
	p, err := run.Frame.Unpack(make([]byte, 0, run.Frame.Length), data.Bytes()[run.Frame.Off:][:run.Frame.Packed])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(run.Place, run.Length, bytes.Equal(p, content))
	// Output: 131072 4096 true
}
