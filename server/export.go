package server

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/vhost"
)

// Files shows exports as files, as a server of package fuse does, which this package must not import.
type Files interface {
	Add(name string, dev block.Device, readOnly bool) error
	Remove(ctx context.Context, name string) error // as nbd.Server.Remove
	Path(name string) string
}

// addExport serves a device over NBD and, where Options say so, as a vhost-user back-end and as a file.
func (s *Server) addExport(e nbd.Export) error {
	served, observed := s.observe(e.Name, e.Device)
	e.Device = served
	file := served
	if c := s.cacher(); c != nil {
		e.Device, file = s.withCache(c, e.Name, served)
	}
	added := []func(context.Context, string) error{s.nbd.Remove}
	err := s.nbd.Add(e)
	if err == nil && s.vhost != nil {
		added = append(added, s.vhost.Remove)
		err = s.addVhost(e)
	}
	if err == nil && s.opts.Files != nil {
		added = append(added, s.opts.Files.Remove)
		err = s.opts.Files.Add(e.Name, file, e.ReadOnly)
	}
	if err != nil { // the last one has not got it
		for _, remove := range added[:len(added)-1] {
			err = errors.Join(err, remove(context.Background(), e.Name))
		}
		return err
	}
	observed()
	return nil
}

func (s *Server) addVhost(e nbd.Export) error {
	return s.vhost.Add(vhost.Export{Name: e.Name, Device: e.Device, ReadOnly: e.ReadOnly, CanTrim: e.CanTrim,
		Durable: s.opts.Sync == snapshot.SyncAlways && e.Name != s.name})
}

// removeExport ends what addExport began. When ctx ends, requests under way are waited for no longer than their device needs.
func (s *Server) removeExport(ctx context.Context, name string) error {
	defer s.forget(name)
	err := s.nbd.Remove(ctx, name)
	if s.vhost != nil {
		err = errors.Join(err, s.vhost.Remove(ctx, name))
	}
	if s.opts.Files != nil {
		err = errors.Join(err, s.opts.Files.Remove(ctx, name))
	}
	return err
}

// pathOf returns the file of an export, "" without one.
func (s *Server) pathOf(name string) string {
	if s.opts.Files == nil {
		return ""
	}
	return s.opts.Files.Path(name)
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

// checkVhost refuses what is no directory for the sockets of vhost-user.
func checkVhost(path string) error {
	if path == "" {
		return nil
	}
	info, err := os.Stat(path)
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("%s is not a folder", path)
	}
	if err != nil {
		return fmt.Errorf("vhost-user: %w", err)
	}
	return nil
}
