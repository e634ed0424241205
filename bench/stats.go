package main

import (
	"fmt"
	"slices"
)

// median of at least one figure; of an even number the mean of the two in the middle.
func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}

// ratio says how many times as good own is as peer's.
func ratio(own, peer float64, less bool) float64 {
	if less {
		own, peer = peer, own
	}
	if peer == 0 {
		return 0
	}
	return own / peer
}

// ratios returns the ratio of two columns' medians, and the least and greatest within one round: a round's
// two measurements were made close to each other.
func ratios(own, peer []float64, less bool) (of, low, high float64) {
	of = ratio(median(own), median(peer), less)
	for i := range min(len(own), len(peer)) {
		x := ratio(own[i], peer[i], less)
		if i == 0 || x < low {
			low = x
		}
		if i == 0 || x > high {
			high = x
		}
	}
	return of, low, high
}

// figureText is a figure as it is printed, with three digits that count.
func figureText(v float64, unit string) string {
	text := digits(v)
	if unit == "" {
		return text
	}
	return text + " " + unit
}

// digits prints three digits that count, and whole numbers from a thousand on with all of theirs.
func digits(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 100 || v <= -100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10 || v <= -10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.3g", v)
}
