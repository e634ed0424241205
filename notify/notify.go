// Package notify delivers events to an HTTP server and to a program, without ever making the sender wait.
//
//	n, err := notify.New(notify.Options{URL: "https://alerts.example/hook"})
//	defer n.Close()
//	n.Send(notify.Event{Key: "vm1 fill", Body: body})
//
// # Guarantees
//
//   - Send returns at once. At most 1024 events wait; of more, the oldest is dropped, and that is logged.
//   - A waiting event is replaced by a later one of the same key: a server that was away gets the latest state.
//   - A delivery that fails is repeated after 1 second, then 2, 4 and so on up to a minute, and given up after 15 minutes.
//     Each attempt ends after 10 seconds, whatever the other side does.
//   - The URL and the program have a queue each, and between the attempts of one event others are delivered: what one of them always
//     refuses delays nothing else.
//   - No part of the URL but its scheme and host is logged: the rest may be a secret.
package notify

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"
)

// An Event is something to be delivered.
type Event struct {
	Key  string          // what it is about; of several events with one key only the last is worth delivering
	Body json.RawMessage // a JSON object
	Env  []string        // NAME=value, for the program
}

// Options are where events go. Without URL and Command they go nowhere.
type Options struct {
	URL     string // http or https; receives each event as a POST with Content-Type application/json
	Command string // run by /bin/sh -c for each event, with its body on standard input

	// Log is called when a delivery fails or events are dropped, with one line. It must not block.
	Log func(line string)
}

// Check refuses a URL that is not http or https. Its error does not contain the URL.
func (o Options) Check() error {
	if o.URL == "" {
		return nil
	}
	if u, err := url.Parse(o.URL); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return errors.New("the URL must be http://HOST/… or https://HOST/…")
	}
	return nil
}

// Limits of deliveries. Tests shorten them.
type limits struct {
	queue          int
	attempt        time.Duration // of one attempt
	first, longest time.Duration // between attempts
	giveUp         time.Duration
}

var defaults = limits{queue: 1024, attempt: 10 * time.Second, first: time.Second, longest: time.Minute, giveUp: 15 * time.Minute}

// A Notifier delivers events. Its methods may be called concurrently.
type Notifier struct {
	sinks  []*sink
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// New returns a Notifier; the caller closes it. It refuses a URL that is not http or https.
func New(o Options) (*Notifier, error) { return newNotifier(o, defaults) }

func newNotifier(o Options, l limits) (*Notifier, error) {
	if o.Log == nil {
		o.Log = func(string) {}
	}
	if err := o.Check(); err != nil {
		return nil, err
	}
	var deliver []*sink
	if o.URL != "" {
		u, _ := url.Parse(o.URL)
		// Redirects are not followed: the body goes where it was meant to go.
		client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
		deliver = append(deliver, &sink{name: u.Scheme + "://" + u.Host, limits: l, log: o.Log,
			deliver: func(ctx context.Context, e Event) error { return post(ctx, client, o.URL, e) }})
	}
	if o.Command != "" {
		deliver = append(deliver, &sink{name: "the command for notifications", limits: l, log: o.Log,
			deliver: func(ctx context.Context, e Event) error { return run(ctx, o.Command, e) }})
	}
	ctx, cancel := context.WithCancel(context.Background())
	n := &Notifier{sinks: deliver, cancel: cancel}
	for _, s := range deliver {
		s.wake = make(chan struct{}, 1)
		n.done.Go(func() { s.loop(ctx) })
	}
	return n, nil
}

// Send queues an event for delivery.
func (n *Notifier) Send(e Event) {
	for _, s := range n.sinks {
		s.add(e)
	}
}

// Close waits at most 3 seconds for the delivery of what is queued, and ends.
func (n *Notifier) Close() {
	until := time.Now().Add(3 * time.Second)
	for _, s := range n.sinks {
		for time.Now().Before(until) && !s.idle() {
			time.Sleep(10 * time.Millisecond)
		}
	}
	n.cancel()
	n.done.Wait()
}

// A sink is one destination with its queue. Each has its own, so that one that fails does not delay the other; and an event that is
// refused is tried again later, after others, so that it does not delay them either.
type sink struct {
	name string
	limits
	log     func(string)
	deliver func(context.Context, Event) error
	wake    chan struct{}

	mu      sync.Mutex
	queue   []*waiting // the oldest first
	busy    *waiting   // is being delivered, and not in the queue
	dropped int        // since the last event was taken
}

// waiting is an event that was not delivered yet.
type waiting struct {
	Event
	attempts int
	began    time.Time // of the first attempt
	due      time.Time // of the next one
	pause    time.Duration
}

// add queues an event, in the place of one of the same key.
func (s *sink) add(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := &waiting{Event: e, pause: s.first}
	if i := s.find(w.Key); i >= 0 {
		s.queue[i] = w
	} else {
		if len(s.queue) == s.limits.queue {
			s.queue = s.queue[1:]
			s.dropped++
		}
		s.queue = append(s.queue, w)
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// again queues an event that failed before all others, as it is older; it is dropped when there is no space. mu is held.
func (s *sink) again(w *waiting) {
	if len(s.queue) == s.limits.queue {
		s.dropped++
		return
	}
	w.due = time.Now().Add(w.pause)
	w.pause = min(2*w.pause, s.longest)
	s.queue = slices.Insert(s.queue, 0, w)
}

// find returns the place of a key in the queue, or -1. mu is held.
func (s *sink) find(key string) int {
	return slices.IndexFunc(s.queue, func(w *waiting) bool { return w.Key == key })
}

func (s *sink) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.queue) == 0 && s.busy == nil
}

// next takes the event that is due and had the fewest attempts: a new one does not wait for those that fail. Without one it returns
// when the first will be due, zero: none. dropped is how many were dropped since the last call that took one.
func (s *sink) next(now time.Time) (w *waiting, dropped int, due time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	best := -1
	for i, w := range s.queue {
		switch {
		case w.due.After(now):
			if due.IsZero() || w.due.Before(due) {
				due = w.due
			}
		case best < 0 || w.attempts < s.queue[best].attempts:
			best = i
		}
	}
	if best < 0 {
		return nil, 0, due
	}
	s.busy = s.queue[best]
	s.queue = slices.Delete(s.queue, best, best+1)
	dropped, s.dropped = s.dropped, 0
	return s.busy, dropped, time.Time{}
}

func (s *sink) loop(ctx context.Context) {
	for ctx.Err() == nil {
		w, dropped, due := s.next(time.Now())
		if dropped > 0 {
			s.log(fmt.Sprintf("%s: %d notifications were dropped: too many are waiting", s.name, dropped))
		}
		if w != nil {
			s.try(ctx, w)
			continue
		}
		var timer <-chan time.Time // nil: nothing waits
		if !due.IsZero() {
			timer = time.After(time.Until(due))
		}
		select {
		case <-ctx.Done():
		case <-s.wake:
		case <-timer:
		}
	}
}

// try makes one attempt to deliver an event. One that fails is queued again, unless a later one of its key waits, or it is given up.
func (s *sink) try(ctx context.Context, w *waiting) {
	if w.attempts == 0 {
		w.began = time.Now()
	}
	w.attempts++
	one, cancel := context.WithTimeout(ctx, s.attempt)
	err := s.deliver(one, w.Event)
	cancel()
	s.mu.Lock()
	s.busy = nil
	later := s.find(w.Key) >= 0
	givenUp := err != nil && !later && time.Since(w.began)+w.pause > s.giveUp
	if err != nil && !later && !givenUp {
		s.again(w)
	}
	s.mu.Unlock()
	switch {
	case err == nil || ctx.Err() != nil:
	case givenUp:
		s.log(fmt.Sprintf("%s: a notification (%s) is given up after %d attempts: %v", s.name, w.Key, w.attempts, err))
	case w.attempts == 1:
		s.log(fmt.Sprintf("%s: a notification (%s) is repeated: %v", s.name, w.Key, err))
	}
}

// post sends an event. Its errors do not contain the URL.
func post(ctx context.Context, client *http.Client, to string, e Event) error {
	q, err := http.NewRequestWithContext(ctx, http.MethodPost, to, bytes.NewReader(e.Body))
	if err != nil {
		return errors.New("the request can't be made")
	}
	q.Header.Set("Content-Type", "application/json")
	q.Header.Set("User-Agent", "dmsnap")
	answer, err := client.Do(q)
	if err != nil {
		var withURL *url.Error
		if errors.As(err, &withURL) {
			err = withURL.Err
		}
		return err
	}
	defer answer.Body.Close()
	io.Copy(io.Discard, io.LimitReader(answer.Body, 64<<10)) // so that the connection can be used again
	if answer.StatusCode/100 != 2 {
		return fmt.Errorf("the answer was %s", answer.Status)
	}
	return nil
}

// run runs the command. When ctx ends, its whole process group is killed.
func run(ctx context.Context, command string, e Event) error {
	c := exec.CommandContext(ctx, "/bin/sh", "-c", command)
	c.Stdin = bytes.NewReader(e.Body)
	c.Env = append(os.Environ(), e.Env...)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	c.WaitDelay = time.Second // a process that left the group may keep the pipe open
	return c.Run()
}
