package monitor

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

var start = time.Date(2026, 11, 27, 0, 0, 0, 0, time.UTC)

func at(seconds float64) time.Time { return start.Add(time.Duration(seconds * float64(time.Second))) }

func TestWindowRate(t *testing.T) {
	var w Window
	if rate, over := w.Rate(); rate != 0 || over != 0 {
		t.Errorf("without samples: %v over %v", rate, over)
	}
	w.Add(at(0), 1000)
	if rate, over := w.Rate(); rate != 0 || over != 0 {
		t.Errorf("with one sample: %v over %v", rate, over)
	}
	// An hour of 10 a second, then as long 50 a second: the window is the last 5 minutes.
	value := 1000.0
	for s := 1; s <= 7200; s++ {
		value += 10
		if s > 3600 {
			value += 40
		}
		w.Add(at(float64(s)), value)
		if len(w.samples) > maxSamples+1 {
			t.Fatalf("%d samples are kept", len(w.samples))
		}
		if s != 3600 && s != 7200 {
			continue
		}
		want := map[int]float64{3600: 10, 7200: 50}[s]
		if rate, over := w.Rate(); math.Abs(rate-want) > want/20 || over < 5*time.Minute || over > 6*time.Minute {
			t.Errorf("after %d s: %v over %v, want %v", s, rate, over, want)
		}
	}
}

func TestWindowBeginsAgain(t *testing.T) {
	var w Window
	w.Add(at(0), 500)
	w.Add(at(10), 900)
	w.Add(at(11), 100) // compacted, or another store
	if _, over := w.Rate(); over != 0 {
		t.Errorf("a smaller value: a rate over %v", over)
	}
	w.Add(at(21), 150)
	if rate, over := w.Rate(); rate != 5 || over != 10*time.Second {
		t.Errorf("%v over %v", rate, over)
	}
	w.Add(at(21), 200) // the same instant again
	if rate, _ := w.Rate(); rate != 10 {
		t.Errorf("rate %v", rate)
	}
	w.Add(at(20), 300) // the clock was set back
	if rate, over := w.Rate(); math.IsInf(rate, 0) || math.IsNaN(rate) || over < 0 {
		t.Errorf("the clock was set back: %v over %v", rate, over)
	}
}

// Whatever the distances of the samples are, a constant rate is found.
func TestWindowOfUnevenSamples(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		var w Window
		rate, s := 1+r.Float64()*1000, 0.0
		for range 400 {
			s += 0.1 + r.ExpFloat64()*3
			w.Add(at(s), rate*s)
		}
		if got, over := w.Rate(); math.Abs(got-rate) > rate/1000 || over < 4*time.Minute {
			t.Errorf("rate %v over %v, want %v", got, over, rate)
		}
	}
}
