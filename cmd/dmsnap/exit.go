package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/dmsnap/dmsnap/internal/text"
)

// Exit statuses. Scripts can distinguish "no" from an error.
const (
	exitDone    = 0   // done, or yes
	exitNo      = 1   // no
	exitTrouble = 2   // wrong usage, I/O error, refused
	exitSignal  = 128 // plus the number of the signal that interrupted the work
)

// errNo is the answer "no" of a verb that has already printed its result.
var errNo = errors.New("no")

// interrupted is the cause of a context that a signal ended.
type interrupted struct{ signal syscall.Signal }

func (i interrupted) Error() string {
	switch i.signal {
	case syscall.SIGTERM:
		return "terminated"
	case syscall.SIGHUP:
		return "hung up"
	}
	return "interrupted"
}

// exitStatus returns the exit status for an error, and prints the error to stderr.
func exitStatus(err error, stderr io.Writer) int {
	var i interrupted
	switch {
	case err == nil:
		return exitDone
	case errors.Is(err, errNo):
		return exitNo
	}
	fmt.Fprintf(stderr, "dmsnap: %s\n", text.WithoutSecrets(err.Error()))
	if errors.As(err, &i) {
		return exitSignal + int(i.signal)
	}
	return exitTrouble
}

// untilSignal returns a context that ends at the first SIGINT, SIGTERM or SIGHUP, with an interrupted as its
// cause. A second SIGINT or SIGTERM ends the process at once; a second SIGHUP does not, since a shell repeats the one
// that the kernel sends when a terminal goes away. A SIGHUP that the process was started to ignore, by nohup(1),
// stays ignored. stop gives the signals back. With hangUp, that is called at each SIGHUP instead.
func untilSignal(hangUp ...func()) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 4)
	done := make(chan struct{})
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) || hangUp != nil {
		signal.Notify(signals, syscall.SIGHUP)
	}
	go func() {
		for {
			select {
			case s := <-signals:
				switch {
				case s == syscall.SIGHUP && hangUp != nil:
					hangUp[0]()
				case ctx.Err() == nil:
					cancel(interrupted{s.(syscall.Signal)})
				case s != syscall.SIGHUP:
					os.Exit(exitSignal + int(s.(syscall.Signal)))
				}
			case <-done:
				return
			}
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(done)
		cancel(nil)
	}
}
