package inspect

import (
	"errors"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/server/figures"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

// Status is the status of a store, read from its COW device.
type Status struct {
	Path string `json:"path"`
	api.Figures
	Version uint32 `json:"version"`
	InUse   bool   `json:"in_use"` // another program has it open for writing
}

// StatusOf returns the status of the store on cow, which was opened at path, as it is on disk. The errors are those of
// [OpenStore].
func StatusOf(path string, cow block.Device, inUse bool) (Status, error) {
	s := Status{Path: path, InUse: inUse}
	st, err := OpenStore(cow, inUse)
	if err == nil {
		s.Figures, s.Version = Figures(st), st.Header().Version
	}
	return s, err
}

// Figures returns the status of a snapshot with this store in the types of the API.
func Figures(st *store.Store) api.Figures { return figures.Of(SnapshotStatus(st)) }

// SnapshotStatus is the status of a snapshot with this store.
func SnapshotStatus(st *store.Store) snapshot.Status {
	status := snapshot.Status{Target: snapshot.TargetSnapshot, State: snapshot.StateOK,
		ChunkSectors: st.Layout().ChunkSectors, Exceptions: st.Len(), Usage: st.Usage()}
	if st.Err() != nil {
		status.State = snapshot.StateInvalid
	}
	return status
}

// OpenStore loads a store. With written, which says that it has a writer, damage is retried: the store on disk is
// loadable at every instant, but parts read at different instants may not match. It is for reports: what the operating system has
// cached is trusted (block.KeepCache).
func OpenStore(cow block.Device, written bool) (st *store.Store, err error) {
	tries := 1
	if written {
		tries = 5
	}
	for i := range tries {
		if i > 0 {
			time.Sleep(20 * time.Millisecond)
		}
		var corrupt *ondisk.CorruptError
		if st, err = store.OpenToRead(block.KeepCache(cow)); !errors.As(err, &corrupt) {
			return st, err
		}
		block.Refresh(cow) // it may have grown; after an error the old size is used
	}
	return nil, err
}
