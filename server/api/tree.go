package api

import "time"

// This file has the types of a fleet: disks, the checkpoints and nodes over them, and the requests that change them
// (docs/fleet.md).
//
// Names of disks, nodes and checkpoints match [A-Za-z0-9._-]{1,64} and are unique together. A checkpoint is shown, and
// given in requests, as NODE@NAME, where NODE is the node that it was made of. Checkpoints without a name are shown as
// NODE@~ID; they are removed with their last child.

// Kind is what an element of the tree is.
type Kind string

// The kinds of elements.
const (
	KindDisk       Kind = "disk"       // a base, whatever its address
	KindCheckpoint Kind = "checkpoint" // a sealed layer: never written again
	KindNode       Kind = "node"       // a writable layer on top of others, and an export
)

// ElementState is the state of an element of the tree.
type ElementState string

// The states of elements.
const (
	ElementOK     ElementState = "ok"
	ElementFailed ElementState = "failed" // Error has the reason: its disk, or a layer below, can't be read; or its own store failed
)

// ServerKind says which requests a server takes besides GET /v1/tree.
type ServerKind string

// The kinds of servers.
const (
	ServerOfOne   ServerKind = "origin" // one origin with snapshots: those of docs/api.md
	ServerOfFleet ServerKind = "fleet"  // those of docs/fleet.md
)

// Tree is the reply to GET /v1/tree.
type Tree struct {
	Server   ServerKind `json:"server,omitempty"`
	Elements []Element  `json:"elements"` // parents before children
	// Error is why the tree accepts no changes: its state could not be recorded. What is exported is served still.
	Error string `json:"error,omitempty"`
}

// Element is a disk, a checkpoint or a node.
type Element struct {
	Name      string       `json:"name"`
	Kind      Kind         `json:"kind"`
	Parent    string       `json:"parent,omitempty"` // the name of a checkpoint or disk; "" for a disk
	Disk      string       `json:"disk"`             // the disk at the root; of a disk its own name
	SizeBytes int64        `json:"size_bytes"`
	State     ElementState `json:"state"`
	Error     string       `json:"error,omitempty"` // why the state is not ok
	URI       string       `json:"uri,omitempty"`   // of the export of a node, or of a writable disk

	Unnamed  bool      `json:"unnamed,omitempty"`  // a checkpoint without a name
	Sealed   bool      `json:"sealed,omitempty"`   // a checkpoint: its file is never written again
	Children int       `json:"children,omitempty"` // checkpoints and nodes directly on it
	File     string    `json:"file,omitempty"`     // of its layer; of a disk its source
	Created  time.Time `json:"created,omitzero"`
	Durable  bool      `json:"durable,omitempty"` // it survives a power failure; of a node with every flush

	// Connections is how many clients are connected to its export.
	Connections int64 `json:"connections,omitempty"`
	// AllocatedBytes are what the file of its layer uses on its file system.
	AllocatedBytes int64 `json:"allocated_bytes,omitempty"`
	// Depth is the number of layers below it.
	Depth int `json:"depth,omitempty"`

	Figures  *Figures  `json:"figures,omitempty"`  // of its layer; disks have none
	Counters *Counters `json:"counters,omitempty"` // of a node
	Activity *Activity `json:"activity,omitempty"` // of its export, where that is observed

	// Merge is the merge into a disk, under way or the last one since the start.
	Merge *TreeMerge `json:"merge,omitempty"`
}

// Activity is what clients did to an export since it is served, whatever way they took.
type Activity struct {
	Reads        Latency `json:"reads"`
	Writes       Latency `json:"writes"` // and zeroing and discards
	Flushes      Latency `json:"flushes"`
	ReadBytes    uint64  `json:"read_bytes"`
	WrittenBytes uint64  `json:"written_bytes"`
	Errors       uint64  `json:"errors"` // requests that failed
}

// HeatMap is the reply to GET /v1/heat/{name}: equal parts of a disk, in order.
type HeatMap struct {
	Name      string    `json:"name"`
	SizeBytes int64     `json:"size_bytes"`
	Stored    []float64 `json:"stored"`           // fraction of each part that is in the element's own layer, 0 to 1
	Writes    []uint32  `json:"writes,omitempty"` // requests that changed something in each part, modulo 2^32; without observation: none
}

// Disk is a base of nodes: the reply to GET /v1/disks/{name}.
type Disk struct {
	Name      string            `json:"name"`
	Source    string            `json:"source"` // its address
	Format    string            `json:"format"`
	Raw       bool              `json:"raw,omitempty"` // its bytes are the disk, whatever they look like
	SizeBytes int64             `json:"size_bytes"`
	Writable  bool              `json:"writable,omitempty"` // it is exported, and nodes keep what it had
	URI       string            `json:"uri,omitempty"`
	Children  int               `json:"children"` // checkpoints and nodes directly on it
	State     ElementState      `json:"state"`
	Error     string            `json:"error,omitempty"` // why the state is not ok
	Created   time.Time         `json:"created,omitzero"`
	Merge     *TreeMerge        `json:"merge,omitempty"` // into it, under way or the last one since the start
	Policy    map[string]string `json:"policy,omitempty"`
	// PreserveBytes are what the files of its preserve layers use: what nodes show of it that was overwritten since.
	PreserveBytes int64 `json:"preserve_bytes,omitempty"`
}

// Disks is the reply to GET /v1/disks.
type Disks struct {
	Disks []Disk `json:"disks"`
}

// TreeMerge is the merge of a node into its disk.
type TreeMerge struct {
	Node        string     `json:"node"`
	Disk        string     `json:"disk"`
	State       MergeState `json:"state"` // running, failed, done or stopped
	CopiedBytes int64      `json:"copied_bytes"`
	TotalBytes  int64      `json:"total_bytes"`
	Error       string     `json:"error,omitempty"`
}

// AddDiskRequest is the body of POST /v1/disks.
type AddDiskRequest struct {
	Name     string `json:"name"`
	Source   string `json:"source"`             // its address
	Format   string `json:"format,omitempty"`   // "": it is found out
	Raw      bool   `json:"raw,omitempty"`      // its bytes are the disk, whatever they look like
	Writable bool   `json:"writable,omitempty"` // export the disk itself; nodes keep what it had
}

// ForkRequest is the body of POST /v1/fork.
type ForkRequest struct {
	From    string `json:"from"`              // a disk, a checkpoint, or a node, whose state at this moment becomes an unnamed checkpoint
	Name    string `json:"name"`              // of the new node
	Size    int64  `json:"size,omitempty"`    // bytes, not less than those of From; 0: as From
	Durable bool   `json:"durable,omitempty"` // reply when it survives a power failure
}

// CheckpointRequest is the body of POST /v1/checkpoint. All the nodes are sealed at one moment.
type CheckpointRequest struct {
	Nodes   []string `json:"nodes"`
	Name    string   `json:"name"` // the checkpoint of a node is NODE@NAME
	Durable bool     `json:"durable,omitempty"`
}

// Checkpoints is the reply to POST /v1/checkpoint, in the order of the request's nodes.
type Checkpoints struct {
	Checkpoints []Element `json:"checkpoints"`
	// PauseSeconds is how long requests to the nodes waited at most.
	PauseSeconds float64 `json:"pause_seconds"`
}

// Layers is the reply to GET /v1/layers/{name} and POST /v1/nodes/{name}/seal: what a checkpoint, or a node below its top, is made
// of. Each layer is an export that is only read, and shows the disk with this layer and those before it. It is not listed.
type Layers struct {
	Disk   string  `json:"disk"`
	Layers []Layer `json:"layers"` // bottom-up, the disk first
}

// Layer is one of Layers. In the meta context dmsnap:changed its export has what it holds itself, and in
// qemu:dirty-bitmap:NAME what it and those above the layer NAME hold.
type Layer struct {
	Name         string `json:"name"` // of the checkpoint, or of the disk
	URI          string `json:"uri"`  // of its export
	SizeBytes    int64  `json:"size_bytes"`
	ChunkSectors uint32 `json:"chunk_sectors,omitempty"`
	Exceptions   uint64 `json:"exceptions,omitempty"`
	Source       string `json:"source,omitempty"` // of the disk, when it was never written: it shows the same
}

// RollbackRequest is the body of POST /v1/nodes/{name}/rollback.
type RollbackRequest struct {
	Node       string `json:"node,omitempty"`  // the name in the path
	Checkpoint string `json:"checkpoint"`      // an ancestor of the node: NODE@NAME, or NAME of one of its own
	Force      bool   `json:"force,omitempty"` // disconnect the clients that use it
	Durable    bool   `json:"durable,omitempty"`
}

// SquashRequest is the body of POST /v1/nodes/{name}/squash.
type SquashRequest struct {
	Node string `json:"node,omitempty"` // the name in the path
}

// AdoptRequest is the body of POST /v1/adopt: an existing store becomes the layer of a new node over a disk.
type AdoptRequest struct {
	Node string `json:"node"`
	COW  string `json:"cow"` // absolute path of the store; it stays where it is
	Disk string `json:"disk"`
}

// MergeNodeRequest is the body of POST /v1/nodes/{name}/merge.
type MergeNodeRequest struct {
	Node string `json:"node,omitempty"` // the name in the path
}

// PolicyRequest is the body of PUT /v1/disks/{name}/policy. A key with an empty value is removed.
type PolicyRequest struct {
	Disk string            `json:"disk,omitempty"` // the name in the path
	Set  map[string]string `json:"set"`
}

// Table is the reply to POST /v1/nodes/{name}/table: the tables with which a kernel shows the same disk, bottom-up.
// Devices that they name and do not make are block devices of the files: Files says which.
type Table struct {
	Devices []TableDevice `json:"devices"` // those of the tables, each after those it names
	Files   []TableFile   `json:"files"`   // those that need a loop device
}

// TableDevice is a device-mapper device with its table.
type TableDevice struct {
	Name  string `json:"name"`
	Table string `json:"table"` // of one or more lines
	// ReadOnly: it is a layer that is never written.
	ReadOnly bool `json:"read_only,omitempty"`
}

// TableFile is a file for which a table has a placeholder, in the place of a block device.
type TableFile struct {
	Placeholder string `json:"placeholder"`
	File        string `json:"file"`
	ReadOnly    bool   `json:"read_only,omitempty"`
}

// EventKind is what happened to a fleet.
type EventKind string

// The kinds of events.
const (
	EventDiskAdded      EventKind = "disk_added"
	EventDiskRemoved    EventKind = "disk_removed"
	EventForked         EventKind = "forked"
	EventCheckpointed   EventKind = "checkpointed"
	EventRolledBack     EventKind = "rolled_back"
	EventSquashed       EventKind = "squashed"
	EventAdopted        EventKind = "adopted"
	EventDropped        EventKind = "dropped"
	EventMergeStarted   EventKind = "merge_started"
	EventMerged         EventKind = "merged"
	EventMergeFailed    EventKind = "merge_failed"
	EventMergeTakenBack EventKind = "merge_taken_back"
	EventPolicyChanged  EventKind = "policy_changed"
	EventSnapshot       EventKind = "snapshot"        // of the engine: a layer is full, invalid, or similar
	EventChangesRefused EventKind = "changes_refused" // the state could not be recorded
	EventMissed         EventKind = "missed"          // the subscriber was too slow: events were left out
)

// Event is something that happened to a fleet, in the order in which it happened.
type Event struct {
	Seq    uint64    `json:"seq"` // of the operation in the journal; 0 for those that change no state
	Time   time.Time `json:"time"`
	Kind   EventKind `json:"kind"`
	Name   string    `json:"name,omitempty"`   // the element
	Parent string    `json:"parent,omitempty"` // what was forked, or the checkpoint
	Disk   string    `json:"disk,omitempty"`
	Text   string    `json:"text,omitempty"` // for people
	Error  string    `json:"error,omitempty"`
}
