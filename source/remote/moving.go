package remote

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http/httptrace"
	"sync/atomic"
	"time"
)

// A timeoutError says which bound was exceeded.
type timeoutError struct {
	what  string
	bound time.Duration
}

func (e timeoutError) Error() string      { return fmt.Sprintf("%s %v", e.what, e.bound) }
func (timeoutError) Is(target error) bool { return target == context.DeadlineExceeded }

// WithTimeout is context.WithTimeout with a cause that says the bound, and is context.DeadlineExceeded.
func WithTimeout(ctx context.Context, bound time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, bound, timeoutError{"not complete after", bound})
}

// whileMoving calls do with a context that ends when do has not called moved for a time. If the context ended, the error says what
// was waited for.
func whileMoving(ctx context.Context, stall time.Duration, do func(ctx context.Context, moved func()) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(stall, func() { cancel(timeoutError{"nothing was received for", stall}) })
	defer watchdog.Stop()
	var waits waiting
	moved := func() { watchdog.Reset(stall) }
	err := do(waits.trace(ctx, moved), moved)
	if err == nil || ctx.Err() == nil {
		return err
	}
	if text := waits.text.Load(); text != nil {
		return fmt.Errorf("%s: %w", *text, context.Cause(ctx))
	}
	return context.Cause(ctx)
}

// A waiting is what a request waits for now.
type waiting struct{ text atomic.Pointer[string] }

func (w *waiting) set(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	w.text.Store(&text)
}

// trace follows the requests of a context, and calls answered when a response begins.
func (w *waiting) trace(ctx context.Context, answered func()) context.Context {
	var peer atomic.Pointer[string]
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GetConn:           func(hostPort string) { peer.Store(&hostPort); w.set("connect to %s", hostPort) },
		DNSStart:          func(i httptrace.DNSStartInfo) { w.set("look up %s", i.Host) },
		ConnectStart:      func(_, address string) { w.set("connect to %s", address) },
		TLSHandshakeStart: func() { w.set("TLS handshake with %s", *peer.Load()) },
		TLSHandshakeDone:  func(tls.ConnectionState, error) { w.set("send a request to %s", *peer.Load()) },
		GotConn:           func(i httptrace.GotConnInfo) { w.set("send a request to %s", i.Conn.RemoteAddr()) },
		WroteRequest:      func(httptrace.WroteRequestInfo) { w.set("wait for the response of %s", *peer.Load()) },
		GotFirstResponseByte: func() {
			w.set("receive from %s", *peer.Load())
			answered()
		},
	})
}
