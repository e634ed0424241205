package server

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/nbd"
)

// Origin returns the origin as a device: writes to it are preserved in every snapshot first. They are refused with
// block.ErrReadOnly until the origin is exported or a merge has begun.
func (s *Server) Origin() block.Device { return s.origin }

// OriginFormat returns the format that the origin's file was opened in.
func (s *Server) OriginFormat() string { return s.file.Format() }

// ExportOrigin exports the origin itself, as [OriginName] or under the name of the logical volume that it is; read-only where it
// can only be read.
func (s *Server) ExportOrigin() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exportOrigin()
}

// exportOrigin exports the origin, once. mu is held.
func (s *Server) exportOrigin() error {
	if s.exported && s.volumes != nil {
		return nil
	}
	if s.find(s.name) != nil {
		return nameTaken(s.name)
	}
	// An origin that is only read is exported so.
	if err := s.allowOriginWrites(); err != nil && !errors.Is(err, cowfile.ErrOnlyRead) {
		return err
	}
	err := s.addExport(nbd.Export{Name: s.name, Description: description("origin", s.path), Device: s.origin,
		ReadOnly: s.file.ReadOnly() || s.originReadOnly(), MultiConn: true})
	s.exported = s.exported || err == nil
	if half := s.half.Load(); half != nil && err == nil && (s.merging == nil || s.merging.done()) {
		s.log.Event(slog.LevelWarn, fmt.Sprintf("%s: until the merge of %s is started and the origin shows its content, this export shows a mixture", s.name, half.COW()),
			"the origin is a mixture", merge.ErrMixture, slog.String("cow", half.COW()))
	}
	return err
}

// originReadOnly reports whether the origin can't be written.
func (s *Server) originReadOnly() bool {
	return s.opts.ReadOnly || s.volumes != nil && !s.volumes.Dev.Writable()
}

// allowOriginWrites opens the origin for writing, unless the server is read-only. It fails while others use the origin.
// mu is held.
func (s *Server) allowOriginWrites() error {
	if s.originReadOnly() || !s.file.ReadOnly() {
		return nil
	}
	if s.volumes != nil && !s.together {
		return s.attachVolumes()
	}
	return s.allowFileWrites()
}

// allowFileWrites opens the file for writing. mu is held.
func (s *Server) allowFileWrites() error {
	err := s.file.AllowWrites()
	if err == nil && !s.opts.Force {
		if err = s.file.CheckUnused(); err != nil {
			err = errors.Join(err, s.file.DenyWrites())
		}
	}
	return block.WithPath(s.address.Path, err)
}
