package blocktest

import (
	"strings"
	"testing"
	"time"
)

func TestLeftGoroutines(t *testing.T) {
	stop := make(chan struct{})
	go func() { <-stop }()
	if left := leftGoroutines(0); !strings.Contains(left, "TestLeftGoroutines.func1") {
		t.Errorf("a goroutine that is left is not seen: %q", left)
	}
	close(stop)
	for range 100 {
		if !strings.Contains(leftGoroutines(0), "TestLeftGoroutines.func1") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("one that has ended is seen")
}
