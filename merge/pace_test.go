package merge

import (
	"testing"
	"time"
)

func TestNextWindow(t *testing.T) {
	const chunk = 4096
	for _, c := range []struct {
		window uint64
		took   time.Duration
		chunk  uint64
		want   uint64
	}{
		{DefaultWindow / chunk, time.Millisecond, chunk, 2 * DefaultWindow / chunk},
		{MaxWindow / chunk, time.Millisecond, chunk, MaxWindow / chunk},
		{MaxWindow / chunk * 3 / 4, time.Millisecond, chunk, MaxWindow / chunk},
		{4096, 500 * time.Millisecond, chunk, 4096},
		{MaxWindow / chunk, 2 * time.Second, chunk, MaxWindow / 2 / chunk},
		{DefaultWindow / chunk, time.Minute, chunk, DefaultWindow / chunk},
		{1, time.Millisecond, 1 << 30, 1}, // chunks that are larger than any window
		{1, time.Minute, 1 << 30, 1},
	} {
		if got := nextWindow(c.window, c.took, c.chunk); got != c.want {
			t.Errorf("after %d exceptions of %d bytes in %v: %d, want %d", c.window, c.chunk, c.took, got, c.want)
		}
	}
}

// TestLiveWindow: beside clients a step becomes as short as they can wait, and as long as is useful when there are none.
func TestLiveWindow(t *testing.T) {
	const chunk = 4096
	for _, c := range []struct {
		window   uint64
		took     time.Duration
		requests uint64
		chunk    uint64
		want     uint64
	}{
		{LeastWindow / chunk, time.Second, 0, chunk, 2 * LeastWindow / chunk}, // nobody is there
		{DefaultWindow / chunk, time.Second, 0, chunk, DefaultWindow / chunk},
		{DefaultWindow / chunk, 100 * time.Millisecond, 1, chunk, DefaultWindow / 2 / chunk},
		{LeastWindow / chunk, time.Second, 1, chunk, LeastWindow / chunk},
		{1024, 8 * time.Millisecond, 1, chunk, 1024},
		{1024, 4 * time.Millisecond, 1, chunk, 2048},
		{1, time.Minute, 1, 1 << 30, 1}, // chunks that are larger than any window
		{1, time.Millisecond, 0, 1 << 30, 1},
	} {
		if got := liveWindow(c.window, c.took, c.requests, c.chunk); got != c.want {
			t.Errorf("after %d exceptions of %d bytes in %v, %d requests: %d, want %d", c.window, c.chunk, c.took, c.requests, got, c.want)
		}
	}
}

func TestRestAfter(t *testing.T) {
	for _, c := range []struct {
		took     time.Duration
		requests uint64
		want     time.Duration
	}{
		{time.Second, 0, 0}, // nobody is there
		{100 * time.Millisecond, 1, 100 * time.Millisecond},
		{time.Hour, 5, time.Second},
	} {
		if got := restAfter(c.took, c.requests); got != c.want {
			t.Errorf("a step of %v, %d requests: %v, want %v", c.took, c.requests, got, c.want)
		}
	}
}

// TestRestEndsEarly: who pauses or stops a merge doesn't wait for the end of a rest.
func TestRestEndsEarly(t *testing.T) {
	for _, end := range []func(*Driver){func(d *Driver) { d.Pause() }, func(d *Driver) { d.move(Stopped, ErrStopped, Running) }} {
		d := &Driver{state: Running, changed: make(chan struct{})}
		rested := make(chan struct{})
		go func() {
			d.rest(time.Hour)
			close(rested)
		}()
		end(d)
		select {
		case <-rested:
		case <-time.After(10 * time.Second):
			t.Fatal("still resting")
		}
	}
}
