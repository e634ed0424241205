package server

import (
	"context"
	"errors"

	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/vhost"
)

// addExport serves a device over NBD and, with Options.VhostUser, as a vhost-user back-end.
func (s *Server) addExport(e nbd.Export) error {
	if err := s.nbd.Add(e); err != nil || s.vhost == nil {
		return err
	}
	err := s.vhost.Add(vhost.Export{Name: e.Name, Device: e.Device, ReadOnly: e.ReadOnly, CanTrim: e.CanTrim,
		Durable: s.opts.Sync == snapshot.SyncAlways && e.Name != s.name})
	if err != nil {
		err = errors.Join(err, s.nbd.Remove(context.Background(), e.Name))
	}
	return err
}

// removeExport ends what addExport began. When ctx ends, requests under way are waited for no longer than their device needs.
func (s *Server) removeExport(ctx context.Context, name string) error {
	err := s.nbd.Remove(ctx, name)
	if s.vhost != nil {
		err = errors.Join(err, s.vhost.Remove(ctx, name))
	}
	return err
}

// vhostSocket returns the vhost-user socket of an export, "" without one.
func (s *Server) vhostSocket(name string) string {
	if s.vhost == nil {
		return ""
	}
	return s.vhost.Path(name)
}

// closeVhost ends what vhost serves when Start was never called.
func (s *Server) closeVhost() (err error) {
	if s.vhost == nil {
		return nil
	}
	for _, name := range s.vhost.Names() {
		err = errors.Join(err, s.vhost.Remove(context.Background(), name))
	}
	return err
}

func newVhost(o Options) *vhost.Server {
	if o.VhostUser == "" {
		return nil
	}
	return vhost.NewServer(o.VhostUser, vhost.Options{Log: o.Log, Logger: o.Logger})
}
