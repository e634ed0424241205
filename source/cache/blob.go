package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/layer"
)

// SegmentUnits is the number of units in a segment.
const SegmentUnits = 1024

const (
	recordBytes  = 32
	dataAt       = 64 << 10 // of the first unit in a segment
	mostSegments = 256      // that a blob has open
	touchEvery   = 10 * time.Minute
)

// A Blob is a part of a remote disk, for one that has it open.
type Blob struct {
	c    *Cache
	dir  string
	name string
	unit int64

	mu       sync.RWMutex
	segments map[int64]*segment
}

// A segment is an open file. It is closed by the runtime when nobody uses it any more.
type segment struct {
	f        *os.File
	verified [SegmentUnits / 64]atomic.Uint64 // by this Blob
	touched  atomic.Int64                     // seconds, when its time was set
	reads    atomic.Uint32

	mu      sync.Mutex
	claimed [SegmentUnits]bool
	freed   chan struct{} // closed when something is not claimed any more
}

// open returns the segment with a number. create: a new one where there is no file, or it was removed.
func (b *Blob) open(number int64, create bool) (*segment, error) {
	b.mu.RLock()
	s := b.segments[number]
	b.mu.RUnlock()
	if s != nil && !(create && s.removed()) {
		return s, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if now := b.segments[number]; now != nil && now != s {
		return now, nil
	}
	f, err := b.openFile(number, create)
	if err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	next := &segment{f: f, freed: make(chan struct{})}
	next.touch()
	for n := range b.segments {
		if len(b.segments) < mostSegments {
			break
		}
		delete(b.segments, n) // any of them
	}
	b.segments[number] = next
	return next, nil
}

func (b *Blob) openFile(number int64, create bool) (*os.File, error) {
	path := filepath.Join(b.dir, fmt.Sprint(number))
	flags := os.O_RDWR
	if create {
		flags |= os.O_CREATE
	}
	for {
		f, err := os.OpenFile(path, flags, 0o600)
		if !create || !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
		if err := b.makeDir(); err != nil {
			return nil, err
		}
	}
}

// removed reports whether the file has no name any more.
func (s *segment) removed() bool {
	info, err := s.f.Stat()
	return err == nil && info.Sys().(*syscall.Stat_t).Nlink == 0
}

// touch sets the time of last use.
func (s *segment) touch() {
	now := time.Now()
	if last := s.touched.Load(); now.Unix()-last >= int64(touchEvery/time.Second) && s.touched.CompareAndSwap(last, now.Unix()) {
		unix.Futimes(int(s.f.Fd()), []unix.Timeval{unix.NsecToTimeval(now.UnixNano()), unix.NsecToTimeval(now.UnixNano())})
	}
}

func (s *segment) isVerified(i int64) bool { return s.verified[i/64].Load()&(1<<(i%64)) != 0 }
func (s *segment) setVerified(i int64)     { s.verified[i/64].Or(1 << (i % 64)) }

// record is the digest of a unit's content; the zero digest where it is not there.
func (s *segment) record(i int64) (d layer.Digest) {
	if n, err := s.f.ReadAt(d[:], i*recordBytes); err != nil || n < len(d) {
		return layer.Digest{}
	}
	return d
}

func (b *Blob) place(i int64) int64 { return dataAt + i*b.unit }

// Read fills p from byte at of the content of a unit, which has length bytes. want is the digest of the content; the zero
// digest: that which Put was called with. It returns false where the unit is not there, or is damaged.
func (b *Blob) Read(p []byte, unit int64, at, length int, want layer.Digest) bool {
	s, err := b.open(unit/SegmentUnits, false)
	if err != nil {
		return false
	}
	i := unit % SegmentUnits
	if s.isVerified(i) {
		s.use()
		_, err := s.f.ReadAt(p, b.place(i)+int64(at))
		return err == nil
	}
	record := s.record(i)
	if record == (layer.Digest{}) || want != (layer.Digest{}) && record != want {
		return false
	}
	content := layer.Buffer()
	defer layer.Recycle(content)
	if _, err := s.f.ReadAt(content[:length], b.place(i)); err != nil || layer.DigestOf(content[:length]) != record {
		return false
	}
	copy(p, content[at:length])
	s.setVerified(i)
	return true
}

// use is called for each read of what is verified.
func (s *segment) use() {
	if s.reads.Add(1)%256 == 0 {
		s.touch()
	}
}

// Verified returns where byte at of the content of a unit is that this Blob has verified: a file, and a byte of it, or nil. The file stays
// open as long as the caller refers to it, and is not changed there.
func (b *Blob) Verified(unit int64, at int) (f *os.File, off int64) {
	b.mu.RLock()
	s := b.segments[unit/SegmentUnits]
	b.mu.RUnlock()
	i := unit % SegmentUnits
	if s == nil || !s.isVerified(i) {
		return nil, 0
	}
	s.use()
	return s.f, b.place(i) + int64(at)
}

// Has reports whether a unit is there, without looking at its content.
func (b *Blob) Has(unit int64) bool {
	s, err := b.open(unit/SegmentUnits, false)
	if err != nil {
		return false
	}
	i := unit % SegmentUnits
	return s.isVerified(i) || s.record(i) != (layer.Digest{})
}

// Put keeps the content of a unit, whose digest was verified. The caller has claimed it. It is not kept where the cache has other
// content for it. An error is that of the file system; then it is not there.
func (b *Blob) Put(unit int64, content []byte, digest layer.Digest) error {
	number, i := unit/SegmentUnits, unit%SegmentUnits
	s, err := b.open(number, true)
	if err != nil {
		return err
	}
	switch record := s.record(i); {
	case record == digest && s.isVerified(i):
		return nil
	case record == digest, record == (layer.Digest{}):
	case layer.DigestOf(s.content(b.place(i), len(content))) == record:
		return nil // of another disk that claims to have the same data
	default:
		// The record is damaged, and nobody may see its content change: who has the segment open keeps it.
		if err := b.replace(number, s); err != nil {
			return err
		}
		if s, err = b.open(number, true); err != nil {
			return err
		}
	}
	return b.write(s, i, content, digest[:])
}

// PutAll is Put of consecutive units in one segment. All of them are whole, but maybe the last one.
func (b *Blob) PutAll(unit int64, content []byte, digests []layer.Digest) error {
	i, records := unit%SegmentUnits, make([]byte, len(digests)*recordBytes)
	s, err := b.open(unit/SegmentUnits, true)
	if err != nil {
		return err
	}
	n, err := s.f.ReadAt(records, i*recordBytes)
	if err != nil && err != io.EOF {
		return fmt.Errorf("cache: %w", err)
	}
	for _, r := range records[:n] {
		if r == 0 {
			continue
		}
		for k, d := range digests { // some units are there, or are damaged
			from := int64(k) * b.unit
			if err := b.Put(unit+int64(k), content[from:min(from+b.unit, int64(len(content)))], d); err != nil {
				return err
			}
		}
		return nil
	}
	for k, d := range digests {
		copy(records[k*recordBytes:], d[:])
	}
	return b.write(s, i, content, records)
}

// write writes units and then their records.
func (b *Blob) write(s *segment, i int64, content, records []byte) error {
	_, err := s.f.WriteAt(content, b.place(i))
	if err == nil {
		_, err = s.f.WriteAt(records, i*recordBytes)
	}
	if err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	for k := range len(records) / recordBytes {
		s.setVerified(i + int64(k))
	}
	b.c.wrote(int64(len(content)))
	return nil
}

func (s *segment) content(at int64, n int) []byte {
	p := make([]byte, n)
	s.f.ReadAt(p, at)
	return p
}

// replace removes the file of a segment, if it is still its own.
func (b *Blob) replace(number int64, s *segment) error {
	path := filepath.Join(b.dir, fmt.Sprint(number))
	mine, err := s.f.Stat()
	if err != nil {
		return err
	}
	if info, err := os.Stat(path); err == nil && os.SameFile(mine, info) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Claim makes the caller the only one, in all processes, that fetches n units from unit on, which are in one segment. It waits
// until ctx ends; then it returns the cause. Units may be there by now.
func (b *Blob) Claim(ctx context.Context, unit, n int64) (release func(), err error) {
	s, err := b.open(unit/SegmentUnits, true)
	if err != nil {
		return nil, err
	}
	first := unit % SegmentUnits
	if err := s.claim(ctx, first, n); err != nil {
		return nil, err
	}
	if err := s.lock(ctx, first, n); err != nil {
		s.unclaim(first, n)
		return nil, err
	}
	return func() {
		s.setLock(unix.F_UNLCK, first, n)
		s.unclaim(first, n)
	}, nil
}

// waited is the error of a claim that another one prevented until ctx ended.
func waited(ctx context.Context) error {
	return fmt.Errorf("wait for another reader that fetches the same data: %w", context.Cause(ctx))
}

// claim waits for others of this Blob.
func (s *segment) claim(ctx context.Context, first, n int64) error {
	for {
		s.mu.Lock()
		free := true
		for i := first; i < first+n; i++ {
			free = free && !s.claimed[i]
		}
		if free {
			for i := first; i < first+n; i++ {
				s.claimed[i] = true
			}
		}
		freed := s.freed
		s.mu.Unlock()
		if free {
			return nil
		}
		select {
		case <-freed:
		case <-ctx.Done():
			return waited(ctx)
		}
	}
}

func (s *segment) unclaim(first, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := first; i < first+n; i++ {
		s.claimed[i] = false
	}
	close(s.freed)
	s.freed = make(chan struct{})
}

// lock waits for other processes and other Blobs. There is no lock that can be waited for until a time.
func (s *segment) lock(ctx context.Context, first, n int64) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := s.setLock(unix.F_WRLCK, first, n)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return waited(ctx)
		}
	}
}

// setLock changes the lock on the records of units: one of the open file, which ends with it.
func (s *segment) setLock(kind int16, first, n int64) error {
	return unix.FcntlFlock(s.f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: first * recordBytes, Len: n * recordBytes})
}
