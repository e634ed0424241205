package eventlog

import (
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/dmsnap/dmsnap/internal/text"
)

// Writer returns a function that writes lines to w, each after a prefix, and never blocks: lines are dropped while w is
// blocked. Lines are written without what is secret in URLs. end writes the remaining ones, and waits for that for one second at most.
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
			case lines <- text.WithoutSecrets(s):
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

// JSON returns a logger that writes records to w as JSON objects, a line each, in the way of Writer.
func JSON(w io.Writer) (logger *slog.Logger, end func()) {
	line, end := Writer(w, "")
	return slog.New(slog.NewJSONHandler(lineWriter(line), nil)), end
}

// lineWriter passes on what a handler writes, a line each.
type lineWriter func(string)

func (w lineWriter) Write(p []byte) (int, error) {
	w(string(p[:max(0, len(p)-1)])) // without the newline
	return len(p), nil
}
