package e2e_test

import (
	"errors"
	"os"
	"testing"
	"time"
)

// A merge that is refused leaves the policy as it was.
func TestRefusedMergeKeepsPause(t *testing.T) {
	const size = 4 << 20
	r := newRig(t, size, 0, "p")
	r.serve([]string{"p"}, "--on-full", "pause")
	r.must(os.WriteFile(r.cow("n"), make([]byte, 64<<10), 0o600))
	r.must(r.s.api("POST", "snapshots", map[string]any{"name": "n", "cow": r.cow("n"), "store": "N"}, nil))
	if err := r.merge("n"); err == nil {
		t.Fatal("a merge of a transient store was not refused")
	}
	c := r.dial("n")
	for i := range int64(40) {
		_, err := c.send(cmdWrite, 0, i*4096, 4096, fill('x', 4096))
		r.must(err)
	}
	for i := 0; ; i++ {
		a, err := c.receive(time.Second)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		r.must(err)
		if a.err != nil {
			t.Fatalf("write %d does not wait: %v", i, a.err)
		}
	}
	r.terminate(0)
}
