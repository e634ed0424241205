package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/server/api"
)

// Durability. An operation writes its line, and nothing is flushed. A flush of a node makes durable, in this order:
//
//  1. the layers below the top that are not yet, bottom-up, and the top;
//  2. the names of their files;
//  3. the line that says so, and with it all lines before, which name the layers.
//
// A crash between two of them leaves layers that no line names, which are removed at the next start, or lines of layers
// that are not durable: those have at least what was flushed of them, and are made again, empty, when nothing was.

// settle makes durable what v shows, and the state that names its layers. v is pinned.
func (f *Fleet) settle(v *view) error {
	var fresh []*layer
	for _, l := range v.below {
		if l.complete.Load() {
			continue
		}
		if err := l.sync(); err != nil {
			return err
		}
		fresh = append(fresh, l)
	}
	if err := v.snap.Flush(); err != nil {
		return err
	}
	if err := f.names.sync(); err != nil {
		return err
	}
	if err := f.markDurable(fresh, v.top); err != nil {
		return err
	}
	v.clean.Store(true)
	return nil
}

// markDurable records, durably, that sealed layers are complete, and that the file of top, unless it is nil, is durable.
func (f *Fleet) markDurable(complete []*layer, top *layer) error {
	seq, err := f.recordDurable(complete, top)
	if err != nil {
		return err
	}
	if err := f.journal.sync(seq); err != nil {
		return f.stopChanges(err)
	}
	for _, l := range complete {
		l.durable.Store(true)
		l.completed()
	}
	if top != nil {
		top.durable.Store(true)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range complete {
		delete(f.unsettled, l.id)
	}
	return nil
}

// recordDurable records what markDurable says. seq is the line that has to be durable for it.
func (f *Fleet) recordDurable(complete []*layer, top *layer) (seq uint64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.newChange("durable")
	for _, l := range complete {
		if r := f.state.Layers[l.id]; r != nil && r.Sealed && !r.Complete {
			c.Complete = append(c.Complete, l.id)
		}
	}
	if top != nil {
		if r := f.state.Layers[top.id]; r != nil && !r.Durable {
			c.Durable = append(c.Durable, top.id)
		}
	}
	if len(c.Complete)+len(c.Durable) > 0 {
		// Without space for the line the layers are durable still; only a file that vanishes would not be missed.
		if err := f.append(c, true); err != nil && f.broken != nil {
			return 0, err
		}
	}
	return f.state.Seq, nil
}

// stopChanges has the fleet accept no changes, after a flush of the journal failed, and returns the error.
func (f *Fleet) stopChanges(err error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.breakWith(err)
	return err
}

// breakWith has the fleet accept no changes. mu is held.
func (f *Fleet) breakWith(err error) {
	if f.broken != nil {
		return
	}
	f.broken = err
	text := fmt.Sprintf("the state could not be recorded: no changes are accepted until the fleet is opened again: %v", err)
	f.log.Event(slog.LevelError, text, "the state could not be recorded", err)
	f.publish(api.Event{Kind: api.EventChangesRefused, Text: text, Error: err.Error()})
}

// settleEvery is how long what is not durable may stay so. Tests change it, before they open a fleet.
var settleEvery = 2 * time.Second

// notice wakes the background up: something is not durable, or to be removed.
func (f *Fleet) notice() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// settleLoop makes durable, in the background, what no client flushes, and removes files. While nothing changes it does
// nothing.
func (f *Fleet) settleLoop(ctx context.Context) {
	for {
		f.idle.Store(true)
		select {
		case <-ctx.Done():
			return
		case <-f.wake:
		}
		f.idle.Store(false)
		again := time.NewTimer(settleEvery)
		select {
		case <-ctx.Done():
			again.Stop()
			return
		case <-again.C:
		}
		for _, err := range f.flushDirty() {
			f.log.Event(slog.LevelError, fmt.Sprintf("flush: %v", err), "flush failed", err)
		}
		f.reap()
		f.compact(ctx)
	}
}

// compact merges the indexes of the chains below nodes, as far as that makes reads faster.
func (f *Fleet) compact(ctx context.Context) {
	for _, dev := range f.devices() {
		if v := dev.pin(); v != nil {
			for ctx.Err() == nil && v.chain.Compact() {
			}
			v.unpin()
		}
	}
}

// flushDirty makes durable what is not.
func (f *Fleet) flushDirty() (errs []error) {
	for _, dev := range f.devices() {
		if dev.dirty() {
			if err := dev.Flush(); err != nil && !errors.Is(err, os.ErrClosed) {
				errs = append(errs, fmt.Errorf("%s: %w", dev.name, err))
			}
		}
	}
	f.mu.Lock()
	left := sorted(f.unsettled)
	f.mu.Unlock()
	var done []*layer
	for _, l := range left { // sealed, and below no node
		if l.refs.Load() == 0 {
			continue
		}
		if err := l.sync(); err != nil {
			errs = append(errs, err)
		} else {
			done = append(done, l)
		}
	}
	if len(done) > 0 {
		err := f.names.sync()
		if err == nil {
			err = f.markDurable(done, nil)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// devices returns those of the nodes, in the order of their names.
func (f *Fleet) devices() (list []*nodeDevice) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range sorted(f.nodes) {
		if n.dev != nil {
			list = append(list, n.dev)
		}
	}
	return list
}

// flushNode flushes a node, for an operation that is to be durable.
func (f *Fleet) flushNode(n *node) error {
	f.mu.Lock()
	dev := n.dev
	f.mu.Unlock()
	return dev.Flush()
}

// flushAll is flushDirty, side by side, and makes the journal durable.
func (f *Fleet) flushAll() (errs []error) {
	var mu sync.Mutex
	var all sync.WaitGroup
	slots := make(chan struct{}, 16)
	for _, dev := range f.devices() {
		if !dev.dirty() {
			continue
		}
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			if err := dev.Flush(); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("%s: %w", dev.name, err))
			}
		})
	}
	all.Wait()
	errs = append(errs, f.flushDirty()...)
	f.mu.Lock()
	seq := f.state.Seq
	f.mu.Unlock()
	return append(errs, f.journal.sync(seq))
}

// A reaper has the layers that nothing refers to any more.
type reaper struct {
	mu   sync.Mutex
	list []*layer
}

// unref gives up a reference to a layer.
func (f *Fleet) unref(l *layer) {
	if l.refs.Add(-1) > 0 {
		return
	}
	f.reaper.mu.Lock()
	f.reaper.list = append(f.reaper.list, l)
	f.reaper.mu.Unlock()
	f.notice()
}

// reap closes the files of layers that nothing refers to, and removes those whose record was dropped, when that is durable.
func (f *Fleet) reap() {
	f.reaper.mu.Lock()
	list := f.reaper.list
	f.reaper.list = nil
	f.reaper.mu.Unlock()
	if len(list) == 0 {
		return
	}
	f.mu.Lock()
	seq, broken := f.state.Seq, f.broken
	f.mu.Unlock()
	if broken == nil {
		broken = f.journal.sync(seq)
	}
	for _, l := range list {
		err := l.closeFile()
		if broken == nil && l.drop {
			err = errors.Join(err, os.Remove(l.path))
		}
		if err != nil {
			f.log.Event(slog.LevelWarn, fmt.Sprintf("remove: %v", err), "layer not removed", err)
		}
	}
}

// allocatedBytes is what a file uses on its file system; 0 when that is not known.
func allocatedBytes(path string) int64 {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0
	}
	return st.Blocks * 512
}
