// Package api has the request and reply types of a dmsnap server's control API, and a client of it. The API is HTTP
// with JSON on a unix socket; docs/api.md describes it.
//
//	c := api.NewClient("/run/dmsnap.ctl")
//	status, err := c.Status(ctx)
//	vm2, err := c.Attach(ctx, api.AttachRequest{Name: "vm2", COW: "/srv/vm2.cow", Create: true})
//
// Guarantees: the JSON names are stable: fields are added, never renamed or removed. An error that the server reports is an
// [*Error] with a code. A Client may be used concurrently.
package api

// State is the state of a snapshot.
type State string

// The states of a snapshot.
const (
	StateOK          State = "ok"
	StateInvalid     State = "invalid"  // its content is lost
	StateOverflow    State = "overflow" // store PO, and the COW device was full: writes are refused
	StateMerging     State = "merging"
	StateMergeFailed State = "merge-failed" // the last step failed; resuming tries it again
)

// MergeState is the state of a live merge.
type MergeState string

// The states of a live merge.
const (
	MergeRunning MergeState = "running"
	MergePaused  MergeState = "paused"
	MergeFailed  MergeState = "failed" // a step failed; resuming tries it again
	MergeDone    MergeState = "done"
	MergeStopped MergeState = "stopped" // the server is shutting down
)

// Status is the reply to GET /v1/status: everything that is served.
type Status struct {
	Origin    Origin     `json:"origin"`
	Snapshots []Snapshot `json:"snapshots"` // in the order they were attached
	Merge     *Merge     `json:"merge"`     // nil: none was started
}

// Origin is the disk whose snapshots are served.
type Origin struct {
	Path      string `json:"path"`
	Name      string `json:"name"`   // of its export: "origin", or that of the logical volume
	Format    string `json:"format"` // raw or qcow2
	SizeBytes int64  `json:"size_bytes"`
	ReadOnly  bool   `json:"read_only"`
	URI       string `json:"uri,omitempty"`        // of its export, if it has one
	VhostUser string `json:"vhost_user,omitempty"` // its socket for virtual machines, if it has one
	File      string `json:"file,omitempty"`       // its file, if it is shown as one
	Waiting   int64  `json:"waiting"`              // writes to it that wait for space in a snapshot's COW device

	State      OriginState `json:"state"`
	Error      string      `json:"error,omitempty"` // why the state is not ok
	DirtyBytes int64       `json:"dirty_bytes"`     // acknowledged writes that are not written to the disk yet

	Counters OriginCounters `json:"counters"`
}

// OriginState is the state of the origin's disk, in one word.
type OriginState string

const (
	OriginOK      OriginState = "ok"
	OriginFailing OriginState = "failing" // acknowledged writes can't be written: they are tried again, and flushes fail until then
	OriginFailed  OriginState = "failed"  // a flush failed: every later one fails until the server is started again
)

// Snapshot is a served snapshot.
type Snapshot struct {
	Name string `json:"name"`
	COW  string `json:"cow"`
	// COWBase64 are the bytes of a path that is not UTF-8, which JSON can't hold; COW has U+FFFD in their place.
	COWBase64 []byte `json:"cow_base64,omitempty"`
	URI       string `json:"uri"`
	VhostUser string `json:"vhost_user,omitempty"` // its socket for virtual machines, if it has one
	File      string `json:"file,omitempty"`       // its file, if it is shown as one
	Merged    bool   `json:"merged"`               // its live merge is complete; the export is the origin
	// Waiting is the number of writes to it that wait for space in the COW device.
	Waiting int64 `json:"waiting"`
	// Changes is the number of requests that changed the export since it was attached.
	Changes uint64 `json:"changes"`
	Figures
	Counters Counters `json:"counters"`
}

// Counters are what was done for a snapshot since it was attached.
type Counters struct {
	PreservedChunks uint64 `json:"preserved_chunks"` // copied because the origin was about to change
	PreservedBytes  uint64 `json:"preserved_bytes"`
	WrittenChunks   uint64 `json:"written_chunks"` // made by writes to the snapshot
	FilledBytes     uint64 `json:"filled_bytes"`   // copied from the origin into them, around what was written
	NoRoom          uint64 `json:"no_room"`        // writes that found no space and were refused or had to wait, each time

	Exceptions uint64  `json:"committed_exceptions"`
	Syncs      uint64  `json:"syncs"`        // requests to make exceptions durable; those that meet share a round
	Rounds     Latency `json:"sync_rounds"`  // writes and flushes of the COW device
	CopyWaits  Latency `json:"copy_waits"`   // rounds that waited for copies under way
	OwnerWaits Latency `json:"owner_waits"`  // requests that waited for another one that makes an exception for the same chunk
	ReadWaits  Latency `json:"reader_waits"` // origin writes that waited for reads of the snapshot
	MergeWaits Latency `json:"merge_waits"`  // of the steps of its live merge and of writes, for each other
}

// OriginCounters are what was done for the origin since the server began.
type OriginCounters struct {
	SyncWaits  Latency `json:"sync_waits"`  // until exceptions were durable, before the origin changed
	WriteBacks uint64  `json:"write_backs"` // writes that were acknowledged while they were in memory only
}

// Latency says how often something happened and how long it took.
type Latency struct {
	Count   uint64   `json:"count"`
	Seconds float64  `json:"seconds"` // in all
	Buckets []Bucket `json:"buckets"` // in ascending order, without empty ones
}

// Bucket counts durations that are shorter than Below and not shorter than half of it. The first one begins at 0. The
// last one, with Below 0, has no upper bound.
type Bucket struct {
	Below float64 `json:"below_seconds"`
	Count uint64  `json:"count"`
}

// Figures are the state of a snapshot's store in numbers.
type Figures struct {
	Store            string  `json:"store"` // P, PO or N; P and PO are the same on disk
	State            State   `json:"state"`
	Valid            bool    `json:"valid"`
	ChunkSectors     uint32  `json:"chunk_sectors"`
	Exceptions       uint64  `json:"exceptions"`
	SectorsAllocated uint64  `json:"sectors_allocated"`
	TotalSectors     uint64  `json:"total_sectors"`
	MetadataSectors  uint64  `json:"metadata_sectors"`
	Percent          float64 `json:"percent"`            // allocated of total
	Full             bool    `json:"full"`               // there was no space for the last write that needed some: such writes fail or wait
	Unmarked         bool    `json:"unmarked,omitempty"` // invalid, but the COW device could not be marked so
	Error            string  `json:"error,omitempty"`    // why the store refuses writes
	Dmsetup          string  `json:"dmsetup"`            // the kernel's status text
}

// Merge is a live merge, under way or complete.
type Merge struct {
	Name         string     `json:"name"`
	State        MergeState `json:"state"`
	Error        string     `json:"error,omitempty"`
	MergedChunks uint64     `json:"merged_chunks"`
	TotalChunks  uint64     `json:"total_chunks"`
	MergedBytes  int64      `json:"merged_bytes"`
	TotalBytes   int64      `json:"total_bytes"`
	Percent      float64    `json:"percent"`
}

// AttachRequest is the body of POST /v1/snapshots.
type AttachRequest struct {
	Name      string `json:"name"`
	COW       string `json:"cow,omitempty"`        // path; a relative one counts from the server's working directory
	COWBase64 []byte `json:"cow_base64,omitempty"` // the bytes of one that is not UTF-8, instead of COW
	Create    bool   `json:"create,omitempty"`     // make the file, or the store on it, where there is none
	Force     bool   `json:"force,omitempty"`      // overwrite what the COW device holds; attach a store of a longer disk
	ChunkSize int64  `json:"chunk_size,omitempty"` // bytes, of a store that is made; 0: 4 KiB
	Store     string `json:"store,omitempty"`      // P, PO or N; "": P
}

// GrowRequest is the body of POST /v1/snapshots/{name}/grow.
type GrowRequest struct {
	Size int64 `json:"size"` // bytes
}

// MergeRequest is the body of POST /v1/merge.
type MergeRequest struct {
	Name string `json:"name"`
}
