package stream

import (
	"context"
	"errors"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
)

// ApplyOver makes a store on cow, which reads as zeros, that shows over base what the stream makes of it. base is only
// read. sectors is the chunk size. Errors are those of Apply and of snapshot.Origin.Attach; cow has a part of the result
// then.
func (r *Reader) ApplyOver(ctx context.Context, base, cow block.Device, sectors uint32, o ApplyOptions) (Applied, error) {
	snap, err := snapshot.NewOrigin(base).Attach(cow, snapshot.Options{ChunkSectors: sectors, OnFull: snapshot.FullFail})
	if err != nil {
		return Applied{FirstWrong: -1}, err
	}
	got, err := r.Apply(ctx, snap, o)
	return got, errors.Join(err, snap.Close())
}

// ApplyKeeping is Apply that keeps the old bytes in the store on undo, which becomes a snapshot of target: each block
// is there, durably, before it is overwritten. Merging the store into target reverts the stream. Without space in undo
// the stream is not applied further.
func (r *Reader) ApplyKeeping(ctx context.Context, target, undo block.Device, o ApplyOptions) (Applied, error) {
	origin := snapshot.NewOrigin(target)
	snap, err := origin.Attach(undo, snapshot.Options{OnFull: snapshot.FullFail})
	if err != nil {
		return Applied{FirstWrong: -1}, err
	}
	got, err := r.Apply(ctx, origin, o)
	return got, errors.Join(err, snap.Close())
}
