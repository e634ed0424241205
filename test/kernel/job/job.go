// Package job is the language in which a test speaks to the program inside a guest kernel: a list of
// operations goes in as one line of JSON, the list of their results comes back as one.
//
// The guest executes jobs and reports the kernel's answers. The tests decide which tables to load and what to expect.
package job

// An Op is one thing to do. Which fields count depends on Do.
type Op struct {
	Do string

	Dev  string `json:",omitempty"` // a path in the guest: a block device or a file
	Path string `json:",omitempty"` // a name in the directory shared with the host
	Off  int64  `json:",omitempty"` // bytes
	N    int64  `json:",omitempty"` // bytes; 0 means to the end of the device, where that makes sense
	Seed uint64 `json:",omitempty"` // whose stream is written, see kernelcase.Stream

	Argv    []string `json:",omitempty"`
	Stdin   string   `json:",omitempty"`
	Seconds int      `json:",omitempty"` // how long Exec and Wait may take; 0 means 60
}

// What an Op can do.
const (
	Ping   = "ping"   // Out: kernel version
	Module = "module" // load the kernel module Argv[0] (with parameters) and what it depends on
	Exec   = "exec"   // run Argv with Stdin; Out: both outputs; Code: exit status
	Spawn  = "spawn"  // run Argv in the background; Out: process id; its output goes to Path
	Reap   = "reap"   // wait for the background process N; Code: exit status
	Kill   = "kill"   // end the background process N at once and reap it
	Write  = "write"  // write N bytes of Seed's stream to Dev at Off, directly
	Read   = "read"   // Out: SHA-256 of N bytes of Dev from Off on, read directly
	Flush  = "flush"  // fsync of Dev
	Drop   = "drop"   // discard N bytes of Dev at Off
	Put    = "put"    // copy the shared file Path to Dev at Off, and flush
	Get    = "get"    // copy N bytes of Dev at Off to a new shared file Path
	Size   = "size"   // N: the bytes of Dev
	Pool   = "pool"   // (re)create the pool: a sparse file of N bytes behind the loop device Dev, all zero
	Sleep  = "sleep"  // N milliseconds: for pacing loads, never for waiting that something happened
	Until  = "until"  // run Argv again and again until its output contains Stdin, at most Seconds
	Mkdir  = "mkdir"  // make the directory Dev

	// Mapped devices. Dev is dm:NAME, in the operations above too; so it is in tables, in the
	// place of a device's number.
	Create    = "dm-create"     // make a device with the table Stdin and resume it
	Load      = "dm-load"       // load the table Stdin
	Clear     = "dm-clear"      // drop the table that was loaded and not resumed
	Suspend   = "dm-suspend"    // without waiting for file systems
	SuspendFS = "dm-suspend-fs" // with the file system above frozen
	Resume    = "dm-resume"     // with the table that was loaded, if one was
	Remove    = "dm-remove"
	Status    = "dm-status" // Out: as dmsetup status NAME prints it
	Table     = "dm-table"  // Out: as dmsetup table NAME prints it
	Number    = "dm-number" // Out: major:minor
)

// A Result is what came of an Op.
type Result struct {
	Err  string `json:",omitempty"` // errno's name ("EIO") where the kernel refused, else a sentence
	Out  string `json:",omitempty"`
	Code int    `json:",omitempty"`
	N    int64  `json:",omitempty"`
}
