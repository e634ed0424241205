// Package cache keeps parts of remote disks in files on this host, for all processes and disks that read them.
//
//	c, err := cache.Open(dir, cache.Options{Size: 20 << 30})
//	b, err := c.Blob(cache.Data, digest, "oci://host/golden")
//	release, err := b.Claim(ctx, unit, 1)            // nobody else fetches it now
//	if !b.Read(p, unit, 0, length, digest) {         // not there, or damaged
//		err = b.Put(unit, content, digest)
//	}
//	release()
//
// A blob is divided into units, and these are kept in segments of 1024 units, each a file:
//
//	DIR/v1/KIND-KEY/NUMBER     segment: the SHA-256 of the content of each unit, 32 bytes each, zeros where it is not there;
//	                           from byte 65536 on the units' contents, at fixed places, sparse
//	DIR/v1/KIND-KEY/name       what the blob is called in lists
//	DIR/v1/references/DIGEST   what a reference named when it was last looked up
//
// # Guarantees
//
//   - What Read returns has the digest that was asked for: it is verified when it enters the cache and when a [Blob] reads it for the first
//     time. So nothing needs to be durable, and a crash or a damaged file costs another fetch. The content of a unit is never
//     replaced by another one.
//   - Processes share a directory. A unit is fetched by one of them at a time; locks end with their process. Segments are removed while they are
//     in use: who has one open reads on from it.
//   - The directory is bounded by [Options].Size, exceeded by at most 1/16 of it or 64 MiB for each process that writes; what
//     was not used for the longest time is removed first.
//
// A Cache and a Blob may be used concurrently.
package cache

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/layer"
)

// DefaultSize bounds a cache that no other size is given for, in bytes.
const DefaultSize = 20 << 30

// Options are the properties of a cache.
type Options struct {
	Size int64 // bytes; 0: DefaultSize
}

// A Cache is a directory.
type Cache struct {
	dir     string
	size    int64
	written atomic.Int64 // since the last eviction
	evicts  sync.WaitGroup
	busy    atomic.Bool
}

// DefaultDir is the directory for the user.
func DefaultDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "dmsnap"), nil
}

// Open opens a cache; the directory is made where it does not exist, for the user alone.
func Open(dir string, o Options) (*Cache, error) {
	c := &Cache{dir: dir, size: cmp.Or(o.Size, DefaultSize)}
	for _, d := range []string{dir, c.path(), c.path("references")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	c.written.Store(c.step()) // what others left is looked at soon
	return c, nil
}

// Close waits for an eviction that has begun. Blobs must not be used any more.
func (c *Cache) Close() error {
	c.evicts.Wait()
	return nil
}

func (c *Cache) path(names ...string) string {
	return filepath.Join(append([]string{c.dir, "v1"}, names...)...)
}

// step is how much is written between evictions.
func (c *Cache) step() int64 { return max(64<<20, c.size/16) }

// wrote counts bytes and evicts when it is time.
func (c *Cache) wrote(n int64) {
	if c.written.Add(n) < c.step() || !c.busy.CompareAndSwap(false, true) {
		return
	}
	c.written.Store(0)
	c.evicts.Go(func() {
		defer c.busy.Store(false)
		c.evict(c.size, unix.LOCK_NB) // a failure is that of a directory: the next Put reports it
	})
}

// An Item is a blob in the cache.
type Item struct {
	Key      string    `json:"key"`
	Name     string    `json:"name"`
	Bytes    int64     `json:"bytes"` // that its files take
	LastUsed time.Time `json:"last_used"`

	segments []segmentFile
}

type segmentFile struct {
	path  string
	bytes int64
	used  time.Time
}

// List returns what is in the cache, what was used last first.
func (c *Cache) List() ([]Item, error) {
	dirs, err := os.ReadDir(c.path())
	if err != nil {
		return nil, err
	}
	items := []Item{}
	for _, d := range dirs {
		if !d.IsDir() || d.Name() == "references" {
			continue
		}
		item := Item{Key: d.Name()}
		name, _ := os.ReadFile(c.path(d.Name(), "name"))
		item.Name = string(name)
		files, err := os.ReadDir(c.path(d.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // another process removed it
		}
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			var s unix.Stat_t
			path := c.path(d.Name(), f.Name())
			if f.Name() == "name" || unix.Stat(path, &s) != nil {
				continue
			}
			seg := segmentFile{path, s.Blocks * 512, time.Unix(s.Mtim.Unix())}
			item.segments = append(item.segments, seg)
			item.Bytes += seg.bytes
			if seg.used.After(item.LastUsed) {
				item.LastUsed = seg.used
			}
		}
		items = append(items, item)
	}
	slices.SortFunc(items, func(a, b Item) int { return b.LastUsed.Compare(a.LastUsed) })
	return items, nil
}

// Evict removes the segments that were not used for the longest time, until the others take at most size bytes, and returns
// how many bytes these took.
func (c *Cache) Evict(size int64) (removed int64, err error) { return c.evict(size, 0) }

// evict does nothing, with unix.LOCK_NB, while others evict.
func (c *Cache) evict(size int64, wait int) (removed int64, err error) {
	lock, err := os.OpenFile(c.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|wait); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = nil
		}
		return 0, err
	}
	items, err := c.List()
	if err != nil {
		return 0, err
	}
	var all []segmentFile
	total := int64(0)
	for _, i := range items {
		all, total = append(all, i.segments...), total+i.Bytes
	}
	slices.SortFunc(all, func(a, b segmentFile) int { return a.used.Compare(b.used) })
	for _, s := range all {
		if total <= size {
			break
		}
		if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return removed, err
		}
		total, removed = total-s.bytes, removed+s.bytes
	}
	if size == 0 { // all of it, names too
		for _, i := range items {
			os.Remove(c.path(i.Key, "name"))
			os.Remove(c.path(i.Key))
		}
		refs, _ := filepath.Glob(c.path("references", "*"))
		for _, r := range refs {
			os.Remove(r)
		}
	}
	return removed, nil
}

// reference is what a file in references holds.
type reference struct {
	Name   string       `json:"name"`
	Digest layer.Digest `json:"digest"` // of Text
	Text   []byte       `json:"text"`
}

func (c *Cache) referencePath(name string) string {
	return c.path("references", layer.DigestOf([]byte(name)).Hex())
}

// SaveReference keeps what a reference names.
func (c *Cache) SaveReference(name string, text []byte) error {
	if old, ok := c.Reference(name); ok && string(old) == string(text) {
		return nil
	}
	b, err := json.Marshal(reference{name, layer.DigestOf(text), text})
	if err != nil {
		return err
	}
	return writeWhole(c.referencePath(name), b)
}

// writeWhole writes a file that is there as a whole or not at all, unless power is lost.
func writeWhole(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// Reference returns what a reference named when it was kept.
func (c *Cache) Reference(name string) ([]byte, bool) {
	b, err := os.ReadFile(c.referencePath(name))
	var r reference
	if err != nil || json.Unmarshal(b, &r) != nil || r.Name != name || layer.DigestOf(r.Text) != r.Digest {
		return nil, false
	}
	return r.Text, true
}

// A Kind is what a blob is. Blobs of several kinds are different, whatever their keys are: a server chooses the digests that a
// description has.
type Kind string

// The kinds.
const (
	Data  Kind = "data"  // contents of frames, in units of layer.UnitBytes
	Index Kind = "index" // pages, in units of layer.PageBytes
	File  Kind = "file"  // a file without digests, in units of layer.UnitBytes
)

// Blob returns a blob. name is for lists.
func (c *Cache) Blob(kind Kind, key layer.Digest, name string) (*Blob, error) {
	b := &Blob{c: c, dir: c.path(string(kind) + "-" + key.Hex()), name: name, unit: layer.UnitBytes, segments: map[int64]*segment{}}
	if kind == Index {
		b.unit = layer.PageBytes
	}
	if err := b.makeDir(); err != nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) { // else Put tries again
		return nil, err
	}
	return b, nil
}

func (b *Blob) makeDir() error {
	err := os.Mkdir(b.dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil {
		err = writeWhole(filepath.Join(b.dir, "name"), []byte(strings.ToValidUTF8(b.name, "_")))
	}
	if err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	return nil
}
