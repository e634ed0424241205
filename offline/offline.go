// Package offline changes disks that are not served, by their names: it merges snapshots into their origins, and receives
// streams.
//
//	res, err := offline.Merge(ctx, []string{"disk.img", "disk.cow"}, offline.MergeOptions{Undo: "before.cow"})
//
// Names are those of package source. What is changed is locked until the call returns. A call that was interrupted, by its context
// or by a crash, is repeated to continue it. Calls on different disks may be concurrent.
package offline
