package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/address"
	"github.com/dmsnap/dmsnap/source/lvm"
)

// A PendingMergeError reports a logical volume into which LVM was asked to merge a snapshot, or has begun to: it is served when
// that merge is complete.
type PendingMergeError struct {
	Snapshot string // its address
	Origin   string // name of the volume
}

func (e *PendingMergeError) Error() string {
	return fmt.Sprintf("LVM was asked to merge %s into %q, or has begun to, and that is to be completed before %q is served", e.Snapshot, e.Origin, e.Origin)
}

// checkVolumes refuses an origin whose snapshots can't be served beside it.
func checkVolumes(d *address.Disk, o Options) error {
	for _, v := range d.Volume.Snapshots {
		switch {
		case v.Merging:
			return &PendingMergeError{Snapshot: d.Address.Beside(v.Name, "").String(), Origin: d.Volume.Name}
		case o.ReadOnly:
		case v.Err != nil:
			return fmt.Errorf("only a read-only server can serve it: nothing could be preserved in snapshot %q: %w", v.Name, v.Err)
		case !v.COW.Writable():
			return fmt.Errorf("only a read-only server can serve it: the COW volume of snapshot %q can't be written", v.Name)
		}
	}
	return nil
}

// HasVolumes reports whether the origin is a logical volume with snapshots, which AttachVolumes attaches.
func (s *Server) HasVolumes() bool { return s.volumes != nil && len(s.volumes.Snapshots) > 0 }

// AttachVolumes attaches every snapshot of the logical volume that is the origin, under its name, and exports the origin under
// its own: all of them or none. The volume that the address names becomes the export "" too. With a read-only server
// snapshots that can't be read are left out, with a line in the log. For other origins it does nothing.
//
// The snapshots can't be dropped or grown: the group has them. Whatever is written to the origin is preserved in all of them.
func (s *Server) AttachVolumes() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.HasVolumes() {
		return nil
	}
	if err := s.attachVolumes(); err != nil {
		return err
	}
	if s.volumes.Visible {
		if err := s.exportOrigin(); err != nil {
			return err
		}
	}
	if !s.hadDefault && (s.find(s.addressed) != nil || s.addressed == s.name && s.exported) {
		s.hadDefault = true
		s.nbd.SetDefault(s.addressed)
	}
	return nil
}

// attachVolumes attaches the snapshots of the group, once. mu is held.
func (s *Server) attachVolumes() (err error) {
	if s.together {
		return nil
	}
	if half := s.half.Load(); half != nil && !s.opts.Force {
		return half.Refuse()
	}
	if !s.opts.ReadOnly {
		if err := s.allowFileWrites(); err != nil {
			return err
		}
	}
	before := len(s.snapshots)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.detach(before), s.file.DenyWrites())
		}
	}()
	for _, unused := range []bool{false, true} { // those that are changed come last
		for _, v := range s.volumes.Snapshots {
			if v.Unused != unused {
				continue
			}
			if err := s.attachVolume(v); err != nil {
				return err
			}
		}
	}
	s.together = true
	return nil
}

// attachVolume attaches a snapshot of the group. mu is held.
func (s *Server) attachVolume(v lvm.Snapshot) error {
	if v.Err != nil { // the server is read-only
		s.log.Event(slog.LevelWarn, fmt.Sprintf("%s: not served: %v", v.Name, v.Err), "not served", v.Err, slog.String("snapshot", v.Name))
		return nil
	}
	if s.find(v.Name) != nil || v.Name == s.name {
		return nameTaken(v.Name)
	}
	a := attachment{name: v.Name, path: s.address.Beside(v.Name, lvm.COW).String(), force: s.opts.Force, store: snapshot.Persistent,
		size: v.Size, readOnly: v.ReadOnly, fixed: true}
	cow := block.Device(v.COW)
	if v.Unused { // the kernel makes the store when it activates the snapshot
		a.chunkSectors, a.chunkSet = v.Chunk, true
		if s.opts.ReadOnly {
			cow = block.NewMemory(2 * int64(v.Chunk) * ondisk.SectorSize)
		}
	}
	att, err := s.attachDevice(a, cow)
	if err != nil {
		return block.WithPath(a.path, err)
	}
	att.closeCOW, att.undo = noError, noError
	s.snapshots = append(s.snapshots, att)
	return nil
}

func noError() error { return nil }

// detach detaches all snapshots but the first n; none is in use yet. mu is held.
func (s *Server) detach(n int) error {
	var errs []error
	for _, v := range slices.Backward(s.snapshots[n:]) {
		errs = append(errs, s.removeExport(context.Background(), v.name), v.close(), v.undo())
	}
	s.snapshots = s.snapshots[:n]
	return errors.Join(errs...)
}

// refuseFixed refuses to change a snapshot of the group. mu is held.
func (v *attached) refuseFixed() error {
	if !v.fixed {
		return nil
	}
	return refuse(api.CodeFixed, "snapshot %q is a volume of the origin's group: it is served as long as the origin, and its COW volume has a fixed size", v.name)
}
