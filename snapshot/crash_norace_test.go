//go:build !race

package snapshot_test

// oneIn is how many of the images are looked at in TestCrash: all.
const oneIn = 1

// stride is how many operations lie between two that fail: each fails once.
const stride = 1
