package fleet

import (
	"context"

	"github.com/dmsnap/dmsnap/server/api"
)

// Merge writes what a node shows into its disk.
func (f *Fleet) Merge(ctx context.Context, name string) (api.TreeMerge, error) {
	return api.TreeMerge{}, refuse(api.CodeFailed, "merging is not supported yet")
}
