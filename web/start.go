package web

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/notify"
	"github.com/dmsnap/dmsnap/server/api"
)

// Config is what operators get of a server: a page, metrics and notifications.
type Config struct {
	Tree       func() (api.Tree, error)
	Version    func() any   // of the tree; see monitor.WatchOptions
	API        http.Handler // see Options
	Listener   net.Listener // of the page and the metrics; nil: there are none. Start's Wait closes it
	Hosts      []string     // see Options
	Metrics    func(latest func() (monitor.Report, error)) http.Handler
	Thresholds monitor.Thresholds
	Notify     notify.Options
	Events     <-chan struct{} // something happened: see monitor.WatchOptions
}

// A Running is what Start began.
type Running struct {
	// URL is that of the page, with the token; "" without a listener.
	URL string

	all      sync.WaitGroup
	notifier *notify.Notifier
	mu       sync.Mutex
	err      error
}

// Start watches a server, delivers its alerts, and serves the page, until ctx ends. The caller calls Wait then.
func Start(ctx context.Context, c Config) (*Running, error) {
	n, err := notify.New(c.Notify)
	if err != nil {
		return nil, err
	}
	r := &Running{notifier: n}
	w := monitor.NewWatcher(c.Tree, monitor.WatchOptions{Version: c.Version, Thresholds: c.Thresholds, Events: c.Events, Alert: func(a monitor.Alert) { n.Send(a.Event()) }})
	if c.Listener != nil {
		o := Options{Token: NewToken(), API: c.API, Watcher: w, Hosts: c.Hosts}
		if c.Metrics != nil {
			o.Metrics = c.Metrics(func() (monitor.Report, error) { return w.Recent(time.Second) })
		}
		r.URL = urlOf(c.Listener.Addr(), o.Token)
		r.all.Go(func() { r.fail(serve(ctx, c.Listener, Handler(o))) })
	}
	r.all.Go(func() { w.Run(ctx) })
	return r, nil
}

func (r *Running) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = errors.Join(r.err, err)
}

// Wait waits until the context of Start has ended and nothing is served any more. The error is that of the listener.
func (r *Running) Wait() error {
	r.all.Wait()
	r.notifier.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// urlOf is the URL of the page for a browser on this host, or on another one if the listener has an address for it.
func urlOf(a net.Addr, token string) string {
	where := a.String()
	if ap, err := netip.ParseAddrPort(where); err == nil && ap.Addr().IsUnspecified() {
		loopback := netip.MustParseAddr("127.0.0.1")
		where = netip.AddrPortFrom(loopback, ap.Port()).String()
	}
	return "http://" + where + "/?token=" + token
}

// shutdownTimeout is how long requests under way may take when the server ends.
const shutdownTimeout = 5 * time.Second

// serve serves h on l until ctx ends.
func serve(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{Handler: h, MaxHeaderBytes: 16 << 10, IdleTimeout: 2 * time.Minute,
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 2 * time.Minute,
		ErrorLog:    log.New(io.Discard, "", 0),
		BaseContext: func(net.Listener) context.Context { return ctx }} // pages' streams end with ctx
	stop := context.AfterFunc(ctx, func() {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		s.Shutdown(late)
		s.Close()
	})
	err := s.Serve(l)
	if !stop() && errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	s.Close()
	return err
}
