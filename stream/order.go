package stream

import (
	"context"
	"iter"
	"runtime"
	"sync"
)

// workers is how many frames are digested and packed at once.
func workers() int { return min(runtime.GOMAXPROCS(0), 8) }

// waiting is how many more frames than that are under way: they wait for the disk meanwhile.
const waiting = 4

// inOrder does work on jobs, several at once, and hands the results to done in the order of the jobs. It returns the
// first error of jobs, work or done, in that order of jobs, or ctx's cause. No work is under way then; jobs may still be
// asked for a job whose work will not begin.
func inOrder[J, R any](ctx context.Context, jobs iter.Seq2[J, error], work func(J) (R, error), done func(R) error) error {
	type result struct {
		r   R
		err error
	}
	// The channel holds the futures of work that is under way or finished: its capacity bounds both.
	futures, stop := make(chan chan result, workers()+waiting), make(chan struct{})
	var (
		running sync.WaitGroup
		mu      sync.Mutex // for stopped, and for adding to running
		stopped bool
	)
	begin := func(j J, future chan result) {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return
		}
		running.Go(func() {
			r, err := work(j)
			future <- result{r, err}
		})
	}
	go func() {
		defer close(futures)
		for j, err := range jobs {
			future := make(chan result, 1)
			if err != nil {
				future <- result{err: err}
			} else {
				begin(j, future)
			}
			select {
			case futures <- future:
			case <-stop:
				return
			}
			if err != nil {
				return
			}
		}
	}()
	defer func() {
		mu.Lock()
		stopped = true
		mu.Unlock()
		close(stop)
		running.Wait()
	}()
	for {
		var future chan result
		select {
		case f, more := <-futures:
			if !more {
				return nil
			}
			future = f
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		select {
		case r := <-future:
			if r.err != nil {
				return r.err
			}
			if err := done(r.r); err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
