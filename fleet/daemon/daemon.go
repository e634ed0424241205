// Package daemon serves a fleet: its exports over NBD, its control API over HTTP, the rights of clients, and the policies
// of disks.
//
//	f, err := fleet.Open(dir, fleet.Options{})
//	...
//	d, err := daemon.New(f, daemon.Options{Dir: dir})
//	...
//	return d.Run(ctx, controlListener, nbdListener)
//
// # Guarantees
//
//   - When Run returns after its context ended, requests under way have been answered; when the fleet is closed after
//     that, everything that was acknowledged is durable.
//   - A client does what its rights allow: on a unix socket by its user, over TCP by its certificate.
//   - A path in a request lies below a directory that Options allow, with symbolic links resolved.
//
// Errors that a client can distinguish are *api.Error; their messages name fields of the API.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/internal/eventlog"
	"github.com/dmsnap/dmsnap/server/api"
)

// Fleet is what a daemon serves: a *fleet.Fleet.
type Fleet interface {
	AddDisk(context.Context, api.AddDiskRequest) (api.Disk, error)
	RemoveDisk(ctx context.Context, name string) error
	Disk(name string) (api.Disk, error)
	Disks() api.Disks
	SetPolicy(context.Context, api.PolicyRequest) (api.Disk, error)
	SetSpace(disk string, s fleet.Space)
	Fork(context.Context, api.ForkRequest) (api.Element, error)
	Checkpoint(context.Context, api.CheckpointRequest) (api.Checkpoints, error)
	Rollback(context.Context, api.RollbackRequest) (api.Element, error)
	Squash(context.Context, api.SquashRequest) (api.Element, error)
	Drop(ctx context.Context, name string) error
	// Forget removes a checkpoint; where others lie on it, its name, and Squash of what lies on it the layer.
	Forget(ctx context.Context, checkpoint string) error
	Merge(ctx context.Context, node string) (api.TreeMerge, error)
	PauseMerge(ctx context.Context, node string) (api.TreeMerge, error)
	ResumeMerge(ctx context.Context, node string) (api.TreeMerge, error)
	TakeBackMerge(ctx context.Context, node string) (api.Disk, error)
	Adopt(context.Context, api.AdoptRequest) (api.Element, error)
	Tree() api.Tree
	Version() fleet.Version
	Element(name string) (api.Element, error)
	Table(node string) (api.Table, error)
	Layers(name string) (api.Layers, error)
	Seal(ctx context.Context, node string) (api.Layers, error)
	HeatMap(name string, parts int) (api.HeatMap, error)
	Subscribe(ctx context.Context) <-chan api.Event
	// Start begins to serve the exports on listeners; wait returns when ctx has ended and requests under way are answered.
	Start(ctx context.Context, l net.Listener, more ...net.Listener) (wait func() error)
}

// Options say how a fleet is served. The zero value is usable.
type Options struct {
	Dir        string   // of the fleet, for people
	URIs       []string // where its exports are found, for people
	AllowPaths []string // directories below which files in requests must lie

	// PolicyDefaults returns the policy of disks where they have none of their own, by disk, "*" for all; it is called at
	// the start and by Reload. nil: there are none.
	PolicyDefaults func() (map[string]map[string]string, error)

	// Limits are those of the fleet's exports; nil: rates have no effect.
	Limits *Limits

	// PolicyInterval is how often policies are applied; 0: a second.
	PolicyInterval time.Duration

	// Log and Logger are called for events that no request reports, as those of package server.
	Log    func(line string)
	Logger *slog.Logger
}

// A Daemon serves a fleet. Its methods may be called concurrently.
type Daemon struct {
	fleet Fleet
	opts  Options
	log   eventlog.Log
	allow []string // Options.AllowPaths, absolute and without symbolic links

	ending context.Context // ends with Run
	end    context.CancelFunc

	forks       sync.Mutex // held while the number of a disk's nodes is checked and grows
	subscribers atomic.Int64
	policies    policies
}

// New returns a daemon of a fleet, which the caller closes after Run.
func New(f Fleet, o Options) (*Daemon, error) {
	d := &Daemon{fleet: f, opts: o, log: eventlog.Log{Line: o.Log, Logger: o.Logger}}
	d.ending, d.end = context.WithCancel(context.Background())
	var err error
	if d.allow, err = resolvePaths(o.AllowPaths); err != nil {
		return nil, err
	}
	d.policies.init()
	d.applySpace()
	return d, d.Reload()
}

// Reload reads the defaults of policies again. When that fails the former ones stay.
func (d *Daemon) Reload() error {
	if d.opts.PolicyDefaults == nil {
		return nil
	}
	texts, err := d.opts.PolicyDefaults()
	if err != nil {
		return err
	}
	for disk, set := range texts {
		if _, err = ParsePolicy(set); err != nil {
			return fmt.Errorf("policy of %s: %w", disk, err)
		}
	}
	d.policies.setDefaults(texts)
	d.applySpace()
	return nil
}

// Run serves the control API on control and the exports on the other listeners, and closes all, until ctx ends, which is
// nil, or one of them fails. URIs are those of l.
func (d *Daemon) Run(ctx context.Context, control, l net.Listener, more ...net.Listener) error {
	until := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, d.end)()
	var all sync.WaitGroup
	wait := d.fleet.Start(ctx, l, more...)
	all.Go(func() { cancel(wait()) })
	all.Go(func() { cancel(api.Serve(ctx, control, d.Handler(), connContext)) })
	all.Go(func() { d.applyPolicies(ctx) })
	all.Wait()
	d.policies.squashing.Wait()
	if cause := context.Cause(ctx); cause != context.Cause(until) && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// status is the reply to GET /v1/daemon.
func (d *Daemon) status(r Rights) api.Daemon {
	t := d.fleet.Tree()
	s := api.Daemon{Dir: d.opts.Dir, PID: os.Getpid(), URIs: d.opts.URIs, AllowPaths: d.allow, Rights: r.String(), Error: t.Error}
	for _, e := range t.Elements {
		switch e.Kind {
		case api.KindDisk:
			s.Disks++
		case api.KindCheckpoint:
			s.Checkpoints++
		case api.KindNode:
			s.Nodes++
		}
		s.Connections += e.Connections
		s.Bytes += e.AllocatedBytes
	}
	for _, disk := range d.fleet.Disks().Disks {
		s.Bytes += disk.PreserveBytes
		if disk.Merge != nil {
			s.Merges = append(s.Merges, *disk.Merge)
		}
	}
	return s
}

// Tree returns the tree, with the merges of its disks.
func (d *Daemon) Tree() api.Tree {
	t := d.fleet.Tree()
	t.Server = api.ServerOfFleet
	for _, disk := range d.fleet.Disks().Disks {
		if disk.Merge == nil {
			continue
		}
		for i := range t.Elements {
			if e := &t.Elements[i]; e.Name == disk.Merge.Node {
				e.Merge = disk.Merge
			}
		}
	}
	return t
}

// Version is that of the fleet.
func (d *Daemon) Version() fleet.Version { return d.fleet.Version() }

// refuse returns an error with a code.
func refuse(code api.Code, format string, args ...any) error {
	return &api.Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// codeOf is the code of an error.
func codeOf(err error) api.Code {
	var coded *api.Error
	if errors.As(err, &coded) {
		return coded.Code
	}
	return api.CodeFailed
}
