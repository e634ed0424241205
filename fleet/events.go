package fleet

import (
	"context"
	"errors"
	"log/slog"
	"strings"

	"github.com/dmsnap/dmsnap/server/api"
)

// eventsBehind is how many events a subscriber may be behind before some are left out.
const eventsBehind = 256

// A hub passes events on to subscribers. Fleet.mu is held for all of its methods.
type hub struct {
	list   map[*subscriber]struct{}
	closed bool
}

type subscriber struct {
	ch     chan api.Event
	missed bool
}

// Subscribe returns the events from now on, until ctx ends or the fleet is closed; the channel is closed then. A subscriber
// that is too slow misses some, and gets an api.EventMissed in their place.
func (f *Fleet) Subscribe(ctx context.Context) <-chan api.Event {
	s := &subscriber{ch: make(chan api.Event, eventsBehind+1)} // and one for EventMissed
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.events.closed {
		close(s.ch)
		return s.ch
	}
	if f.events.list == nil {
		f.events.list = map[*subscriber]struct{}{}
	}
	f.events.list[s] = struct{}{}
	context.AfterFunc(ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.events.remove(s)
	})
	return s.ch
}

func (h *hub) remove(s *subscriber) {
	if _, ok := h.list[s]; ok {
		delete(h.list, s)
		close(s.ch)
	}
}

// close ends all subscriptions.
func (h *hub) close() {
	h.closed = true
	for s := range h.list {
		h.remove(s)
	}
}

// publish logs an event and passes it on, and does not wait for subscribers. mu is held.
func (f *Fleet) publish(e api.Event) {
	e.Time = f.opts.Now().UTC().Round(0)
	f.logEvent(e)
	for s := range f.events.list {
		if len(s.ch) < eventsBehind {
			s.missed = false
			s.ch <- e
		} else if !s.missed {
			s.missed = true
			s.ch <- api.Event{Kind: api.EventMissed, Time: e.Time}
		}
	}
}

// logEvent logs what was done, on request or by itself.
func (f *Fleet) logEvent(e api.Event) {
	if e.Kind == api.EventSnapshot || e.Kind == api.EventChangesRefused { // logged with their causes already
		return
	}
	message := strings.ReplaceAll(string(e.Kind), "_", " ")
	line := e.Name + ": " + message
	attrs := []slog.Attr{slog.String("operation", string(e.Kind)), slog.String("disk", e.Disk)}
	if e.Name != e.Disk {
		attrs = append(attrs, slog.String("node", e.Name))
	}
	if e.Parent != "" && e.Parent != e.Name {
		line += " (" + e.Parent + ")"
		attrs = append(attrs, slog.String("parent", e.Parent))
	}
	level, err := slog.LevelInfo, error(nil)
	if e.Error != "" {
		level, err = slog.LevelError, errors.New(e.Error)
		line += ": " + e.Error
	}
	f.log.Event(level, line, message, err, attrs...)
}
