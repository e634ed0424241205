package server

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
)

// An attachment is an api.AttachRequest that was checked.
type attachment struct {
	name, path   string
	create       bool
	force        bool // overwrite what the COW device holds; serve a disk that is shorter than the store's exceptions
	chunkSectors uint32
	chunkSet     bool // chunkSectors was asked for
	store        snapshot.StoreType

	// Of a snapshot of the origin's volume group.
	size     int64 // bytes that it shows; 0: the origin's
	readOnly bool
	fixed    bool
}

// Attachment is the request for the snapshot that arg means, [NAME=]PATH of its COW device, with what q says otherwise. Without
// a NAME it is ExportName(PATH). The text before the first "=" is a NAME unless it has a slash.
func Attachment(arg string, q api.AttachRequest) api.AttachRequest {
	name, path, named := strings.Cut(arg, "=")
	if !named || strings.Contains(name, "/") {
		name, path = ExportName(arg), arg
	}
	q.Name, q.COW = name, path
	return q
}

// ExportName is the default name of the snapshot on a path: its last element without the extension. Names of exports are UTF-8.
func ExportName(path string) string {
	base := strings.ToValidUTF8(filepath.Base(path), "_")
	if name := strings.TrimSuffix(base, filepath.Ext(base)); name != "" {
		return name
	}
	return base
}

// readAttach checks a request.
func readAttach(q api.AttachRequest) (a attachment, err error) {
	a = attachment{name: q.Name, path: q.COW, create: q.Create, force: q.Force, chunkSectors: ondisk.DefaultChunkSectors, chunkSet: q.ChunkSize != 0}
	if len(q.COWBase64) > 0 && q.COW != "" {
		return a, refuse(api.CodeBadRequest, "cow and cow_base64: one of them")
	}
	if len(q.COWBase64) > 0 {
		a.path = string(q.COWBase64)
	}
	if a.path == "" {
		return a, refuse(api.CodeBadRequest, "cow is required")
	}
	if slices.Contains([]string{"", ".", "..", "/"}, q.Name) { // they have no address in the control API
		return a, refuse(api.CodeBadName, "%q can't be the name of a snapshot", q.Name)
	}
	if !utf8.ValidString(q.Name) {
		return a, refuse(api.CodeBadName, "%q can't be the name of a snapshot: it is not UTF-8", q.Name)
	}
	if a.store, err = readStoreType(q.Store); err != nil {
		return a, err
	}
	if a.chunkSet {
		if a.chunkSectors, err = ondisk.ChunkSectors(q.ChunkSize); err != nil {
			return a, refuse(api.CodeBadRequest, "chunk_size: %v", err)
		}
	}
	return a, nil
}

func readStoreType(s string) (snapshot.StoreType, error) {
	if s == "" {
		return snapshot.Persistent, nil
	}
	for _, t := range []snapshot.StoreType{snapshot.Persistent, snapshot.PersistentOverflow, snapshot.Transient} {
		if s == t.String() {
			return t, nil
		}
	}
	return 0, refuse(api.CodeBadRequest, "store: must be P, PO or N")
}

// needs is what has to be made for an attachment; the hardest to undo comes last.
type needs int

const (
	nothingNew needs = iota
	newFile
	newStore // on a file or device that exists
)

func (a attachment) needs() needs {
	if !a.create {
		return nothingNew
	}
	f, err := block.Open(a.path, block.Options{ReadOnly: true, Lock: block.LockNone})
	if err != nil {
		return newFile
	}
	defer f.Close()
	if c, err := image.Probe(f); a.store == snapshot.Transient || err == nil && c.Kind == image.Store {
		return nothingNew
	}
	return newStore
}

// openCOW opens the COW device of an attachment, with a store for it unless it is a transient one. undo reverts what
// was made, after the device was closed.
func (s *Server) openCOW(a attachment) (cow *block.File, undo func() error, err error) {
	undo = func() error { return nil }
	defer func() {
		if err != nil {
			err = errors.Join(err, undo())
		}
	}()
	if s.opts.ReadOnly && (a.create || a.store == snapshot.Transient) {
		return nil, undo, errReadOnly
	}
	if err := cowfile.CheckCOW(s.file, s.address.Path, a.path); err != nil {
		return nil, undo, err
	}
	if half := s.half.Load(); half != nil && !a.force && (a.needs() != nothingNew || a.store == snapshot.Transient) {
		return nil, undo, half.Refuse() // before anything is made
	}
	if a.create {
		if undo, err = s.createCOW(a); err != nil {
			return nil, undo, err
		}
	}
	if cow, err = cowfile.OpenDevice(a.path, block.Options{ReadOnly: s.opts.ReadOnly, Used: a.force}); err != nil {
		return nil, undo, err
	}
	if a.store == snapshot.Transient {
		if !a.force {
			err = image.CheckEmpty(cow)
		}
		if err != nil {
			cow.Close()
			return nil, undo, fmt.Errorf("%s: a snapshot of store N would overwrite it: %w", a.path, err)
		}
		return cow, undo, nil
	}
	if err = cowfile.CheckStore(a.path, cow); err == nil && !s.opts.Raw {
		err = block.WithPath(a.path, cowfile.CheckFormat(s.file, cow, !s.address.Plain()))
	}
	if half := s.half.Load(); err == nil && half != nil && !a.force {
		err = block.WithPath(a.path, half.Check(cow))
	}
	if err != nil {
		cow.Close()
		return nil, undo, err
	}
	return cow, undo, nil
}

// createCOW makes the COW device, or the store on it, where there is none yet.
func (s *Server) createCOW(a attachment) (undo func() error, err error) {
	undo = func() error { return nil }
	need := a.needs()
	switch {
	case need == nothingNew:
		return undo, nil
	case a.store == snapshot.Transient:
		if err = cowfile.CreateScratch(a.path, s.origin.Size(), a.chunkSectors); err == nil {
			undo = func() error { return cowfile.Remove(a.path) }
		}
		return undo, err
	}
	c, err := cowfile.CreateFor(s.origin, a.path, cowfile.Options{ChunkSectors: a.chunkSectors, Overwrite: a.force, Format: s.file.Format()})
	if err == nil {
		undo = c.Undo
	}
	return undo, err
}

// Attach opens or makes a COW device, attaches it to the origin and exports it. Clients continue meanwhile; every
// origin write that begins after Attach returned is preserved in it. The first snapshot attached is also the export "".
// After an error nothing is left, neither an export nor a file that Attach made.
func (s *Server) Attach(q api.AttachRequest) (api.Snapshot, error) {
	a, err := readAttach(q)
	if err != nil {
		return api.Snapshot{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.attach(a)
	if err != nil {
		return api.Snapshot{}, err
	}
	s.setDefault()
	return s.statusOf(v), nil
}

// AttachAll is Attach for several snapshots: all of them, in this order, or none. Files and stores are made after all
// checks.
func (s *Server) AttachAll(list []api.AttachRequest) (err error) {
	var all []attachment
	for _, q := range list {
		a, err := readAttach(q)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(all, func(b attachment) bool { return b.name == a.name }) {
			return nameTaken(a.name)
		}
		all = append(all, a)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	before := len(s.snapshots)
	byNeeds := slices.Clone(all)
	slices.SortStableFunc(byNeeds, func(a, b attachment) int { return cmp.Compare(a.needs(), b.needs()) })
	for _, a := range byNeeds {
		if _, err := s.attach(a); err != nil {
			return errors.Join(err, s.detach(before))
		}
	}
	place := func(v *attached) int {
		return slices.IndexFunc(all, func(a attachment) bool { return a.name == v.name })
	}
	slices.SortFunc(s.snapshots[before:], func(v, w *attached) int { return cmp.Compare(place(v), place(w)) })
	s.setDefault()
	return nil
}

// attach attaches one snapshot. mu is held.
func (s *Server) attach(a attachment) (*attached, error) {
	if s.find(a.name) != nil || a.name == s.name && s.exported {
		return nil, nameTaken(a.name)
	}
	if s.merging != nil && !s.merging.done() {
		// What is not merged yet is not on the origin's disk: a snapshot of it would be a mixture.
		return nil, refuse(api.CodeMerging, "snapshot %q is being merged: attach %q when that is complete", s.merging.name, a.name)
	}
	cow, undo, err := s.openCOW(a)
	if err != nil {
		return nil, err
	}
	v, err := s.attachDevice(a, cow)
	if err != nil {
		return nil, errors.Join(block.WithPath(a.path, err), cow.Close(), undo())
	}
	v.closeCOW = cow.Close
	v.undo = undo
	s.snapshots = append(s.snapshots, v)
	return v, nil
}

// setDefault makes the first snapshot the export "", unless there was one. It stays so until it is dropped: the name
// never goes over to another disk. mu is held.
func (s *Server) setDefault() {
	if !s.hadDefault && len(s.snapshots) > 0 {
		s.hadDefault, s.fallback = true, s.snapshots[0]
		s.nbd.SetDefault(s.fallback.name)
	}
}

// attachDevice makes the snapshot on an open COW device and exports it.
func (s *Server) attachDevice(a attachment, cow block.Device) (*attached, error) {
	opts := snapshot.Options{Store: a.store, Sync: s.opts.Sync, OnFull: fullPolicies[s.opts.OnFull], Grow: s.opts.Grow, Size: a.size,
		Fetched: cowfile.IsFetched(s.file)}
	if a.fixed {
		opts.Grow = snapshot.Growth{}
	}
	if a.store == snapshot.PersistentOverflow && s.opts.OnFull == "" {
		opts.OnFull = snapshot.FullInvalidate // PO asks for the kernel's overflow
	}
	opts.Features.DiscardZeroesCOW = true // a client that trims a chunk expects its space back
	opts.Notify = func(e snapshot.Event) {
		s.log.Event(eventLevel(e.Kind), a.name+": "+eventText(e), e.Text, e.Err,
			slog.String("snapshot", a.name), slog.String("kind", string(e.Kind)))
	}
	if a.store == snapshot.Transient || a.chunkSet {
		opts.ChunkSectors = a.chunkSectors
	}
	snap, err := s.origin.Load(cow, opts)
	if err != nil {
		return nil, err
	}
	if err := snap.CheckOrigin(); err != nil && !a.force {
		return nil, errors.Join(fmt.Errorf("%w: another disk, or one that was cut", err), snap.Close())
	}
	if err := snap.Resume(); err != nil {
		return nil, errors.Join(err, snap.Close())
	}
	releaseLoaded(snap)
	v := &attached{name: a.name, path: a.path, dev: newSwitchDevice(snap), cow: cow, snap: snap, fixed: a.fixed, force: a.force}
	if err := s.addExport(nbd.Export{Name: a.name, Description: description("snapshot", a.path), Device: v.dev,
		ReadOnly: s.opts.ReadOnly || a.readOnly, CanTrim: true, MultiConn: true,
		PreferredBlock: preferredBlock(snap),
		Contexts:       map[string]nbd.ContextFunc{"dmsnap:changed": v.dev.Changed},
		MoreContexts:   func() map[string]nbd.ContextFunc { return s.bitmaps(a.name) },
	}); err != nil {
		return nil, errors.Join(err, snap.Close())
	}
	return v, nil
}

// largeStore is the number of exceptions from which loading a store leaves tens of MB of garbage.
const largeStore = 1 << 20

// releaseLoaded returns memory to the system that only loading a large store needed. The runtime would keep it for
// minutes: 22.6 bytes an exception are resident instead of 12.5 (docs/benchmarks.md), 80 MB instead of 12 for 4 M
// sequential ones.
func releaseLoaded(snap *snapshot.Snapshot) {
	if snap.Status().Exceptions >= largeStore {
		runtime.GC() // buffers kept in pools outlive one collection
		debug.FreeOSMemory()
	}
}

// description describes an export to its clients, in UTF-8 and as long as NBD allows.
func description(what, path string) string {
	const longest = 4096
	text := what + " " + strings.ToValidUTF8(path, "\ufffd")
	return strings.ToValidUTF8(text[:min(len(text), longest)], "") // nor half a character at its end
}

// preferredBlock is the chunk size, as far as it is sensible as the size of a request: writes of
// whole chunks spare a read of the origin.
func preferredBlock(snap *snapshot.Snapshot) uint32 {
	return max(4096, min(snap.Status().ChunkSectors*ondisk.SectorSize, 64<<10))
}
