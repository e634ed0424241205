// Package dmsnap is the root of a library for device-mapper snapshots in userspace, in the on-disk format of the Linux
// kernel's persistent exception store. It has no code itself. The packages are:
//
//	block               devices: files, block special files, memory, and devices over other devices
//	block/blocktest     tests of devices: a suite, and devices that record, fail and lose power
//	activity            what is done to a device: requests, bytes, errors, durations, places
//	writeback           a write-back cache in memory over a device, with a barrier
//	latency             histograms of durations, for counters
//
//	ondisk              the on-disk format: bytes and arithmetic, without I/O
//	store               exception stores: create, open, read, without the engine
//	snapshot            the engine: an origin, its snapshots, and merging a snapshot back
//	merge               offline merges, background merges, undo stores
//	cowfile             opening an origin and a COW file by their paths, creating COW files
//
//	check               every problem that a store can have
//	repair              a sound store of a damaged one
//	rescue              recover data from an invalid or damaged snapshot
//	diff                compare the views of a disk
//	compact             make a store smaller
//	dump                a store as text, both ways
//	offline             work on disks and stores that are not served, by their names
//
//	image               recognize what a disk or a file holds
//	inspect             what a disk is and holds, and the state of it
//	source              open disks by name: raw and qcow2 images, NBD exports, remote disks, and parts of them
//	source/address      DISK#pN and DISK#VG/LV: a part of a disk, named in one word
//	source/partition    partitions of an MBR or GPT as devices
//	source/lvm          volumes of LVM2 as devices
//	source/qcow2        disks in qcow2 images; images of disks
//	source/mapped       a device made of ranges of others
//	source/stack        sealed layers over a base, with one merged index
//
//	nbd                 an NBD server and an NBD client
//	nbd/wire            the messages of the NBD protocol
//	nbdkernel           exports as /dev/nbdN, by the kernel's client
//	vhost               devices for virtual machines: a vhost-user-blk back-end
//	fuse                exports as files of a mounted folder
//
//	server              a disk with its snapshots, served over NBD and controlled while it runs
//	server/api          request and reply types of the control API, and its client
//	server/figures      what the engine reports, in the types of the control API
//	fleet               a tree of disks, checkpoints and nodes, each node an export
//	fleet/daemon        a fleet over NBD and HTTP: rights, policies, events
//	notify              events delivered to a URL or a program
//	monitor             rates, forecasts and alerts, from what a server reports again and again
//	metrics             what a server reports, for Prometheus
//	web                 a page for browsers: state, forecasts, actions
//	top                 the same in a terminal
//
//	stream              what changed on a disk, sent to a copy of it
//	served              what running servers keep, read for streams and registries
//	publish             disks with their stores pushed to registries and object stores, and pulled
//	layer               the format of disks in registries and object stores
//	source/remote       ranges of files on servers, with deadlines
//	source/cache        parts of remote disks in local files
//	source/ondemand     disks on servers, fetched as they are read
//
// To embed the engine, begin with package snapshot. To embed a complete server, begin with package server.
//
//	disk, err := block.Open("disk.img", block.Options{})
//	cow, err := block.Open("vm1.cow", block.Options{})
//	origin := snapshot.NewOrigin(disk)
//	vm1, err := origin.Attach(cow, snapshot.Options{})
//
// # Stability
//
// The on-disk format is the kernel's and does not change. The JSON fields of the control API, the codes of package check
// and the names of NBD exports are extended, never renamed or removed.
//
// There is no tagged release yet: exported Go names may change until the first one. From v1.0.0 on, the exported names
// of all packages outside internal/, test/, bench/ and demo/ follow semantic versioning. Texts of errors and of log lines
// are not part of the interface: compare errors with errors.Is and errors.As.
package dmsnap
