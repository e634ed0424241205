package lines

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strconv"
	"testing"
)

func upTo(n int) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	}
}

func line(b []byte, i int) []byte { return append(strconv.AppendInt(b, int64(i), 10), '\n') }

// TestOrder: lines come in the order of the items, however many there are.
func TestOrder(t *testing.T) {
	for _, count := range []int{0, 1, batch - 1, batch, batch + 1, 40*batch + 7} {
		var got bytes.Buffer
		n, err := Write(context.Background(), &got, upTo(count), line)
		if err != nil || n != uint64(count) {
			t.Fatalf("%d items: %d, %v", count, n, err)
		}
		var want []byte
		for i := range count {
			want = line(want, i)
		}
		if !bytes.Equal(got.Bytes(), want) {
			t.Fatalf("%d items: %d bytes, not those of the items in order", count, got.Len())
		}
	}
}

// full accepts some bytes.
type full struct{ left int }

var errFull = errors.New("full")

func (f *full) Write(p []byte) (int, error) {
	if f.left -= len(p); f.left < 0 {
		return 0, errFull
	}
	return len(p), nil
}

// TestStops: an error of the writer, and the end of the context, end the list before the items do.
func TestStops(t *testing.T) {
	const endless = 1 << 40
	if n, err := Write(context.Background(), &full{1 << 20}, upTo(endless), line); err != errFull || n == endless {
		t.Errorf("%d, %v", n, err)
	}
	why := errors.New("interrupted")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(why)
	if n, err := Write(ctx, io.Discard, upTo(endless), line); err != why || n == endless {
		t.Errorf("%d, %v", n, err)
	}
}
