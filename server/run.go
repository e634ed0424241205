package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/server/api"
)

// Start begins to serve the exports on l and the control API on control, unless they are nil; both are closed in the end.
// wait waits until ctx has ended and requests under way are answered (nil), or one of the listeners failed; then
// nothing is served any more. Start is called once, before Close.
func (s *Server) Start(ctx context.Context, l, control net.Listener) (wait func() error) {
	if l != nil {
		s.mu.Lock()
		s.addr = l.Addr()
		s.mu.Unlock()
	}
	until := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	var all sync.WaitGroup
	if l != nil {
		all.Go(func() { cancel(s.nbd.Serve(ctx, l)) })
	}
	if s.vhost != nil {
		all.Go(func() {
			if err := s.vhost.Serve(ctx); err != nil {
				cancel(err)
			}
		})
	}
	if control != nil {
		all.Go(func() { cancel(api.Serve(ctx, control, s.Handler(), nil)) })
	}
	all.Go(func() { s.flushLoop(ctx, flushEvery) })
	return func() error {
		all.Wait()
		cause := context.Cause(ctx)
		cancel(nil)
		if cause != context.Cause(until) {
			return cause
		}
		return nil
	}
}

// Serve is Start, and waits.
func (s *Server) Serve(ctx context.Context, l, control net.Listener) error {
	return s.Start(ctx, l, control)()
}

// flushLoop periodically flushes snapshots that clients wrote to without a flush.
func (s *Server) flushLoop(ctx context.Context, every time.Duration) {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			s.flushDirty()
		}
	}
}

func (s *Server) flushDirty() {
	s.mu.Lock()
	list := slices.Clone(s.snapshots)
	s.mu.Unlock()
	for _, v := range list {
		// The race considered: v may be dropped just now; its Close has made everything durable.
		if err := v.dev.flushDirty(); err != nil && !errors.Is(err, os.ErrClosed) {
			s.log.Event(slog.LevelError, fmt.Sprintf("%s: flush: %v", v.name, err), "flush failed", err, slog.String("snapshot", v.name))
		}
	}
}

// Close ends the merge under way, detaches the snapshots, makes everything durable and closes the files. Nothing may
// be served any more. An error says what could not be made durable.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	errs := []error{s.closeVhost()}
	if m := s.merging; m != nil {
		m.driver.Stop()
		errs = append(errs, m.merging.Close())
	}
	if !s.file.ReadOnly() {
		// Before the snapshots: acknowledged writes that wait in memory may need them.
		errs = append(errs, block.WithPath(s.path, s.origin.Finish()))
	}
	for _, v := range s.snapshots {
		failed := v.snap.Failure() // before it is closed, and whether or not the mark can be made then
		errs = append(errs, block.WithPath(v.path, failed), v.close())
	}
	return errors.Join(append(errs, s.file.Close())...)
}
