// Package server serves a disk with its snapshots over NBD, and is controlled while it runs: by the methods of a
// [Server], or over HTTP by those of package server/api.
//
//	s, err := server.Open("disk.img", server.Options{})
//	if err != nil {
//		return err
//	}
//	defer s.Close()
//	_, err = s.Attach(api.AttachRequest{Name: "vm1", COW: "vm1.cow", Create: true})
//	...
//	l, err := server.ListenUnix("nbd.sock")
//	...
//	return s.Serve(ctx, l, nil)
//
// # Guarantees
//
//   - A write to the origin through the server never changes what a valid snapshot shows (package snapshot).
//   - A snapshot is attached, dropped, grown and merged while clients use the exports; other clients see at most a
//     delay.
//   - When Serve returns after its context ended, requests under way have been answered. When Close returns nil,
//     every acknowledged write is durable.
//
// Errors that a client of the API can distinguish are *api.Error, with a code; their messages name fields of the API.
package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/activity"
	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/eventlog"
	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/address"
	"github.com/dmsnap/dmsnap/source/lvm"
	"github.com/dmsnap/dmsnap/vhost"
)

// OriginName is the name of the origin's export, unless the origin is a logical volume: then it is the name of that.
const OriginName = "origin"

// FullPolicy is what to do with writes that need space in a full COW device.
type FullPolicy string

// The policies. The zero value is FullFail, and FullInvalidate for a snapshot of store PO.
const (
	FullFail       FullPolicy = "fail"       // they fail
	FullPause      FullPolicy = "pause"      // they wait until there is space
	FullInvalidate FullPolicy = "invalidate" // as in the kernel: the snapshot becomes invalid, or with PO overflows
)

// fullPolicies are the engine's values of the policies.
var fullPolicies = map[FullPolicy]snapshot.FullPolicy{
	"": snapshot.FullFail, FullFail: snapshot.FullFail, FullPause: snapshot.FullPause, FullInvalidate: snapshot.FullInvalidate,
}

// Options are how a disk is served. The zero value is usable.
type Options struct {
	ReadOnly  bool              // open everything read-only; every export is
	Force     bool              // serve an origin that the kernel uses, too: mounted, or held by another device; or that is half merged
	Raw       bool              // the origin is a raw disk, whatever signatures are in it
	Format    string            // of the origin, by the labels of its stores (cowfile.FormatOf); empty: it is found out
	Open      cowfile.Opener    // of the origin; nil: cowfile.OpenRaw
	Sync      snapshot.SyncMode // when a write to a snapshot is durable
	OnFull    FullPolicy
	Grow      snapshot.Growth // how COW files become longer when they are full
	Merge     merge.Options   // of live merges
	NBD       nbd.Options     // limits of the NBD server, and TLS; Log and Logger are those below where they are nil
	Files     Files           // shows the exports as files too; the caller closes it after Serve and before Close; nil: none
	VhostUser string          // directory of sockets NAME.sock, on which virtual machines find the exports too (package vhost); "": none
	Observe   bool            // count requests, their durations and their places, for Tree and HeatMap (package activity)
	SysFS     string          // where sysfs is mounted, which says which volume groups are active; "": /sys

	// Log is called for events that no request reports, with one line. It may be called concurrently and must not
	// block.
	Log func(line string)

	// Logger, unless it is nil, receives the same events as records with attributes: disk, snapshot, operation or kind, error,
	// and those of nbd.Options.Logger.
	Logger *slog.Logger
}

// Limits of origin writes that stay in memory until exceptions are durable.
const (
	writeBackLimit = 64 << 20
	writeBackDelay = 100 * time.Millisecond
)

// flushEvery is how long a write that its client did not flush may stay in memory.
const flushEvery = 5 * time.Second

// A Server is an origin with its snapshots, each an export. Its methods may be called concurrently; those that change
// what is served exclude each other.
type Server struct {
	path      string // of the origin, or its address
	address   address.Address
	name      string         // of the origin's export
	file      cowfile.Origin // the whole disk
	origin    *snapshot.Origin
	volumes   *lvm.Origin                    // what the origin is in a volume group, or nil
	addressed string                         // the volume of it that the address names: itself or a snapshot
	half      atomic.Pointer[merge.SideFile] // of a merge into the origin that is not complete, or nil
	merged    atomic.Pointer[[]string]       // snapshots whose export shows the origin, since their live merge began
	opts      Options
	log       eventlog.Log
	nbd       *nbd.Server
	vhost     *vhost.Server // nil without Options.VhostUser

	observing sync.Mutex                  // below all others
	observed  map[string]*activity.Device // by name of the export

	mu         sync.Mutex
	addr       net.Addr    // of the NBD listener; nil before Start
	snapshots  []*attached // in the order they were attached
	fallback   *attached   // the export ""
	hadDefault bool        // there was an export ""
	merging    *liveMerge  // the merge under way, or the last one
	exported   bool        // the origin is exported
	together   bool        // the snapshots of volumes are attached
}

// attached is a snapshot with its export.
type attached struct {
	name, path string
	dev        *switchDevice
	cow        block.Device
	closeCOW   func() error
	fixed      bool               // a volume of the origin's group
	snap       *snapshot.Snapshot // not used any more once merge is set
	merge      *liveMerge
	force      bool         // api.AttachRequest.Force
	undo       func() error // takes back what was made for it; before it is served
}

// refuse returns an error with a code.
func refuse(code api.Code, format string, args ...any) error {
	return &api.Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

func noSnapshot(name string) error {
	return refuse(api.CodeNoSuchSnapshot, "no snapshot %q is served", name)
}

var errReadOnly = refuse(api.CodeReadOnly, "the server is read-only")

// firstRead is what clients read first, a superblock or a table of partitions, in bytes.
const firstRead = 4096

// Open opens the disk at path, which may be an address (package source/address), as an origin without snapshots. It is
// open for reading, and locked against writers, until ExportOrigin or StartMerge opens it for writing: many servers may
// share one base. The caller closes the server.
//
// The snapshots of a logical volume are attached by AttachVolumes, and before anything may be written to the origin.
func Open(path string, o Options) (*Server, error) {
	if _, known := fullPolicies[o.OnFull]; !known {
		return nil, fmt.Errorf("unknown policy for a full COW device: %q", o.OnFull)
	}
	if err := checkVhost(o.VhostUser); err != nil {
		return nil, err
	}
	if o.Logger != nil {
		o.Logger = o.Logger.With("disk", path)
	}
	if o.NBD.Log == nil {
		o.NBD.Log = o.Log
	}
	if o.NBD.Logger == nil {
		o.NBD.Logger = o.Logger
	}
	log := eventlog.Log{Line: o.Log, Logger: o.Logger}
	a, err := address.Parse(path)
	if err != nil {
		return nil, err
	}
	if o.Open == nil {
		o.Open = cowfile.OpenRaw
	}
	whole, err := o.Open(a.Path, cowfile.OriginOptions{Options: block.Options{ReadOnly: true}, Raw: o.Raw, Format: o.Format})
	if err != nil {
		return nil, err
	}
	d, err := address.OpenDiskOn(a, whole, cmp.Or(o.SysFS, "/sys"))
	if err != nil {
		whole.Close()
		return nil, err
	}
	half, err := checkDisk(d, whole, o)
	if err != nil {
		whole.Close()
		return nil, err
	}
	var opts []snapshot.OriginOption
	if o.Sync == snapshot.SyncFlush {
		opts = append(opts, snapshot.WriteBack(writeBackLimit, writeBackDelay))
	}
	opts = append(opts, snapshot.WriteBackNotify(func(err error) {
		if err == nil {
			log.Event(slog.LevelInfo, "origin: "+written, written, nil)
		} else {
			log.Event(slog.LevelError, "origin: "+unwritten+": "+err.Error(), unwritten, err)
		}
	}))
	s := &Server{path: text.WithoutSecrets(path), name: OriginName, address: d.Address, file: whole, origin: snapshot.NewOrigin(originDevice(d.Dev), opts...), volumes: d.Volume,
		opts: o, log: log, nbd: nbd.NewServer(o.NBD), vhost: newVhost(o)}
	if d.Volume != nil {
		s.name = d.Volume.Name
		s.addressed = cmp.Or(d.Snapshot, s.name)
	}
	s.half.Store(half)
	block.BeginRead(d.Dev, 0, min(d.Dev.Size(), firstRead)) // while stores are attached
	return s, nil
}

// checkDisk refuses a disk that can't be an origin, and returns the side file of an incomplete merge into it.
func checkDisk(d *address.Disk, whole cowfile.Origin, o Options) (*merge.SideFile, error) {
	err := cowfile.CheckSize(d.Dev)
	if err == nil && d.Volume == nil && !d.Address.Plain() { // what a guest writes to a logical volume never makes it a container
		err = cowfile.OriginOptions{Raw: o.Raw, Format: o.Format}.CheckRaw(d.Dev)
	}
	if err != nil {
		return nil, block.WithPath(d.Address.String(), err)
	}
	if !o.Force {
		if err := whole.CheckUnused(); err != nil {
			return nil, err
		}
	}
	if d.Volume != nil {
		if err := checkVolumes(d, o); err != nil {
			return nil, block.WithPath(d.Address.String(), err)
		}
	}
	if spread, ok := whole.(address.Spread); ok && !o.Force {
		for _, pv := range spread.FurtherPVs() {
			if err := merge.CheckFurther(pv.Name); err != nil {
				return nil, err
			}
		}
	}
	if _, err := os.Lstat(d.Address.Path); err != nil { // it is no file
		return nil, nil
	}
	half, err := merge.ReadSideFile(d.Address.Path)
	if o.Force && errors.Is(err, merge.ErrUnfinished) {
		err = nil
	}
	return half, err
}

// originDevice is the device of an origin. Tests put a failing one over it.
var originDevice = func(d block.Device) block.Device { return d }

// What is logged when acknowledged writes to the origin can't be written, and when they are again.
const (
	unwritten = "acknowledged writes can't be written and stay in memory; flushes fail until they are"
	written   = "all acknowledged writes are written again"
)

// Device returns the device behind a snapshot's export, which continues as the origin when the snapshot is merged.
func (s *Server) Device(name string) (block.Device, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.find(name)
	if v == nil {
		return nil, noSnapshot(name)
	}
	return v.dev, nil
}

// ExportAlone exports the origin as ExportOrigin does, and as the export "": for a server without snapshots. An origin into which a merge is not
// complete is refused (merge.ErrUnfinished): what is served would be a mixture.
func (s *Server) ExportAlone() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if half := s.half.Load(); half != nil && !s.opts.Force {
		return half.Refuse()
	}
	err := s.exportOrigin()
	if err == nil && !s.hadDefault {
		s.hadDefault = true
		s.nbd.SetDefault(s.name)
	}
	return err
}

func nameTaken(name string) error {
	return refuse(api.CodeNameTaken, "the name %q is taken", name)
}

// find returns the snapshot of a name, or nil. mu is held.
func (s *Server) find(name string) *attached {
	i := slices.IndexFunc(s.snapshots, func(v *attached) bool { return v.name == name })
	if i < 0 {
		return nil
	}
	return s.snapshots[i]
}

// Drop detaches a snapshot while clients use the server: its export ends, what was written to it is made durable, its
// file is closed. A snapshot that is being merged is refused. When ctx ends, requests to the export that are under way
// are waited for no longer than their device needs.
func (s *Server) Drop(ctx context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.find(name)
	if v == nil {
		return noSnapshot(name)
	}
	if err := v.refuseFixed(); err != nil {
		return err
	}
	if v.merge != nil && !v.merge.done() {
		return refuse(api.CodeMerging, "snapshot %q is being merged", name)
	}
	if v == s.fallback {
		s.nbd.SetDefault("")
		s.fallback = nil
	}
	if err := s.removeExport(ctx, name); err != nil {
		// Closing waits for the requests that are left.
		s.log.Event(slog.LevelWarn, err.Error(), "requests are under way", err, slog.String("snapshot", name))
	}
	s.snapshots = slices.DeleteFunc(s.snapshots, func(o *attached) bool { return o == v })
	return v.close()
}

// Grow makes the COW device of a snapshot size bytes long, and makes writes that wait for space try again.
func (s *Server) Grow(name string, size int64) (api.Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.find(name)
	switch {
	case v == nil:
		return api.Snapshot{}, noSnapshot(name)
	case s.opts.ReadOnly:
		return api.Snapshot{}, errReadOnly
	case v.fixed:
		return api.Snapshot{}, v.refuseFixed()
	case size < v.cow.Size():
		return api.Snapshot{}, refuse(api.CodeBadRequest, "size: %s has %d bytes already, and can't be made shorter", v.path, v.cow.Size())
	}
	if err := block.Grow(v.cow, size); err != nil {
		return api.Snapshot{}, block.WithPath(v.path, err)
	}
	s.origin.RetryPaused()
	return s.statusOf(v), nil
}

// close ends a snapshot that is not exported any more.
func (v *attached) close() error {
	return block.WithPath(v.path, errors.Join(v.snap.Close(), v.closeCOW()))
}
