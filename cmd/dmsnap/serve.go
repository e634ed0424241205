package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/snapshot"
)

// serveOptions are what serve was asked.
type serveOptions struct {
	socket, listen string
	control        string
	exportOrigin   bool
	readOnly       bool
	create         bool
	force, raw     bool
	store          storeFlag
	sync           syncFlag
	onFull         fullFlag
	grow, growMax  sizeFlag
	certificates   string
	tls            tlsFlag
	maxConnections uint
	idleTimeout    time.Duration
	chunkSize      sizeFlag
}

func newServe() *cobra.Command {
	o := serveOptions{onFull: fullFlag{FullPolicy: snapshot.FullFail}}
	c := &cobra.Command{
		Use:   "serve ORIGIN [[NAME=]COW...]",
		Short: "Serve snapshots, and their origin, over NBD",
		Long: `Serve the snapshots of an origin over NBD, each as an export: NAME, or the COW file's base name without its
extension. The export "" is the first snapshot. --export-origin serves the origin too, as "origin"; what
clients write there is preserved in every snapshot first. What goes before the first "=" is a NAME
unless it has a slash.

Without COW, ORIGIN.cow is used, and made when it is not there. Any other COW must hold a store, unless
--create is given, which makes what is missing: the file, as dmsnap create would, or the store. With --store N
the exceptions are kept in memory and the COW is scratch space, of no use afterwards.

Without --socket or --listen, the socket is ORIGIN.sock. Sockets are for their owner alone (mode
0600). --listen without a HOST means the loopback interface; NBD asks nobody for a password.

A COW without room, be it its own size or a full file system beneath, loses nothing: writes that need
room, to the snapshot and to the origin, fail with "no space" until there is some, and everything else
goes on. See --on-full, --grow, and dmsnap grow.

The URI of each export is printed, one a line, when clients may connect. SIGINT and SIGTERM answer what is
under way, make everything durable, and end with status 0.

With --tls-certificates the server speaks TLS, and its URIs begin with nbds. A service manager may pass the
socket, and one named "control" (systemd socket activation); then --socket, --listen and --control are
not used.

With --control PATH the server can be asked and told things while it runs: see status, snapshot, drop and
merge.`,
		Example: `  dmsnap serve disk.img
  dmsnap serve disk.img before=disk.cow --export-origin --socket /run/dmsnap.sock --control /run/dmsnap.ctl
  dmsnap serve disk.img a.cow b.cow --create --listen 127.0.0.1:10809`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, stop := untilSignal()
			defer stop()
			// A reader of our output that went away is no reason to leave our clients alone.
			signal.Ignore(syscall.SIGPIPE)
			return o.run(ctx, args[0], args[1:], c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	f := c.Flags()
	f.StringVar(&o.socket, "socket", "", "listen on this unix socket (default ORIGIN.sock)")
	f.StringVar(&o.listen, "listen", "", "listen on TCP instead, at [HOST:]PORT")
	f.StringVar(&o.control, "control", "", "listen for the control API on this unix socket (default: none)")
	f.BoolVar(&o.exportOrigin, "export-origin", false, `serve the origin as "origin"`)
	f.BoolVar(&o.readOnly, "read-only", false, "open everything read-only")
	f.BoolVar(&o.create, "create", false, "make COW files and stores that are not there")
	f.Var(&o.store, "store", "P, PO (a full COW refuses writes instead of ending the snapshot) or N (in memory)")
	f.Var(&o.sync, "sync", "when a write is safe from a crash: at a flush, like a disk with a cache, or always, a snapshot's before it is answered")
	f.Var(&o.onFull, "on-full", "what becomes of writes that need room in a COW that has none: they fail, pause until there is some, or invalidate the snapshot as the kernel does")
	f.Var(&o.grow, "grow", "make a COW file that is full longer by this much at a time (default: leave it)")
	f.Var(&o.growMax, "grow-max", "make it no longer than this")
	f.StringVar(&o.certificates, "tls-certificates", "", "speak TLS, with server-cert.pem and server-key.pem of this folder; clients need a certificate of its ca-cert.pem, where there is one")
	f.Var(&o.tls, "tls", "with --tls-certificates: require it of every client, or allow it")
	f.UintVar(&o.maxConnections, "max-connections", 0, "turn clients away beyond so many (default: no limit)")
	f.DurationVar(&o.idleTimeout, "idle-timeout", 0, "hang up on clients that ask nothing for so long, e.g. 10m (default: never)")
	f.Var(&o.chunkSize, "chunk-size", "size of a chunk of stores that are made (default 4KiB)")
	f.BoolVar(&o.force, "force", false, "make missing stores and scratch space over whatever the COW devices hold, and serve an origin that is too short for its store")
	addRaw(f, &o.raw)
	c.MarkFlagsMutuallyExclusive("socket", "listen")
	c.MarkFlagsMutuallyExclusive("read-only", "create")
	return c
}

// syncFlag is the value of --sync.
type syncFlag struct{ snapshot.SyncMode }

func (f *syncFlag) Set(s string) error {
	switch s {
	case "flush":
		f.SyncMode = snapshot.SyncFlush
	case "always":
		f.SyncMode = snapshot.SyncAlways
	default:
		return errors.New("must be flush or always")
	}
	return nil
}

func (f *syncFlag) String() string {
	if f.SyncMode == snapshot.SyncAlways {
		return "always"
	}
	return "flush"
}

func (f *syncFlag) Type() string { return "flush|always" }

// fullFlag is the value of --on-full.
type fullFlag struct {
	snapshot.FullPolicy
	set bool
}

var fullPolicies = map[string]snapshot.FullPolicy{
	"invalidate": snapshot.FullInvalidate, "fail": snapshot.FullFail, "pause": snapshot.FullPause,
}

func (f *fullFlag) Set(s string) error {
	p, known := fullPolicies[s]
	if !known {
		return errors.New("must be invalidate, fail or pause")
	}
	f.FullPolicy, f.set = p, true
	return nil
}

func (f *fullFlag) String() string {
	for name, p := range fullPolicies {
		if p == f.FullPolicy {
			return name
		}
	}
	panic("a policy without a name")
}

func (f *fullFlag) Type() string { return "invalidate|fail|pause" }

// attachments reads the [NAME=]COW arguments.
func (o *serveOptions) attachments(originPath string, args []string) []attachment {
	one := attachment{create: o.create, force: o.force, chunkSize: o.chunkSize, store: o.store.StoreType}
	if len(args) == 0 {
		one.cow = originPath + ".cow"
		one.name = exportName(one.cow)
		one.create = !o.readOnly
		return []attachment{one}
	}
	var list []attachment
	for _, arg := range args {
		name, path, named := strings.Cut(arg, "=")
		if !named || strings.Contains(name, "/") {
			name, path = exportName(arg), arg
		}
		one.name, one.cow = name, path
		list = append(list, one)
	}
	return list
}

// exportName is what the snapshot on a path is called unless told otherwise.
func exportName(path string) string {
	base := filepath.Base(path)
	if name := strings.TrimSuffix(base, filepath.Ext(base)); name != "" {
		return name
	}
	return base
}

// flushEvery is how long what a client wrote and did not flush may stay in memory.
const flushEvery = 5 * time.Second

// run serves until ctx ends, or a listener fails.
func (o *serveOptions) run(ctx context.Context, originPath string, cows []string, stdout, stderr io.Writer) (err error) {
	if _, err := o.chunkSize.chunkSectors(); err != nil {
		return err
	}
	log, endLog := newLog(stderr)
	defer endLog()
	s, err := o.open(originPath, cows, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	l, ctl, err := o.listeners(originPath)
	if err != nil {
		return err
	}
	defer l.Close()
	if ctl != nil {
		defer ctl.Close()
	}
	s.uri = func(name string) string { return exportURI(l.Addr(), name, o.certificates != "" && !o.tls.allow) }
	return s.serve(ctx, l, ctl, stdout)
}

// open opens the origin and attaches the snapshots. The caller closes the server.
func (o *serveOptions) open(originPath string, cows []string, log func(string)) (s *server, err error) {
	opts := snapshot.Options{Sync: o.sync.SyncMode, OnFull: o.onFull.FullPolicy,
		Grow: snapshot.Growth{Step: o.grow.bytes, Max: o.growMax.bytes}}
	limits := nbd.Options{Log: log, MaxConnections: int(o.maxConnections), IdleTimeout: o.idleTimeout}
	if o.certificates != "" {
		if limits.TLS, err = loadTLS(o.certificates); err != nil {
			return nil, err
		}
		limits.RequireTLS = !o.tls.allow
	}
	if s, err = newServer(originPath, o.readOnly, o.raw, opts, limits); err != nil {
		return nil, err
	}
	s.onFullSet = o.onFull.set
	for _, a := range o.attachments(originPath, cows) {
		if err := s.attach(a); err != nil {
			return nil, errors.Join(err, s.close())
		}
	}
	s.setDefault()
	if o.exportOrigin {
		if err := s.exportOrigin(); err != nil {
			return nil, errors.Join(err, s.close())
		}
	}
	return s, nil
}

// listeners returns the sockets that were passed to the process, or listens where o says. ctl is nil when
// nobody asked for it.
func (o *serveOptions) listeners(originPath string) (l, ctl net.Listener, err error) {
	passed, err := passedListeners()
	if err != nil {
		return nil, nil, err
	}
	if l = passed["nbd"]; l == nil {
		if l, err = o.listener(originPath); err != nil {
			return nil, nil, err
		}
	}
	if ctl = passed["control"]; ctl == nil && o.control != "" {
		if ctl, err = listenUnix(o.control); err != nil {
			l.Close()
			return nil, nil, err
		}
	}
	return l, ctl, nil
}

// listener listens where o says.
func (o *serveOptions) listener(originPath string) (net.Listener, error) {
	switch {
	case o.listen != "":
		return listenTCP(o.listen)
	case o.socket != "":
		return listenUnix(o.socket)
	}
	return listenUnix(originPath + ".sock")
}

// serve runs the NBD server on l, the control API on ctl unless it is nil, and the flush timer, until ctx
// ends (nil) or one of them fails. When it returns none of them runs.
func (s *server) serve(until context.Context, l, ctl net.Listener, stdout io.Writer) error {
	ctx, cancel := context.WithCancelCause(until)
	defer cancel(nil)
	// Who waits for room would hold up the end.
	defer context.AfterFunc(ctx, s.origin.EndPauses)()
	var all sync.WaitGroup
	all.Go(func() { cancel(s.nbd.Serve(ctx, l)) })
	if ctl != nil {
		all.Go(func() { cancel(s.serveControl(ctx, ctl)) })
	}
	all.Go(func() { s.flushLoop(ctx, flushEvery) })
	for _, st := range s.status().Snapshots {
		fmt.Fprintf(stdout, "%s  %s\n", printable(st.Name), st.URI)
	}
	if s.exported {
		fmt.Fprintf(stdout, "%s  %s\n", originName, s.uri(originName))
	}
	all.Wait()
	if cause := context.Cause(ctx); cause != context.Cause(until) {
		return cause
	}
	return nil
}

// printable is a name as it is shown to people: quoted where it would tear the line or the terminal.
func printable(name string) string {
	if q := strconv.Quote(name); q != `"`+name+`"` || strings.Contains(name, " ") {
		return q
	}
	return name
}

// newLog returns a function that writes lines to w without ever making its caller wait: lines are
// dropped when w takes none. end writes those that are left.
func newLog(w io.Writer) (log func(string), end func()) {
	lines := make(chan string, 64)
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case s := <-lines:
				fmt.Fprintf(w, "dmsnap: %s\n", s)
			case <-quit:
				for {
					select {
					case s := <-lines:
						fmt.Fprintf(w, "dmsnap: %s\n", s)
					default:
						return
					}
				}
			}
		}
	}()
	return func(s string) {
			select {
			case lines <- s:
			default:
			}
		}, func() {
			close(quit)
			select {
			case <-done:
			case <-time.After(time.Second): // w is stuck; what it says is not worth waiting for
			}
		}
}
