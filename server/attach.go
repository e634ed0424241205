package server

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"unicode/utf8"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/image"
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
		err = block.WithPath(a.path, cowfile.CheckFormat(s.file, cow))
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
			undo = func() error { return os.Remove(a.path) }
		}
		return undo, err
	}
	c, err := cowfile.CreateFor(s.origin, a.path, cowfile.Options{ChunkSectors: a.chunkSectors, Overwrite: a.force, Format: s.file.Format()})
	if err == nil {
		undo = c.Undo
	}
	return undo, err
}
