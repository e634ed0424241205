package blocktest

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// RunAll runs the tests of a package and fails when goroutines are left after the last one: each test must end the
// goroutines that it started. It is m.Run for TestMain, and returns the exit status.
func RunAll(m *testing.M) int {
	status := m.Run()
	if left := leftGoroutines(5 * time.Second); status == 0 && left != "" {
		fmt.Fprintf(os.Stderr, "FAIL: goroutines are left after the tests:\n\n%s\n", left)
		status = 1
	}
	return status
}

// leftGoroutines returns the stacks of goroutines that run this module's code and don't end in time.
func leftGoroutines(timeout time.Duration) string {
	for end := time.Now().Add(timeout); ; time.Sleep(10 * time.Millisecond) {
		buf := make([]byte, 1<<20)
		buf = buf[:runtime.Stack(buf, true)]
		var left []string
		for i, stack := range strings.Split(string(buf), "\n\n") {
			// The first is this one. Those of the testing package and the runtime are not ours.
			if i > 0 && strings.Contains(stack, "github.com/dmsnap/dmsnap/") && !strings.Contains(stack, "blocktest.RunAll") {
				left = append(left, stack)
			}
		}
		if len(left) == 0 || time.Now().After(end) {
			return strings.Join(left, "\n\n")
		}
	}
}
