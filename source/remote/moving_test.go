package remote

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestLastAttemptSaysNothing: where the time is over when an attempt has only begun, the error is that of the attempt before, which
// says what was waited for.
func TestLastAttemptSaysNothing(t *testing.T) {
	for name, c := range map[string]struct {
		attempts []error // nil: the time is over first
		want     string
	}{
		"an attempt before":  {[]error{errors.New("wait for x"), nil}, "no answer from the server: wait for x"},
		"two before":         {[]error{errors.New("connect to x"), errors.New("wait for x"), nil}, "no answer from the server: wait for x"},
		"only the first one": {[]error{nil}, "no answer from the server: not complete after 3s"},
	} {
		n := 0
		ctx, cancel := context.WithCancelCause(t.Context())
		err := attempts(ctx, 3*time.Second, func(ctx context.Context, _ func()) (bool, error) {
			n++
			if err := c.attempts[n-1]; err != nil {
				return true, err
			}
			cancel(timeoutError{"not complete after", 3 * time.Second})
			<-ctx.Done()
			return false, ctx.Err()
		})
		if cancel(nil); err == nil || err.Error() != c.want || n != len(c.attempts) || !errors.Is(err, ErrUnreachable) {
			t.Errorf("%s: %v after %d attempts, want %s", name, err, n, c.want)
		}
	}
}
