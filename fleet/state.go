package fleet

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/dmsnap/dmsnap/server/api"
)

// A state is the tree as it is recorded: disks, layers and nodes, with nothing of what is open. It changes by apply alone,
// which executes a line of the journal, both when the line is written and when it is read again at the next start.
//
//	disk ◄── layer ◄── layer ◄── layer ◄── node
//	         preserve  sealed    top
//
// A layer is an exception store over its parent. A node is the name of a layer that is written, its top. A checkpoint is a
// sealed layer, with a name or without. A preserve layer is beneath all others of its disk, and has what was overwritten
// on the disk since they were made.
type state struct {
	Seq    uint64 // of the last line
	Next   uint64 // id of the next layer: none is used twice
	Disks  map[string]*diskRecord
	Layers map[uint64]*layerRecord
	Nodes  map[string]*nodeRecord

	kids   map[uint64]int    // layers directly on each layer
	titles map[string]uint64 // checkpoints
}

type diskRecord struct {
	Name     string            `json:"name"`
	Source   string            `json:"source"` // address
	Format   string            `json:"format"`
	Raw      bool              `json:"raw,omitempty"`
	Size     int64             `json:"size"` // bytes
	Writable bool              `json:"writable,omitempty"`
	Created  time.Time         `json:"created"`
	Policy   map[string]string `json:"policy,omitempty"`
	// Preserve is the layer that keeps what is overwritten on the disk. 0: nothing is.
	Preserve uint64 `json:"preserve,omitempty"`
	// Merging is the node that is being merged into the disk, or "".
	Merging string `json:"merging,omitempty"`
	// MergeBase is the preserve layer that shows the disk as it was when that merge began.
	MergeBase uint64 `json:"merge_base,omitempty"`
	// Growing is the size that the file may have already, when it is being made longer. 0: it is not.
	Growing int64 `json:"growing,omitempty"`
}

type layerRecord struct {
	ID      uint64    `json:"id"`
	Parent  uint64    `json:"parent,omitempty"` // layer; 0: the disk
	Disk    string    `json:"disk"`
	Node    string    `json:"node,omitempty"` // that wrote it
	Name    string    `json:"name,omitempty"` // of the checkpoint
	Size    int64     `json:"size"`           // bytes, of what it shows
	File    string    `json:"file,omitempty"` // absolute path; "": layers/ID.cow
	Created time.Time `json:"created"`

	Sealed   bool `json:"sealed,omitempty"`
	Preserve bool `json:"preserve,omitempty"`
	// Durable: the file and the store in it are. If it is missing, that is an error.
	Durable bool `json:"durable,omitempty"`
	// Complete: it is sealed, and all that it held then is durable.
	Complete bool `json:"complete,omitempty"`
	// Exceptions is how many a sealed layer had when it was sealed.
	Exceptions uint64 `json:"exceptions,omitempty"`
}

type nodeRecord struct {
	Name    string    `json:"name"`
	Top     uint64    `json:"top"` // layer
	Created time.Time `json:"created"`
}

// A change is a line of the journal: records that are new or replaced, and those that are dropped.
type change struct {
	Seq  uint64    `json:"seq"`
	Time time.Time `json:"time"`
	Op   string    `json:"op"`

	Disks  []diskRecord  `json:"disks,omitempty"`
	Layers []layerRecord `json:"layers,omitempty"`
	Nodes  []nodeRecord  `json:"nodes,omitempty"`

	// Durable and Complete are layers of which that is known now.
	Durable  []uint64 `json:"durable,omitempty"`
	Complete []uint64 `json:"complete,omitempty"`

	DropDisks  []string `json:"drop_disks,omitempty"`
	DropLayers []uint64 `json:"drop_layers,omitempty"`
	DropNodes  []string `json:"drop_nodes,omitempty"`
}

func newState() *state {
	return &state{Next: 1, Disks: map[string]*diskRecord{}, Layers: map[uint64]*layerRecord{}, Nodes: map[string]*nodeRecord{},
		kids: map[uint64]int{}, titles: map[string]uint64{}}
}

// apply executes a line.
func (s *state) apply(c *change) {
	for _, d := range c.Disks {
		s.Disks[d.Name] = &d
	}
	for _, l := range c.Layers {
		s.drop(l.ID)
		s.Layers[l.ID] = &l
		s.Next = max(s.Next, l.ID+1)
		s.kids[l.Parent]++
		if l.isCheckpoint() {
			s.titles[l.title()] = l.ID
		}
	}
	for _, n := range c.Nodes {
		s.Nodes[n.Name] = &n
	}
	for _, id := range c.Durable {
		if l := s.Layers[id]; l != nil {
			l.Durable = true
		}
	}
	for _, id := range c.Complete {
		if l := s.Layers[id]; l != nil {
			l.Durable, l.Complete = true, l.Sealed
		}
	}
	for _, name := range c.DropNodes {
		delete(s.Nodes, name)
	}
	for _, id := range c.DropLayers {
		s.drop(id)
	}
	for _, name := range c.DropDisks {
		delete(s.Disks, name)
	}
	s.Seq = c.Seq
}

// drop removes a layer, if it exists.
func (s *state) drop(id uint64) {
	l := s.Layers[id]
	if l == nil {
		return
	}
	delete(s.Layers, id)
	if s.kids[l.Parent]--; s.kids[l.Parent] == 0 {
		delete(s.kids, l.Parent)
	}
	if title := l.title(); l.isCheckpoint() && s.titles[title] == id { // not when another one has taken the name
		delete(s.titles, title)
	}
}

// check returns an error when a record refers to one that does not exist, or layers form a circle: the state was edited
// or is damaged.
func (s *state) check() error {
	for id, l := range s.Layers {
		if s.Disks[l.Disk] == nil {
			return fmt.Errorf("layer %d is over the disk %q, which does not exist", id, l.Disk)
		}
		steps := 0
		for at := l; at.Parent != 0; steps++ {
			parent := s.Layers[at.Parent]
			switch {
			case parent == nil:
				return fmt.Errorf("layer %d has the parent %d, which does not exist", at.ID, at.Parent)
			case parent.Disk != l.Disk:
				return fmt.Errorf("layer %d is over the disk %q, and its parent %d is over %q", at.ID, l.Disk, parent.ID, parent.Disk)
			case steps > len(s.Layers):
				return fmt.Errorf("layer %d is its own ancestor", id)
			case !parent.Sealed && !parent.Preserve:
				return fmt.Errorf("layer %d has the parent %d, which is not sealed", at.ID, at.Parent)
			}
			at = parent
		}
	}
	tops := map[uint64]string{}
	for name, n := range s.Nodes {
		l := s.Layers[n.Top]
		switch {
		case l == nil:
			return fmt.Errorf("node %q has the layer %d, which does not exist", name, n.Top)
		case l.Sealed:
			return fmt.Errorf("node %q has the layer %d, which is sealed", name, n.Top)
		case tops[n.Top] != "":
			return fmt.Errorf("the nodes %q and %q have the same layer %d", name, tops[n.Top], n.Top)
		}
		tops[n.Top] = name
	}
	for name, d := range s.Disks {
		if l := s.Layers[d.Preserve]; d.Preserve != 0 && (l == nil || !l.Preserve || l.Sealed) {
			return fmt.Errorf("disk %q has the preserve layer %d, which is none", name, d.Preserve)
		}
		if l := s.Layers[d.MergeBase]; d.MergeBase != 0 && (l == nil || !l.Preserve || l.Disk != name) {
			return fmt.Errorf("disk %q was merged into over the layer %d, which is not one that preserves it", name, d.MergeBase)
		}
	}
	return nil
}

// title is the name of a checkpoint, "NODE@NAME" or "NODE@~ID".
func (l *layerRecord) title() string {
	if l.Name != "" {
		return l.Node + "@" + l.Name
	}
	return fmt.Sprintf("%s@~%d", l.Node, l.ID)
}

// isCheckpoint reports whether a layer is shown in the tree as one.
func (l *layerRecord) isCheckpoint() bool { return l.Sealed && !l.Preserve }

// checkpoint returns the checkpoint of a title, or nil.
func (s *state) checkpoint(title string) *layerRecord { return s.Layers[s.titles[title]] }

// parentTitle is the name of the checkpoint or disk on which a layer lies.
func (s *state) parentTitle(l *layerRecord) string {
	if s.onDisk(l) {
		return l.Disk
	}
	return s.Layers[l.Parent].title()
}

// onDisk reports whether a layer lies on its disk, and not on a checkpoint.
func (s *state) onDisk(l *layerRecord) bool {
	p := s.Layers[l.Parent]
	return p == nil || p.Preserve
}

// ancestors returns the layers below one, from its parent to the bottom.
func (s *state) ancestors(l *layerRecord) (list []*layerRecord) {
	for p := s.Layers[l.Parent]; p != nil; p = s.Layers[p.Parent] {
		list = append(list, p)
	}
	return list
}

// orphans returns the layers that go with one on them that is dropped: unnamed checkpoints, and sealed preserve layers,
// whose last child it is. parent is that of the dropped one.
func (s *state) orphans(parent uint64) []uint64 { return s.orphansBut(parent, 0) }

// orphansBut is orphans, as if another layer had a child already.
func (s *state) orphansBut(parent, kept uint64) (list []uint64) {
	for p := s.Layers[parent]; p != nil && p.ID != kept && p.Sealed && (p.Preserve || p.Name == "") && s.kids[p.ID] == 1; p = s.Layers[p.Parent] {
		list = append(list, p.ID)
	}
	return list
}

// nameChars are those of names.
const nameChars = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"

// maxName is how long a name may be.
const maxName = 64

// checkName refuses what can't be the name of a disk, node or checkpoint.
func checkName(field, name string) error {
	switch {
	case name == "" || len(name) > maxName || strings.ContainsFunc(name, func(r rune) bool { return !strings.ContainsRune(nameChars, r) }):
		return refuse(api.CodeBadName, "%s: %q is no name: names have 1 to %d characters, letters A-Z and a-z, digits, and . _ -", field, name, maxName)
	case name == "." || name == "..":
		return refuse(api.CodeBadName, "%s: %q can't be a name", field, name)
	}
	return nil
}

// taken refuses a name that a disk or node has.
func (s *state) taken(name string) error {
	if s.Disks[name] != nil || s.Nodes[name] != nil {
		return refuse(api.CodeNameTaken, "the name %q is taken", name)
	}
	return nil
}

// sorted returns the values of a map in the order of their keys.
func sorted[K cmp.Ordered, V any](m map[K]V) []V {
	list := make([]V, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		list = append(list, m[k])
	}
	return list
}

// refuse returns an error of the API.
func refuse(code api.Code, format string, args ...any) *api.Error {
	return &api.Error{Code: code, Message: fmt.Sprintf(format, args...)}
}
