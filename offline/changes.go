package offline

import (
	"context"
	"errors"
	"io"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/publish"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/remote"
	"github.com/dmsnap/dmsnap/store"
	"github.com/dmsnap/dmsnap/stream"
)

// OpenChanges opens what stream.Send sends: of an origin and a COW device what the snapshot changed, and with since, the COW device of an
// older snapshot of the same origin, what changed between the two; of one name the whole disk. The caller closes what was
// opened.
func OpenChanges(names []string, since string, o source.Options) (from *stream.Source, opened io.Closer, err error) {
	o.ReadOnly = true
	var all closers
	defer func() {
		if err != nil {
			err = errors.Join(err, all.Close())
		}
	}()
	if len(names) == 1 {
		dev, err := source.Open(names[0], o)
		if err != nil {
			return nil, nil, err
		}
		all = closers{dev}
		if err := source.CheckComplete(names[0]); err != nil {
			return nil, nil, err
		}
		return stream.Whole(dev), all, block.WithPath(names[0], cowfile.CheckSize(dev))
	}
	if since != "" {
		if err := source.CheckDifferent(names[0], since); err != nil {
			return nil, nil, err
		}
	}
	origin, err := source.OpenOriginOf(names[0], names[1], o)
	if err != nil {
		return nil, nil, err
	}
	all = closers{origin}
	var stores [2]*store.Store // as it was, as it is
	for i, path := range []string{since, names[1]} {
		if path == "" {
			continue
		}
		cow, err := source.OpenStore(path, o)
		if err != nil {
			return nil, nil, err
		}
		all = append(all, cow)
		if err := source.CheckFormat(origin, path, cow); err != nil && !o.Raw {
			return nil, nil, err
		}
		if err := source.CheckComplete(names[0], cow); err != nil {
			return nil, nil, err
		}
		view, err := openView(origin, cow)
		if err != nil {
			return nil, nil, block.WithPath(path, err)
		}
		stores[i] = view.Store()
	}
	from, err = stream.Between(origin, stores[0], stores[1])
	return from, all, err
}

// Push writes a disk to a registry or an object store, as publish.Push does: names are its base and the COW devices over it, each over
// the disk that those before it make. Of a base that is in a registry or an object store the layers are used as they are.
func Push(ctx context.Context, names []string, to remote.Repository, src source.Options, o publish.Options) (made publish.Pushed, err error) {
	src.ReadOnly = true
	base, stores, opened, err := openStack(names, src)
	defer func() { err = errors.Join(err, opened.Close()) }()
	if err != nil {
		return made, err
	}
	return publish.Push(ctx, to, base, stores, o)
}

// openStack opens a base and the stores over it. The caller closes what was opened, also after an error.
func openStack(names []string, o source.Options) (base block.Device, stores []*store.Store, opened closers, err error) {
	var origin *source.Disk
	if len(names) == 1 {
		if origin, err = source.Open(names[0], o); err == nil {
			err = source.CheckComplete(names[0])
		}
		if err != nil && origin != nil {
			err = errors.Join(err, origin.Close())
		}
	} else if err = source.CheckDifferent(names[0], names[1]); err == nil {
		origin, err = source.OpenOriginOf(names[0], names[1], o)
	}
	if err != nil {
		return nil, nil, nil, err
	}
	if opened, base = append(opened, origin), origin; origin.Fetched() != nil {
		base = origin.Fetched()
	}
	if err := block.WithPath(names[0], cowfile.CheckSize(origin)); err != nil {
		return nil, nil, opened, err
	}
	for i, path := range names[1:] {
		cow, err := source.OpenStore(path, o)
		if err != nil {
			return nil, nil, opened, err
		}
		opened = append(opened, cow)
		if err = cowfile.CheckStore(path, cow); err == nil && i == 0 && !o.Raw {
			err = source.CheckFormat(origin, path, cow)
		}
		var s *store.Store
		if err == nil {
			s, err = store.OpenToRead(cow)
		}
		if err == nil {
			err = errors.Join(s.Err(), s.CheckOrigin(origin.Size()))
		}
		if err = block.WithPath(path, err); err == nil && i == 0 {
			err = source.CheckComplete(names[0], cow)
		}
		if err != nil {
			return nil, nil, opened, err
		}
		stores = append(stores, s)
	}
	return base, stores, opened, nil
}
