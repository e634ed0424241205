package server

import (
	"cmp"

	"github.com/dmsnap/dmsnap/activity"
	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/server/figures"
)

// observe returns the device that is served as an export: dev, observed if Options say so. added is called when the
// export was added.
func (s *Server) observe(name string, dev block.Device) (served block.Device, added func()) {
	if !s.opts.Observe {
		return dev, func() {}
	}
	o := activity.Observe(dev)
	return o, func() {
		s.observing.Lock()
		defer s.observing.Unlock()
		if s.observed == nil {
			s.observed = map[string]*activity.Device{}
		}
		s.observed[name] = o
	}
}

// observedDevice returns the observed device of an export, or nil.
func (s *Server) observedDevice(name string) *activity.Device {
	s.observing.Lock()
	defer s.observing.Unlock()
	return s.observed[name]
}

// forget ends the observation of an export.
func (s *Server) forget(name string) {
	s.observing.Lock()
	defer s.observing.Unlock()
	delete(s.observed, name)
}

// Tree returns the origin as a disk and its snapshots as nodes on it, for programs that show servers of both kinds.
func (s *Server) Tree() api.Tree {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.originStatus()
	disk := api.Element{Name: s.diskName(), Kind: api.KindDisk, SizeBytes: o.SizeBytes, State: api.ElementOK, Error: o.Error,
		File: s.path, Children: len(s.snapshots)}
	disk.Disk = disk.Name
	if o.State != api.OriginOK {
		disk.State = api.ElementFailed
	}
	if s.exported {
		disk.URI = s.uri(s.name)
		disk.Connections, disk.Activity = s.connections(s.name), figures.Activity(s.observedDevice(s.name))
	}
	t := api.Tree{Server: api.ServerOfOne, Elements: []api.Element{disk}}
	for _, v := range s.snapshots {
		t.Elements = append(t.Elements, s.elementOf(v, disk.Name))
	}
	return t
}

// diskName is the name of the origin in the tree. mu is held.
func (s *Server) diskName() string {
	if s.find(s.name) != nil { // a snapshot has it
		return s.path
	}
	return s.name
}

// elementOf returns a snapshot as an element of the tree. mu is held.
func (s *Server) elementOf(v *attached, disk string) api.Element {
	st := s.statusOf(v)
	e := api.Element{Name: v.name, Kind: api.KindNode, Parent: disk, Disk: disk, SizeBytes: v.dev.Size(), State: api.ElementOK,
		Error: st.Error, URI: st.URI, File: st.COW, Connections: s.connections(v.name), Depth: 1,
		Figures: &st.Figures, Counters: &st.Counters, Activity: figures.Activity(s.observedDevice(v.name))}
	if st.Error != "" || st.State == api.StateInvalid {
		e.State, e.Error = api.ElementFailed, cmp.Or(st.Error, "the snapshot is invalid")
	}
	if v.merge != nil {
		m := v.merge.status()
		e.Merge = &api.TreeMerge{Node: v.name, Disk: disk, State: m.State, CopiedBytes: m.MergedBytes, TotalBytes: m.TotalBytes, Error: m.Error}
	}
	return e
}

func (s *Server) connections(name string) int64 {
	c, _ := s.nbd.Counters(name)
	return c.Connections
}

// HeatMap returns what of a disk is in a snapshot's COW device, and where its export was written, in at most 512 parts. Of
// the origin nothing is in a COW device.
func (s *Server) HeatMap(name string, parts int) (api.HeatMap, error) {
	s.mu.Lock()
	v, dev := s.find(name), block.Device(s.origin)
	changed := nbd.ContextFunc(figures.Nothing)
	switch {
	case v != nil:
		dev, changed = v.dev, v.dev.Changed
	case name != s.diskName():
		s.mu.Unlock()
		return api.HeatMap{}, noSnapshot(name)
	default:
		name = s.name
	}
	s.mu.Unlock()
	return figures.HeatMap(name, dev.Size(), parts, changed, s.observedDevice(name))
}
