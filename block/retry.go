package block

import (
	"context"
	"errors"
	"time"
)

// A RetryLater is the error of a change (WriteAt, WriteDurableAt, ZeroAt, Discard) that can't be made now and may be
// possible later: for example because space is missing and the policy is that writers wait. The device itself does not
// wait, so that the caller can give up at any time and holds no lock meanwhile. Parts of the change may have been made;
// it is safe to repeat it. Retry returns a channel that is closed when it is worth trying again, or nil when it never
// is.
type RetryLater interface {
	error
	Retry() <-chan struct{}
}

// RetryInterval is how long to wait for the channel of a RetryLater before trying anyway: there is no notification when
// another program frees space.
const RetryInterval = time.Second

// CanRetry returns the channel of a RetryLater in err, or nil.
func CanRetry(err error) <-chan struct{} {
	if err == nil {
		return nil // without an allocation
	}
	var later RetryLater
	if !errors.As(err, &later) {
		return nil
	}
	return later.Retry()
}

// AwaitRetry waits until it is worth trying again: changed is closed, or a RetryInterval has passed. It returns the
// cause of ctx when that ends first.
func AwaitRetry(ctx context.Context, changed <-chan struct{}) error {
	again := time.NewTimer(RetryInterval)
	defer again.Stop()
	select {
	case <-changed:
	case <-again.C:
	case <-ctx.Done():
	}
	return context.Cause(ctx)
}

// Retry calls do until it returns anything but a RetryLater. When ctx ends it returns the cause of that, joined with
// the last error.
func Retry(ctx context.Context, do func() error) error {
	for {
		err := do()
		changed := CanRetry(err)
		if changed == nil {
			return err
		}
		if cause := AwaitRetry(ctx, changed); cause != nil {
			return errors.Join(cause, err)
		}
	}
}
