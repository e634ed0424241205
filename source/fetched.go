package source

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/cache"
	"github.com/dmsnap/dmsnap/source/ondemand"
	"github.com/dmsnap/dmsnap/source/remote"
)

// RemoteOptions say how disks in registries, object stores and web servers are opened.
type RemoteOptions struct {
	remote.Options
	CacheDir  string // empty: cache.DefaultDir
	CacheSize int64  // bytes; 0: cache.DefaultSize

	// Record is the path of a new file in which, when the disk is closed, the ranges are written that were read, in that order.
	Record string
	// Prefetch is the path of a file that Record wrote: its ranges are fetched when the disk is opened.
	Prefetch string
	// Log, where not nil, is called with events that no read reports.
	Log func(line string)
	// Context, where not nil, ends what waits for a server while a disk is opened.
	Context context.Context
}

// OpenCache opens the cache of the options.
func (o RemoteOptions) OpenCache() (*cache.Cache, error) {
	dir := o.CacheDir
	if dir == "" {
		var err error
		if dir, err = cache.DefaultDir(); err != nil {
			return nil, err
		}
	}
	return cache.Open(dir, cache.Options{Size: o.CacheSize})
}

// Fetched returns the disk in a registry or an object store that this is the whole of; nil: it is none.
func (d *Disk) Fetched() *ondemand.Disk {
	if d.fetched == nil || d.fetched.Description() == nil || !d.plain {
		return nil
	}
	return d.fetched
}

// IsFetched reports whether what is read is fetched from a server and kept in a cache.
func (d *Disk) IsFetched() bool { return d.fetched != nil }

// openFetched opens a disk that is fetched as it is read.
func (d *Disk) openFetched(name string, o Options) (block.Device, error) {
	d.onlyRead = fetchedKind
	of := ondemand.Options{Remote: o.Remote.Options, Log: o.Remote.Log}
	var err error
	if o.Remote.Prefetch != "" {
		if of.Prefetch, err = readRanges(o.Remote.Prefetch); err != nil {
			return nil, err
		}
	}
	var r *recording
	if o.Remote.Record != "" {
		if err := newfile.Check(o.Remote.Record, newfile.Options{}); err != nil {
			return nil, block.WithPath(o.Remote.Record, err)
		}
		r = &recording{path: o.Remote.Record}
		of.Record = r.add
	}
	if of.Cache, err = o.Remote.OpenCache(); err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	d.closers = append(d.closers, of.Cache)
	if d.fetched, err = ondemand.Open(cmp.Or(o.Remote.Context, context.Background()), name, of); err != nil {
		return nil, err
	}
	if d.closers = append(d.closers, d.fetched); r != nil {
		d.closers = append(d.closers, r)
	}
	return d.fetched, nil
}

// versionOf adds the version of a disk to its format, and refuses another one than that of o.Format.
func versionOf(d *ondemand.Disk, format string, o Options) (string, error) {
	format = ondisk.OriginVersion(format, d.ID())
	if _, want := ondisk.CutOriginVersion(o.Format); want != "" && o.Format != format && !o.Raw {
		return "", fmt.Errorf("%w: the store is for version %s", cowfile.ErrOtherVersion, want)
	}
	return format, nil
}

// recording is the ranges that were read.
type recording struct {
	path string
	mu   sync.Mutex
	text bytes.Buffer
}

func (r *recording) add(b block.Range) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(&r.text, "%d %d\n", b.Off, b.Length)
}

// Close writes the file.
func (r *recording) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return block.WithPath(r.path, newfile.Write(r.path, newfile.Options{}, func(f *os.File) error {
		_, err := f.Write(r.text.Bytes())
		return err
	}))
}

// mostRecorded bounds a file of ranges, in bytes.
const mostRecorded = 64 << 20

// readRanges reads what a recording wrote.
func readRanges(path string) (list []block.Range, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(io.LimitReader(f, mostRecorded))
	for n := 1; lines.Scan(); n++ {
		var r block.Range
		if _, err := fmt.Sscanf(lines.Text(), "%d %d", &r.Off, &r.Length); err != nil || r.Off < 0 || r.Length <= 0 {
			return nil, fmt.Errorf("%s: line %d: OFFSET LENGTH is required", path, n)
		}
		list = append(list, r)
	}
	if err := lines.Err(); err != nil && !errors.Is(err, io.EOF) {
		return nil, block.WithPath(path, err)
	}
	return list, nil
}
