package inline

import (
	"testing"
	"time"
)

func TestTrial(t *testing.T) {
	var trials Trial
	for i := range TrialLength {
		if trials.Passed() {
			t.Fatalf("passed after %d", i)
		}
		trials.Took(QuickTime)
	}
	if !trials.Passed() {
		t.Fatal("not passed")
	}
	if trials.Took(QuickTime + 1); trials.Passed() {
		t.Fatal("a slow request does not end it")
	}
}

// TestOverdue: the watchdog calls for each request that is too long, once, and Disarm reports it; quick ones are kept.
func TestOverdue(t *testing.T) {
	called := make(chan struct{})
	w := NewWatchdog(func() { called <- struct{}{} })
	for range 3 {
		for range 1000 {
			mark := w.Arm()
			select {
			case <-called: // this machine is busy
				if w.Disarm(mark) {
					t.Fatal("called, and disarmed")
				}
			default:
				if !w.Disarm(mark) {
					<-called
				}
			}
		}
		mark := w.Arm()
		select {
		case <-called:
		case <-time.After(time.Minute):
			t.Fatal("no call")
		}
		if w.Disarm(mark) {
			t.Fatal("called, and disarmed")
		}
	}
}

// TestIdleStops: without requests the watchdog ends, and begins again with the next.
func TestIdleStops(t *testing.T) {
	w := NewWatchdog(func() {})
	for range 3 {
		w.Disarm(w.Arm())
		for deadline := time.Now().Add(time.Minute); w.watched.Load(); time.Sleep(Overdue) {
			if time.Now().After(deadline) {
				t.Fatal("it runs on")
			}
		}
	}
}
