// Package fleet keeps a tree of disks that are forked from one another while they are used: bases, checkpoints and nodes,
// each node an export of one NBD server. The tree and the layers are files in one directory.
//
//	f, err := fleet.Open("/srv/fleet", fleet.Options{})
//	_, err = f.AddDisk(ctx, api.AddDiskRequest{Name: "golden", Source: "/srv/golden.img"})
//	_, err = f.Fork(ctx, api.ForkRequest{From: "golden", Name: "vm1"})
//	_, err = f.Checkpoint(ctx, api.CheckpointRequest{Nodes: []string{"vm1"}, Name: "installed"})
//	_, err = f.Fork(ctx, api.ForkRequest{From: "vm1@installed", Name: "vm2"})
//	wait := f.Start(ctx, listener)
//	err = errors.Join(wait(), f.Close())
//
// # Layers
//
// A node writes to its top layer, an exception store in the kernel's format, over the sealed layers below it, over a disk.
// A fork of a running node and a checkpoint seal its top and give it a new one. Sealed layers are never written again; all
// nodes over them share their index (package source/stack).
//
// # Guarantees
//
//   - Clients stay connected through every operation, but a forced rollback, and a drop of their node.
//   - A checkpoint of several nodes is of one moment: no request to them is under way then.
//   - An operation that was acknowledged survives the death of the process; the loss of power too, when it was asked to be
//     durable, or a node that depends on it was flushed since. An operation is in the state as a whole or not at all.
//   - What was written to a node before a Flush survives any crash after it, whatever was forked, sealed, squashed or rolled
//     back meanwhile.
//   - When the state can't be recorded the tree accepts no changes until it is opened again; exports are served still.
//
// Errors that a client of the API can distinguish are *api.Error, with a code; their messages name fields of the API.
package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/eventlog"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
)

// Options are how a fleet is kept. The zero value is usable.
type Options struct {
	Open         cowfile.Opener    // of disks; nil: cowfile.OpenRaw
	NBD          nbd.Options       // of the server; Log and Logger are those below where they are nil
	Sync         snapshot.SyncMode // when a write to a node is durable
	ChunkSectors uint32            // of new layers; 0: 8, chunks of 4 KiB

	// Freeze is called before nodes are sealed by a checkpoint and, with thaw, always after, also when it failed: programs
	// that use the nodes can write what they hold in memory. An error of the first call refuses the checkpoint. Other
	// operations go on meanwhile; another checkpoint of the same nodes is refused.
	Freeze func(ctx context.Context, thaw bool, nodes []string) error

	// Observe counts requests to exports, their durations and their places, for Tree and HeatMap (package activity).
	Observe bool

	// Wrap returns the device that is exported for a node, or for a writable disk; nil: the one it is called with.
	Wrap func(name string, dev block.Device) block.Device

	// Log is called for events that no request reports, with one line. It may be called concurrently and must not
	// block.
	Log func(line string)
	// Logger, unless it is nil, receives the same events as records with attributes: disk, node, operation or kind, error.
	Logger *slog.Logger

	Now func() time.Time // nil: time.Now
}

// Locks, in this order, each optional:
//
//  1. Fleet.ops: one operation that changes the tree at a time. The long parts of Squash and Merge, which copy, hold it at
//     their beginning and end only; what they use is marked busy.
//  2. nodeDevice.gate, in the order of the nodes' names: held for reading by every change to a node, for writing while its
//     top is replaced. Reads and flushes don't take it: they keep the view that they began with in use (view.pin).
//  3. The lock of a ground's block.Switch: held for reading by every access to a disk, for writing while a preserve layer comes between.
//  4. Fleet.mu: the state, what is open, and appending to the journal. No I/O but that of the journal's line is done while it
//     is held.
//  5. journal.syncing; accounts.mu, which is locked below the locks of stores too.
//
// A flush holds none of the first three while it waits for a disk, so that no operation waits for it.

// A Fleet is an open tree. Its methods may be called concurrently.
type Fleet struct {
	dir  string
	opts Options
	log  eventlog.Log
	nbd  *nbd.Server
	lock *os.File

	ops chan struct{} // has space for one: a lock that a context can give up

	mu      sync.Mutex
	state   *state
	journal *journal
	broken  error // why no changes are accepted
	disks   map[string]*disk
	layers  map[uint64]*layer
	nodes   map[string]*node
	frozen  map[string]bool // nodes between the calls of Options.Freeze
	uriBase net.Addr        // of the first listener; nil before Start
	events  hub
	closed  bool
	folding bool
	// unsettled are sealed layers that are not durable as a whole.
	unsettled map[uint64]*layer

	// appended, unless it is nil, is called after each line of the journal was written, with mu held. For tests.
	appended func(*change)

	names    directory // layers/
	reaper   reaper
	accounts accounts

	background sync.WaitGroup
	life       context.Context    // of the background
	stop       context.CancelFunc // ends life
	wake       chan struct{}      // something is not durable, or to be removed
	idle       atomic.Bool        // the background waits for wake
}

// layersDir is the directory of the layers' files, in that of the fleet.
const layersDir = "layers"

// ErrLocked reports a directory that another process, or another Fleet, has open.
var ErrLocked = errors.New("another daemon uses the directory")

// Open opens the fleet in a directory, or makes one where there is none. Files of operations that a crash interrupted are
// removed. A disk or layer that can't be opened fails the nodes over it, which are in the tree with the reason, and not the
// rest.
//
// Errors: ErrLocked; those of a state that can't be read, in which case nothing is changed.
func Open(dir string, o Options) (_ *Fleet, err error) {
	if o.Open == nil {
		o.Open = cowfile.OpenRaw
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.NBD.Log == nil && o.NBD.Logger == nil {
		o.NBD.Log, o.NBD.Logger = o.Log, o.Logger
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(dir, layersDir), 0o700); err != nil {
		return nil, err
	}
	f := &Fleet{dir: dir, opts: o, log: eventlog.Log{Line: o.Log, Logger: o.Logger}, ops: make(chan struct{}, 1),
		disks: map[string]*disk{}, layers: map[uint64]*layer{}, nodes: map[string]*node{}, frozen: map[string]bool{}, unsettled: map[uint64]*layer{}, wake: make(chan struct{}, 1)}
	f.names.path = filepath.Join(dir, layersDir)
	o.NBD.Open = f.openSealed
	f.nbd = nbd.NewServer(o.NBD)
	if f.lock, err = lockDirectory(dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.closeFiles()
			f.lock.Close()
		}
	}()
	if err := f.loadState(); err != nil {
		return nil, err
	}
	f.openAll()
	f.life, f.stop = context.WithCancel(context.Background())
	f.background.Go(func() { f.settleLoop(f.life) })
	f.resumeMerges()
	f.notice()
	return f, nil
}

// acquire locks ops, unless ctx ends first or the fleet accepts no changes.
func (f *Fleet) acquire(ctx context.Context) (release func(), err error) {
	select {
	case f.ops <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		<-f.ops
		return nil, errClosed
	}
	if f.broken != nil {
		<-f.ops
		return nil, f.stateFailed()
	}
	return func() { <-f.ops }, nil
}

// begin begins an operation that copies: its context ends when the fleet is closed, which waits for end.
func (f *Fleet) begin(ctx context.Context) (_ context.Context, end func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, nil, errClosed
	}
	f.background.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	unhook := context.AfterFunc(f.life, func() { cancel(errClosed) })
	return ctx, func() {
		unhook()
		cancel(nil)
		f.background.Done()
	}, nil
}

var errClosed = refuse(api.CodeFailed, "the fleet is closed")

// stateFailed is the error of a change after the state could not be recorded. mu is held.
func (f *Fleet) stateFailed() error {
	return refuse(api.CodeStateFailed, "the state could not be recorded, and no changes are accepted until the fleet is opened again: %v", f.broken)
}

// newChange returns a line without content. mu is held, or ops: nothing else takes a number meanwhile but markDurable, and
// append sets it.
func (f *Fleet) newChange(op string) *change {
	return &change{Time: f.opts.Now().UTC().Round(0), Op: op}
}

// append records a change and executes it. mu is held. freeing: it makes space free, so that it may use the last.
func (f *Fleet) append(c *change, freeing bool) error {
	if f.broken != nil {
		return f.stateFailed()
	}
	c.Seq = f.state.Seq + 1
	broken, err := f.journal.append(c, freeing)
	if broken {
		f.breakWith(err)
		return f.stateFailed()
	}
	if block.IsNoSpace(err) {
		return refuse(api.CodeNoSpace, "%v", err)
	}
	if err != nil {
		return err
	}
	f.accounts.mu.Lock()
	f.state.apply(c)
	f.accounts.mu.Unlock()
	if f.appended != nil {
		f.appended(c)
	}
	if f.journal.size >= foldAt && !f.folding && !f.closed {
		f.folding = true
		f.background.Go(f.fold)
	}
	return nil
}

// fold replaces state.json by the state and shortens the journal.
func (f *Fleet) fold() {
	if err := f.foldNow(); err != nil {
		f.log.Event(slog.LevelWarn, fmt.Sprintf("%s: %v: %s becomes longer", f.dir, err, logFile), "state not replaced", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.folding = false
}

func (f *Fleet) foldNow() error {
	f.mu.Lock()
	text, err := f.state.encode()
	f.journal.tail = []byte{}
	f.mu.Unlock()
	if err == nil {
		err = writeState(f.dir, text) // lines are appended meanwhile
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		err = f.journal.replace()
	}
	f.journal.tail = nil
	return err
}

// loadState reads the state, replaces state.json by it, and removes files that it does not name.
func (f *Fleet) loadState() error {
	s, whole, cut, err := loadState(f.dir)
	if err != nil {
		return err
	}
	damaged := false
	if len(cut) > 0 {
		if damaged, err = f.saveCut(cut); err != nil {
			return err
		}
	}
	f.state = s
	if f.journal, err = openJournal(f.dir, int64(whole), s.Seq); err != nil {
		return err
	}
	if err := f.foldIfSpace(); err != nil {
		return err
	}
	return f.removeUnknown(damaged)
}

// foldIfSpace is foldNow, which is left for later on a full file system: the journal has everything.
func (f *Fleet) foldIfSpace() error {
	err := f.foldNow()
	if block.IsNoSpace(err) {
		f.log.Event(slog.LevelWarn, fmt.Sprintf("%s is not replaced: %v", stateFile, err), "state not replaced", err)
		return nil
	}
	return err
}

// saveCut looks at what was cut from the end of the journal. A torn line is what a crash leaves. When whole lines follow
// the damage, it is kept, and so are the files that they may name.
func (f *Fleet) saveCut(cut []byte) (damaged bool, err error) {
	for i := range cut {
		if cut[i] == '\n' && i+1 < len(cut) {
			end := i + 1
			for end < len(cut) && cut[end] != '\n' {
				end++
			}
			if end < len(cut) {
				if _, err := decodeLine(cut[i+1 : end+1]); err == nil {
					damaged = true
				}
			}
		}
	}
	if !damaged {
		return false, nil
	}
	path := filepath.Join(f.dir, logFile+".damaged")
	text := fmt.Sprintf("%s is damaged, and whole lines follow the damage: the operations from there on are lost; the lines are kept in %s, and the files of layers that are not known any more in %s",
		filepath.Join(f.dir, logFile), path, filepath.Join(f.dir, lostDir))
	f.log.Event(slog.LevelError, text, "the journal is damaged", nil)
	return true, os.WriteFile(path, cut, 0o600)
}

// lostDir is where files are moved that a damaged journal may have named.
const lostDir = "lost"

// removeUnknown removes the files in layers/ that the state does not name: those of operations that a crash interrupted.
// keep: they are moved away instead.
func (f *Fleet) removeUnknown(keep bool) error {
	entries, err := os.ReadDir(f.names.path)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, l := range f.state.Layers {
		known[layerFile(l.ID)] = true
	}
	for _, e := range entries {
		if known[e.Name()] || e.IsDir() {
			continue
		}
		path := filepath.Join(f.names.path, e.Name())
		if keep {
			lost := filepath.Join(f.dir, lostDir)
			if err = os.MkdirAll(lost, 0o700); err == nil {
				err = os.Rename(path, filepath.Join(lost, e.Name()))
			}
		} else {
			err = os.Remove(path)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Start begins to serve the exports on the listeners, which it closes in the end. wait waits until ctx has ended and
// requests under way are answered (nil), or one of the listeners failed; then nothing is served any more. Start is called
// once, before Close. URIs are those of the first listener.
func (f *Fleet) Start(ctx context.Context, l net.Listener, more ...net.Listener) (wait func() error) {
	f.mu.Lock()
	f.uriBase = l.Addr()
	f.mu.Unlock()
	until := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	var all sync.WaitGroup
	for _, l := range append([]net.Listener{l}, more...) {
		all.Go(func() { cancel(f.nbd.Serve(ctx, l)) })
	}
	all.Go(func() {
		<-ctx.Done()
		// In the end the server flushes one export after the other: most have little left then. It reports the errors.
		f.flushAll()
	})
	return func() error {
		all.Wait()
		cause := context.Cause(ctx)
		cancel(nil)
		if cause != context.Cause(until) {
			return cause
		}
		return nil
	}
}

// Close makes everything durable and closes the files. Nothing may be served any more. An error says what could not be
// made durable.
func (f *Fleet) Close() error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil
	}
	f.closed = true
	f.mu.Unlock()
	f.stop()
	f.background.Wait()
	f.ops <- struct{}{} // an operation under way ends
	defer func() { <-f.ops }()
	errs := f.flushAll()
	f.reap() // before state.json: it says then that nothing is left
	f.mu.Lock()
	broken := f.broken
	f.mu.Unlock()
	if broken == nil {
		errs = append(errs, f.foldIfSpace())
	}
	errs = append(errs, f.closeFiles(), f.lock.Close())
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events.close()
	return errors.Join(errs...)
}

// closeFiles closes what is open.
func (f *Fleet) closeFiles() error {
	var errs []error
	for _, dev := range f.devices() {
		dev.detach()
	}
	for _, d := range sorted(f.disks) {
		errs = append(errs, d.finish(), d.close())
	}
	for _, l := range sorted(f.layers) {
		errs = append(errs, l.closeFile())
	}
	if f.journal != nil {
		errs = append(errs, f.journal.f.Close())
	}
	return errors.Join(errs...)
}

// layerFile is the name of a layer's file in layers/.
func layerFile(id uint64) string { return fmt.Sprintf("%d.cow", id) }

// nextID returns the id of a new layer. ops is held.
func (f *Fleet) nextID() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := f.state.Next
	f.state.Next++
	return id
}

// A directory makes the names in it durable. Concurrent callers share a flush.
type directory struct {
	path    string
	made    atomic.Uint64 // files made so far
	mu      sync.Mutex
	durable uint64 // of those, durable ones
}

// sync makes the names of all files durable that were made before the call.
func (d *directory) sync() error {
	made := d.made.Load()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.durable >= made {
		return nil
	}
	made = d.made.Load()
	if err := block.SyncDirectory(d.path); err != nil {
		return err
	}
	d.durable = made
	return nil
}
