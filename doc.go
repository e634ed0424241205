// Package dmsnap is the root of a library for device-mapper snapshots in userspace, in the on-disk format of the Linux
// kernel's persistent exception store. It has no code itself. The packages are:
//
//	block             devices: files, block special files, memory, and devices over other devices
//	snapshot          the engine: an origin, its snapshots, and merging a snapshot back
//	merge             offline merges, background merges, undo stores
//	store             exception stores: create, open, read, without the engine
//	cowfile           opening an origin and a COW file by their paths, creating COW files
//	nbd, nbd/wire     an NBD server, an NBD client, the messages of the protocol
//	server            a disk with its snapshots, served over NBD and controlled while it runs
//	server/api        request and reply types of the control API, and its client
//	check, repair     find the problems of a store; make a sound store of a damaged one
//	rescue            recover data from an invalid or damaged snapshot
//	diff, compact     compare the views of a disk; make a store smaller
//	dump, ondisk      a store as text; the on-disk format
//	image, source/... recognize what a disk holds; open partitions, LVM2 volumes and qcow2 images
//	latency           histograms of durations, for counters
//	writeback         a write-back cache in memory over a device, with a barrier
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
