package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"github.com/spf13/pflag"

	"github.com/dmsnap/dmsnap/internal/eventlog"
	"github.com/dmsnap/dmsnap/metrics"
	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/notify"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/web"
)

// operatorFlags are what a server does for those who watch it.
type operatorFlags struct {
	http       string
	hosts      []string
	notify     notify.Options
	thresholds monitor.Thresholds
	logFormat  string
	events     monitor.Events // what is logged
}

func (o *operatorFlags) add(f *pflag.FlagSet) {
	f.StringVar(&o.http, "http", "", "serve a page for browsers, and metrics for Prometheus at /metrics, at [HOST:]PORT; without a HOST on the loopback interface (default: none)")
	f.StringSliceVar(&o.hosts, "http-host", nil, "another name by which browsers reach the page (repeatable)")
	f.StringVar(&o.notify.URL, "notify", "", "send alerts to this URL, each as a POST of a JSON object")
	f.StringVar(&o.notify.Command, "notify-exec", "", "run this shell command for each alert, with the JSON object on standard input and DMSNAP_KIND, DMSNAP_NAME, DMSNAP_MESSAGE and others in its environment")
	f.Float64SliceVar(&o.thresholds.Fill, "notify-fill", []float64{80, 90, 95}, "alert when a COW device is filled to these `PERCENTAGES`")
	f.Lookup("notify-fill").DefValue = "80,90,95"
	f.DurationVar(&o.thresholds.TimeToFull, "notify-time", time.Hour, "alert when a COW device will be full within this time at its present rate; 0: never")
	f.StringVar(&o.logFormat, "log-format", "text", "log lines of text, or json: an object a line")
}

func (o *operatorFlags) check() error {
	if o.logFormat != "" && o.logFormat != "text" && o.logFormat != "json" {
		return fmt.Errorf("--log-format %q: must be text or json", o.logFormat)
	}
	if slices.ContainsFunc(o.thresholds.Fill, func(p float64) bool { return !(p > 0 && p <= 100) }) {
		return errors.New("--notify-fill: percentages are more than 0 and at most 100")
	}
	if o.thresholds.TimeToFull <= 0 {
		o.thresholds.TimeToFull = -1
	}
	if o.http != "" {
		if err := server.CheckTCPAddress(o.http); err != nil {
			return fmt.Errorf("--http: %w", err)
		}
	}
	if err := o.notify.Check(); err != nil {
		return fmt.Errorf("--notify: %w", err)
	}
	return nil
}

// watched reports whether somebody watches the server.
func (o *operatorFlags) watched() bool {
	return o.http != "" || o.notify.URL != "" || o.notify.Command != ""
}

// listen listens for browsers, if asked to.
func (o *operatorFlags) listen() (net.Listener, error) {
	if o.http == "" {
		return nil, nil
	}
	l, err := server.ListenTCP(o.http)
	if err != nil {
		return nil, fmt.Errorf("--http: %w", err)
	}
	return l, nil
}

// start begins what o asks for, of the server in c, until ctx ends, and prints the URL of the page. wait is called then.
func (o *operatorFlags) start(ctx context.Context, l net.Listener, c web.Config, log serverLog, stdout io.Writer) (wait func() error, err error) {
	if !o.watched() {
		return func() error { return nil }, nil
	}
	o.notify.Log = log.line
	c.Listener, c.Hosts, c.Metrics = l, o.hosts, metrics.Handler
	c.Thresholds, c.Notify, c.Events = o.thresholds, o.notify, o.events
	r, err := web.Start(ctx, c)
	if err != nil {
		return nil, err
	}
	if r.URL != "" {
		fmt.Fprintf(stdout, "page  %s\n", r.URL)
	}
	return r.Wait, nil
}

// A serverLog is where a server logs: to Line or, where that was asked for, to Logger; line goes to either.
type serverLog struct {
	eventlog.Log
	line func(string)
	end  func()
}

// openLog begins a log on w. What is logged has a report made at once, for its alerts.
func (o *operatorFlags) openLog(w io.Writer) serverLog {
	o.events = monitor.NewEvents()
	w = &loggedTo{w, o.events}
	if o.logFormat != "json" {
		line, end := eventlog.Writer(w, "dmsnap: ")
		return serverLog{eventlog.Log{Line: line}, line, end}
	}
	logger, end := eventlog.JSON(w)
	return serverLog{eventlog.Log{Logger: logger}, func(s string) { logger.Info(s) }, end}
}

// loggedTo is a log whose lines are events.
type loggedTo struct {
	io.Writer
	events monitor.Events
}

func (w *loggedTo) Write(p []byte) (int, error) {
	w.events.Happened() // first: the log may block
	return w.Writer.Write(p)
}
