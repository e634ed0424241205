package eventlog

import (
	"fmt"
	"io"
	"time"
)

// Writer returns a function that writes lines to w, each after a prefix, and never blocks: lines are dropped while w is
// blocked. end writes the remaining ones, and waits for that for one second at most.
func Writer(w io.Writer, prefix string) (log func(string), end func()) {
	lines := make(chan string, 64)
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case s := <-lines:
				fmt.Fprintf(w, "%s%s\n", prefix, s)
			case <-quit:
				for {
					select {
					case s := <-lines:
						fmt.Fprintf(w, "%s%s\n", prefix, s)
					default:
						return
					}
				}
			}
		}
	}()
	return func(s string) {
			select {
			case lines <- s:
			default:
			}
		}, func() {
			close(quit)
			select {
			case <-done:
			case <-time.After(time.Second): // w is blocked
			}
		}
}
