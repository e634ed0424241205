package block

import (
	"errors"
	"math"

	"golang.org/x/sys/unix"
)

// A Read is one of several reads that a device executes together; see [CacheReader].
type Read struct {
	P    []byte
	Off  int64
	Done bool // P holds the bytes at Off
}

// A CacheReader can execute several reads at once, in fewer system calls than as many calls of ReadAt, as far as that
// takes no waiting for a disk.
//
// ReadCached fills the P of those reads whose bytes are in memory and sets Done. What it leaves is for ReadAt, which
// returns the error where there is one: the P of such a read may hold anything. A read that is outside of the device, or done
// already, is left as it is. It returns how many it has done.
type CacheReader interface {
	ReadCached(reads []Read) int
}

// ReadCached executes reads together where dev can; see [CacheReader].
func ReadCached(dev Device, reads []Read) int {
	if c, ok := dev.(CacheReader); ok {
		return c.ReadCached(reads)
	}
	return 0
}

// ReadAll executes all reads: together what is in memory, the rest one after the other.
func ReadAll(dev Device, reads []Read) error {
	if len(reads) > 1 && ReadCached(dev, reads) == len(reads) {
		return nil
	}
	for i := range reads {
		if r := &reads[i]; !r.Done {
			if _, err := dev.ReadAt(r.P, r.Off); err != nil {
				return err
			}
			r.Done = true
		}
	}
	return nil
}

// ReadCached reads what is in the page cache by asynchronous I/O with RWF_NOWAIT, which for cached bytes is synchronous: many
// reads are one system call.
func (f *File) ReadCached(reads []Read) int {
	if len(reads) < 2 || f.lacks[cachedReads].Load() || f.enter("read", 0, 0) != nil {
		return 0
	}
	defer f.life.RUnlock()
	q := getQueue()
	if q == nil {
		f.lacks[cachedReads].Store(!canQueue())
		return 0
	}
	defer q.put()
	size := f.Size()
	done, can := q.execute(reads, func(i int) int {
		if r := &reads[i]; CheckRange("read", r.Off, int64(len(r.P)), size) != nil {
			return -1
		}
		return f.fd
	})
	if !can {
		f.lacks[cachedReads].Store(true)
	}
	return done
}

// ReadCachedFiles is [File.ReadCached] of several files: files has the descriptor of the file of each of the reads, or -1 where it is to be
// left. can is false where the file system of one of them has no such reads. The caller keeps the files open.
func ReadCachedFiles(files []int, reads []Read) (done int, can bool) {
	q := getQueue()
	if q == nil {
		return 0, canQueue()
	}
	defer q.put()
	return q.execute(reads, func(i int) int { return files[i] })
}

// execute executes reads by q, each of the file that fd returns, unless that is negative. can is false where one can't be executed so at
// all.
func (q *queue) execute(reads []Read, fd func(i int) int) (done int, can bool) {
	can = true
	for from := 0; from < len(reads); from += queueLength {
		q.n = 0
		for i := from; i < min(from+queueLength, len(reads)); i++ {
			if r := &reads[i]; !r.Done && len(r.P) > 0 && int64(len(r.P)) <= math.MaxInt32 {
				if file := fd(i); file >= 0 {
					q.read(file, r.P, r.Off, i)
				}
			}
		}
		q.run(func(i int, n int64, err error) {
			switch {
			case errors.Is(err, unix.EOPNOTSUPP):
				can = false
			case err == nil && n == int64(len(reads[i].P)):
				reads[i].Done = true
				done++
			}
		})
	}
	return done, can
}
