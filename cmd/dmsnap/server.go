package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
)

// originName is the export of the origin.
const originName = "origin"

// A server is an origin with its snapshots, exported over NBD. Its methods may be called
// concurrently; those that change what is served exclude each other.
type server struct {
	path     string // of the origin
	file     *block.File
	origin   *snapshot.Origin
	readOnly bool
	opts     snapshot.Options // of every snapshot, but for its own store and chunk size
	nbd      *nbd.Server
	uri      func(name string) string // of an export; set before anything is served
	log      func(line string)        // must not block

	onFullSet bool // --on-full was given
	drive     func(*snapshot.Merging) *merge.Driver

	mu        sync.Mutex
	snapshots []*served   // in the order they were attached
	fallback  *served     // what a client gets that asks for the export ""
	merging   *liveMerged // the merge under way, or the last one
	exported  bool        // the origin is exported
}

// A served is a snapshot with its export.
type served struct {
	name, path string
	dev        *switchable
	cow        *block.File
	snap       *snapshot.Snapshot // not of use any more once merge is set
	merge      *liveMerged
}

// A liveMerged is a live merge, from its beginning on.
type liveMerged struct {
	name    string
	merging *snapshot.Merging
	driver  *merge.Driver
}

// attachment is what is asked of a new snapshot.
type attachment struct {
	name, cow string
	create    bool
	force     bool // overwrite what the COW device holds; serve a disk that is shorter than the store's exceptions
	chunkSize sizeFlag
	store     snapshot.StoreType
}

// A refusal is an error with the code by which the control API tells what kind it is.
type refusal struct {
	status int // HTTP
	code   string
	err    error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

func refuse(status int, code, format string, args ...any) error {
	return &refusal{status, code, fmt.Errorf(format, args...)}
}

// The refusals of a server.
func noSnapshot(name string) error {
	return refuse(http.StatusNotFound, "no_such_snapshot", "no snapshot %q is served", name)
}

var errReadOnlyServer = refuse(http.StatusForbidden, "read_only", "the server is read-only")

// What writes to the origin may wait in memory for exceptions to become durable.
const (
	heldBytes = 64 << 20
	heldFor   = 100 * time.Millisecond
)

// newServer opens the origin.
func newServer(path string, readOnly, raw bool, opts snapshot.Options, limits nbd.Options) (*server, error) {
	f, err := openOrigin(path, block.Options{ReadOnly: readOnly}, raw)
	if err != nil {
		return nil, err
	}
	origin := snapshot.NewOrigin(f)
	if opts.Sync == snapshot.SyncFlush {
		origin.HoldWrites(heldBytes, heldFor)
	}
	return &server{path: path, file: f, origin: origin, readOnly: readOnly, opts: opts,
		nbd: nbd.NewServer(limits), log: limits.Log,
		drive: func(m *snapshot.Merging) *merge.Driver { return merge.Start(m, merge.Options{}) }}, nil
}

// exportOrigin serves the origin itself.
func (s *server) exportOrigin() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exported = true
	return s.nbd.Add(nbd.Export{Name: originName, Description: "origin " + s.path, Device: s.origin,
		ReadOnly: s.readOnly, MultiConn: true})
}

// attach opens or makes a COW device, attaches it to the origin and exports it. Clients go on
// meanwhile; every origin write that begins after attach returned is preserved for it.
func (s *server) attach(a attachment) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains([]string{"", ".", "..", "/"}, a.name) { // they have no address in the control API
		return refuse(http.StatusBadRequest, "bad_name", "%q can't be the name of a snapshot", a.name)
	}
	if s.find(a.name) != nil || a.name == originName && s.exported {
		return refuse(http.StatusConflict, "name_taken", "the name %q is taken", a.name)
	}
	if s.merging != nil && !s.merging.done() {
		// What is not merged yet is not on the origin's disk: a snapshot of it would be a mixture.
		return refuse(http.StatusConflict, "merging", "snapshot %q is being merged: attach %q when that is complete", s.merging.name, a.name)
	}
	cow, isNew, err := s.openCOW(a)
	if err != nil {
		return err
	}
	v, err := s.attachDevice(a, cow)
	if err != nil {
		err = errors.Join(about(a.cow, err), cow.Close())
		if isNew {
			err = errors.Join(err, os.Remove(a.cow))
		}
		return err
	}
	s.snapshots = append(s.snapshots, v)
	return nil
}

// openCOW opens the COW device of an attachment, with a store for it unless it is a transient one.
func (s *server) openCOW(a attachment) (cow *block.File, isNew bool, err error) {
	if s.readOnly && (a.create || a.store == snapshot.Transient) {
		return nil, false, errReadOnlyServer
	}
	if err := checkDifferent(s.path, a.cow); err != nil {
		return nil, false, err
	}
	if a.create {
		if isNew, err = s.createCOW(a); err != nil {
			return nil, false, err
		}
	}
	if cow, err = openDevice(a.cow, block.Options{ReadOnly: s.readOnly}); err != nil {
		return nil, false, err
	}
	if a.store == snapshot.Transient {
		if !a.force {
			err = checkVacant(cow)
		}
		if err != nil {
			cow.Close()
			return nil, false, fmt.Errorf("%s: a snapshot of store N would overwrite it: %w", a.cow, err)
		}
		return cow, isNew, nil
	}
	if err := checkStore(a.cow, cow); err != nil {
		cow.Close()
		return nil, false, err
	}
	return cow, isNew, nil
}

// createCOW makes the COW device, or the store on it, where there is none yet.
func (s *server) createCOW(a attachment) (isNew bool, err error) {
	_, err = os.Stat(a.cow)
	isNew = errors.Is(err, os.ErrNotExist)
	o := creation{chunkSize: a.chunkSize, store: storeFlag{a.store}, force: a.force, raw: true} // the origin was accepted before
	if a.store == snapshot.Transient {
		if !isNew {
			return false, err
		}
		return true, s.createScratch(a)
	}
	if !isNew {
		f, err := openDevice(a.cow, block.Options{ReadOnly: true, Lock: block.LockShared})
		if err != nil {
			return false, err
		}
		defer f.Close()
		if c, err := image.Probe(f); err != nil || c.Kind == image.Store {
			return false, about(a.cow, err)
		}
	}
	_, err = o.create(s.path, a.cow)
	return isNew && err == nil, err
}

// createScratch makes a COW file that holds every chunk of the origin and nothing else.
func (s *server) createScratch(a attachment) error {
	sectors, err := a.chunkSize.chunkSectors()
	if err != nil {
		return err
	}
	l := ondisk.Layout{ChunkSectors: sectors}
	f, err := block.Create(a.cow, int64(l.Chunks(s.file.Size(), true))*l.ChunkBytes())
	if err != nil {
		return about(a.cow, err)
	}
	return f.Close()
}

// attachDevice makes the snapshot on an open COW device and exports it.
func (s *server) attachDevice(a attachment, cow *block.File) (*served, error) {
	opts := s.opts
	opts.Store = a.store
	if a.store == snapshot.PersistentOverflow && !s.onFullSet {
		opts.OnFull = snapshot.FullInvalidate // whoever asks for PO wants the kernel's overflow
	}
	opts.Features.DiscardZeroesCOW = true // a client that trims a chunk expects its space back
	opts.Notify = func(e snapshot.Event) { s.log(a.name + ": " + eventText(e)) }
	if a.store == snapshot.Transient || a.chunkSize.set {
		sectors, err := a.chunkSize.chunkSectors()
		if err != nil {
			return nil, err
		}
		opts.ChunkSectors = sectors
	}
	snap, err := s.origin.Load(cow, opts)
	if err != nil {
		return nil, err
	}
	if err := snap.CheckOrigin(); err != nil && !a.force {
		return nil, errors.Join(fmt.Errorf("%w: another disk, or one that was cut; --force serves it all the same", err), snap.Close())
	}
	if err := snap.Resume(); err != nil {
		return nil, errors.Join(err, snap.Close())
	}
	releaseLoaded(snap)
	v := &served{name: a.name, path: a.cow, dev: newSwitchable(snap), cow: cow, snap: snap}
	if err := s.nbd.Add(nbd.Export{Name: a.name, Description: "snapshot " + a.cow, Device: v.dev,
		ReadOnly: s.readOnly, CanTrim: true, MultiConn: true,
		PreferredBlock: preferredBlock(snap),
		Contexts:       map[string]nbd.ContextFunc{"dmsnap:changed": v.dev.Changed},
	}); err != nil {
		return nil, errors.Join(err, snap.Close())
	}
	return v, nil
}

// eventText is a line of the log: the kernel's words, with the cause where they don't say it.
func eventText(e snapshot.Event) string {
	if e.Err != nil && (e.Kind == snapshot.EventInvalid || e.Kind == snapshot.EventFull) {
		return e.Text + " Cause: " + strings.ReplaceAll(e.Err.Error(), "\n", "; ")
	}
	return e.Text
}

// muchLoaded is from how many exceptions on the loading of a store is cleaned up after: tens of MB.
const muchLoaded = 1 << 20

// releaseLoaded gives the memory back that only the loading of a large store needed. An idle server would
// keep it for minutes, and is looked at for what it takes.
func releaseLoaded(snap *snapshot.Snapshot) {
	if snap.Status().Exceptions >= muchLoaded {
		runtime.GC() // buffers kept in pools outlive one collection
		debug.FreeOSMemory()
	}
}

// preferredBlock is the chunk size, as far as it is sensible as the size of a request: writes of
// whole chunks spare a read of the origin.
func preferredBlock(snap *snapshot.Snapshot) uint32 {
	return max(4096, min(snap.Status().ChunkSectors*ondisk.SectorSize, 64<<10))
}

// find returns the snapshot of a name, or nil. mu is held.
func (s *server) find(name string) *served {
	i := slices.IndexFunc(s.snapshots, func(v *served) bool { return v.name == name })
	if i < 0 {
		return nil
	}
	return s.snapshots[i]
}

// setDefault makes the first snapshot the export "". It stays so until it is dropped: the name never
// goes over to another disk.
func (s *server) setDefault() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fallback = s.snapshots[0]
	s.nbd.SetDefault(s.fallback.name)
}

// drop detaches a snapshot while clients use the server: its export ends, what was written to it is
// made durable, its file is closed. A snapshot that is being merged is refused.
func (s *server) drop(ctx context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.find(name)
	if v == nil {
		return noSnapshot(name)
	}
	if v.merge != nil && !v.merge.done() {
		return refuse(http.StatusConflict, "merging", "snapshot %q is being merged", name)
	}
	if v == s.fallback {
		s.nbd.SetDefault("")
		s.fallback = nil
	}
	var closing error
	if s.origin.Paused() > 0 {
		// Writes that wait for room in it would hold up Remove; those to the origin go on without it.
		closing = v.snap.Close()
		s.origin.RetryPaused()
	}
	if err := s.nbd.Remove(ctx, name); err != nil {
		s.log(err.Error()) // closing waits for the requests that are left
	}
	s.snapshots = slices.DeleteFunc(s.snapshots, func(o *served) bool { return o == v })
	return errors.Join(about(v.path, closing), v.close())
}

// grow makes the COW device of a snapshot longer, and lets writes that wait for room go on.
func (s *server) grow(name string, size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.find(name)
	switch {
	case v == nil:
		return noSnapshot(name)
	case s.readOnly:
		return errReadOnlyServer
	case size < v.cow.Size():
		return refuse(http.StatusBadRequest, "bad_request", "size: %s has %d bytes already, and can't be made shorter", v.path, v.cow.Size())
	}
	if err := v.cow.Grow(size); err != nil {
		return about(v.path, err)
	}
	s.origin.RetryPaused()
	return nil
}

// close ends a snapshot that is not exported any more.
func (v *served) close() error {
	return about(v.path, errors.Join(v.snap.Close(), v.cow.Close()))
}

// flushLoop makes durable, now and then, what clients wrote to snapshots and did not flush.
func (s *server) flushLoop(ctx context.Context, every time.Duration) {
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

func (s *server) flushDirty() {
	s.mu.Lock()
	list := slices.Clone(s.snapshots)
	s.mu.Unlock()
	for _, v := range list {
		// The race considered: v may be dropped just now; its Close has made everything durable.
		if err := v.dev.flushDirty(); err != nil && !errors.Is(err, os.ErrClosed) {
			s.log(fmt.Sprintf("%s: flush: %v", v.name, err))
		}
	}
}

// close ends everything, after nbd has stopped serving.
func (s *server) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	if m := s.merging; m != nil {
		m.driver.Stop()
		errs = append(errs, m.merging.Close())
	}
	for _, v := range s.snapshots {
		failed := v.snap.Failure() // before it is closed, and whether or not the mark can be made then
		errs = append(errs, about(v.path, failed), v.close())
	}
	if !s.readOnly {
		errs = append(errs, s.origin.Flush())
	}
	return errors.Join(append(errs, s.file.Close())...)
}
