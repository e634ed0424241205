package progress

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"
)

func TestQuietInAPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	bar := New(w, "merge")
	bar.Show(1, 2)
	bar.Show(2, 2)
	bar.End()
	w.Close()
	buf := make([]byte, 100)
	if n, _ := r.Read(buf); n > 0 {
		t.Errorf("a pipe got %q", buf[:n])
	}
}

func TestLine(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1000, 0)
	p := &Bar{w: &out, what: "merge", width: func() int { return 100 }, now: func() time.Time { return now }}
	p.Show(64<<20, 192<<20) // what was merged before counts as done, and not as our speed
	now = now.Add(2 * time.Second)
	p.Show(128<<20, 192<<20)
	want := "\r\x1b[Kmerge [##########################--------------]  66.7 %  128 MiB of 192 MiB  32 MiB/s  2s left"
	if got := out.String(); !strings.HasSuffix(got, want) {
		t.Errorf("drew %q, want it to end in %q", got, want)
	}
	drawn := out.Len()
	p.Show(129<<20, 192<<20)
	if out.Len() != drawn {
		t.Error("it was drawn twice at the same moment")
	}
	p.Show(192<<20, 192<<20)
	p.End()
	if !strings.HasSuffix(out.String(), "0s left\n") {
		t.Errorf("it ends in %q", out.String()[drawn:])
	}
}
