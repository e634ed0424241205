//go:build race

package snapshot_test

// oneIn is how many of the images are looked at under the race detector, for which each takes ten times as
// long: races are in the scenarios, not in the images.
const oneIn = 16

// stride is how many operations lie between two that fail, likewise.
const stride = 3
