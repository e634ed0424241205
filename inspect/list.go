package inspect

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/internal/jsonlist"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// StoreList is what ListJSON writes; the runs follow as its last field.
type StoreList struct {
	Path         string `json:"path"`
	ChunkSectors uint32 `json:"chunk_sectors"`
	Exceptions   uint64 `json:"exceptions"`
}

// Run is a run of exceptions, consecutive on both sides.
type Run struct {
	OriginChunk  uint64 `json:"origin_chunk"`
	COWChunk     uint64 `json:"cow_chunk"`
	Chunks       uint64 `json:"chunks"`
	OriginOffset int64  `json:"origin_offset"` // bytes
	COWOffset    int64  `json:"cow_offset"`    // bytes
	Length       int64  `json:"length"`        // bytes, whole chunks
}

// RunOf returns a run with its places in bytes.
func RunOf(l ondisk.Layout, r store.Run) Run {
	return Run{uint64(r.Old), uint64(r.New), r.Count, l.OriginOffset(r.Old), l.COWOffset(r.New), int64(r.Count) << l.Shift()}
}

// ListJSON writes the exceptions of a store as one JSON object, run by run, ascending on the disk.
func ListJSON(ctx context.Context, w io.Writer, path string, st *store.Store) error {
	head, err := json.Marshal(StoreList{path, st.Layout().ChunkSectors, st.Len()})
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "%s,\"runs\":", head[:len(head)-1])
	runs := jsonlist.New(w)
	for r := range st.Exceptions() {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := runs.Add(RunOf(st.Layout(), r)); err != nil {
			return err
		}
	}
	if err := runs.End(); err != nil {
		return err
	}
	_, err = io.WriteString(w, "}\n")
	return err
}
