package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/server"
)

// Config is where and how a fleet is served by a program of its own.
type Config struct {
	Dir             string
	Control, Socket string                  // unix sockets; "": control.sock and nbd.sock in Dir
	Group           int                     // of both; negative: that of the process
	Mode            os.FileMode             // of both; 0: 0600
	Passed          map[string]net.Listener // sockets that are used instead: control and nbd
	Listen          string                  // address on TCP for NBD clients, too; "": none
	Certificates    string                  // directory for TLS on TCP, as server.LoadTLS reads it
	Access          string                  // file of the rights of clients on TCP, as ParseRules reads it
	Policies        string                  // file of policies, as ParsePolicyDefaults reads it
	AllowPaths      []string
	Freeze          FreezeCommand // Command "": none
	Log             func(line string)
	Logger          *slog.Logger

	// Beside begins what runs beside the daemon until ctx ends, a page for example, when clients can connect; wait waits for
	// its end. Requests to control have all rights. nil: nothing.
	Beside func(ctx context.Context, d *Daemon, control http.Handler) (wait func() error, err error)
}

// ShutdownTimeout bounds how long requests in flight are answered for when a daemon ends.
const ShutdownTimeout = 5 * time.Second

// Serve opens the fleet in c.Dir, with what o says of it, serves it until ctx ends, which is nil, or a listener fails, and closes
// it. A refused start changes nothing: what can be checked is, then the fleet is opened, and the sockets are made last. ready is
// called with the NBD URIs, without names of exports, when clients can connect. At each value of reload, the files of rights
// and policies and the certificates are read again; what can't be read stays as it was, which is logged.
func (c Config) Serve(ctx context.Context, reload <-chan struct{}, o fleet.Options, ready func(uris []string)) (err error) {
	var access Access
	var limits Limits
	o.Log, o.Logger, o.Wrap = c.Log, c.Logger, limits.Wrap
	o.NBD.Authorize, o.NBD.ShutdownTimeout = access.Authorize, ShutdownTimeout
	if c.Freeze.Command != "" {
		o.Freeze = c.Freeze.Run
	}
	if err := c.check(); err != nil {
		return err
	}
	if c.Certificates != "" {
		if o.NBD.TLS, err = server.LoadTLS(c.Certificates); err != nil {
			return err
		}
		o.NBD.RequireTLS, o.NBD.PlainUnix = true, true
	}
	if err := c.loadRules(&access); err != nil {
		return err
	}
	options := Options{Dir: c.Dir, AllowPaths: c.AllowPaths, Limits: &limits, Log: c.Log, Logger: c.Logger}
	if c.Policies != "" {
		options.PolicyDefaults = c.loadPolicies
		if _, err := c.loadPolicies(); err != nil {
			return err
		}
	}
	if _, err := resolvePaths(c.AllowPaths); err != nil {
		return err
	}
	f, err := fleet.Open(c.Dir, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	access.DiskOf = f.DiskOf
	control, listeners, err := c.listen()
	if err != nil {
		return err
	}
	for _, l := range listeners {
		options.URIs = append(options.URIs, o.NBD.URI(l.Addr(), ""))
	}
	d, err := New(f, options)
	if err != nil {
		server.CloseListeners(append(listeners, control)...)
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-reload:
			}
			if err := c.reload(d, f, &access); err != nil {
				d.log.Event(slog.LevelError, fmt.Sprintf("reload: %v: what was read before is used", err), "reload failed", err)
			} else {
				d.log.Event(slog.LevelInfo, "certificates, rights and policies were read again", "reloaded", nil)
			}
		}
	}()
	if c.Beside != nil {
		all := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			d.Handler().ServeHTTP(w, r.WithContext(WithRights(r.Context(), RightAdmin)))
		})
		wait, err := c.Beside(ctx, d, all)
		if err != nil {
			server.CloseListeners(append(listeners, control)...)
			return err
		}
		defer func() {
			cancel(nil)
			err = errors.Join(err, wait())
		}()
	}
	if ready != nil {
		ready(options.URIs)
	}
	return d.Run(ctx, control, listeners[0], listeners[1:]...)
}

// check refuses what can't be served whatever the machine.
func (c Config) check() error {
	for _, path := range []string{c.socket(), c.control()} {
		if err := server.CheckSocketPath(path); err != nil {
			return err
		}
	}
	if c.Listen == "" {
		if c.Certificates != "" || c.Access != "" {
			return errors.New("certificates and an access file are for clients on TCP, and no TCP address is given")
		}
		return nil
	}
	if err := server.CheckTCPAddress(c.Listen); err != nil {
		return err
	}
	if c.Access != "" && c.Certificates == "" {
		return errors.New("an access file is about certificates of clients, and no certificates are given")
	}
	return nil
}

func (c Config) socket() string { return orIn(c.Socket, c.Dir, "nbd.sock") }

func (c Config) control() string { return orIn(c.Control, c.Dir, "control.sock") }

func orIn(path, dir, name string) string {
	if path == "" {
		return filepath.Join(dir, name)
	}
	return path
}

// listen makes the sockets, all or none.
func (c Config) listen() (control net.Listener, list []net.Listener, err error) {
	defer func() {
		if err != nil {
			server.CloseListeners(append(list, control)...)
		}
	}()
	mode := c.Mode
	if mode == 0 {
		mode = 0o600
	}
	l := c.Passed["nbd"]
	if l == nil {
		if l, err = ListenUnix(c.socket(), c.Group, mode); err != nil {
			return nil, nil, err
		}
	}
	list = append(list, l)
	if c.Listen != "" {
		if l, err = server.ListenTCP(c.Listen); err != nil {
			return nil, list, err
		}
		list = append(list, l)
	}
	if control = c.Passed["control"]; control == nil {
		control, err = ListenUnix(c.control(), c.Group, mode)
	}
	return control, list, err
}

func (c Config) loadRules(a *Access) error {
	if c.Access == "" {
		return nil
	}
	f, err := os.Open(c.Access)
	if err != nil {
		return err
	}
	defer f.Close()
	rules, err := ParseRules(f)
	if err != nil {
		return fmt.Errorf("%s: %w", c.Access, err)
	}
	a.SetRules(rules)
	return nil
}

func (c Config) loadPolicies() (map[string]map[string]string, error) {
	f, err := os.Open(c.Policies)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all, err := ParsePolicyDefaults(f)
	if err != nil {
		err = fmt.Errorf("%s: %w", c.Policies, err)
	}
	return all, err
}

func (c Config) reload(d *Daemon, f *fleet.Fleet, a *Access) error {
	errs := []error{c.loadRules(a), d.Reload()}
	if c.Certificates != "" {
		config, err := server.LoadTLS(c.Certificates)
		if err == nil {
			f.SetTLS(config)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
