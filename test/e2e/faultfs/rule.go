package faultfs

import (
	"path"
	"syscall"
)

// Op is a kind of call that a [Rule] is about.
type Op string

const (
	Read     Op = "read"
	Write    Op = "write"
	Fsync    Op = "fsync"    // fsync and fdatasync of a file, and the flush of a write with RWF_DSYNC
	Allocate Op = "allocate" // fallocate that reserves space
	Punch    Op = "punch"    // fallocate that makes holes or zeros
	Truncate Op = "truncate"
	Create   Op = "create"
	Rename   Op = "rename" // rename and link
	Remove   Op = "remove"
	SyncDir  Op = "syncdir"

	Change Op = "change" // of a Rule: any of them but Read
)

// Rule makes calls fail or wait. A failed fsync loses what was not flushed, see [FS]; all other calls that
// fail change nothing.
type Rule struct {
	Op    Op
	File  string        // pattern of path.Match for the file's name; of the directory's for SyncDir
	Errno syscall.Errno // 0 with Hang or Short alone
	Skip  int           // so many calls pass first
	Every int           // of the later ones each Every-th is meant; 0 or 1: all
	Count int           // so many are meant; 0: all
	Short int           // of Write: writes the given number of bytes and reports that
	Hang  bool          // waits for Release before anything else
}

// Hit is a call that a rule applied to.
type Hit struct {
	Op    Op
	File  string
	Errno syscall.Errno
}

type rule struct {
	Rule
	calls, met int
}

// meets reports whether the rule applies to a call, and counts the call.
func (r *rule) meets(op Op, name string) bool {
	if r.Op != op && (r.Op != Change || op == Read) || r.Count > 0 && r.met >= r.Count {
		return false
	}
	if ok, _ := path.Match(r.File, name); !ok {
		return false
	}
	r.calls++
	n := r.calls - r.Skip
	if n <= 0 || r.Every > 1 && n%r.Every != 0 {
		return false
	}
	r.met++
	return true
}

// enter begins a call: it applies the first rule that is about it. On return v.mu is held; short is the
// number of bytes a write is to be cut to, or -1.
func (v *volume) enter(op Op, name string) (errno syscall.Errno, short int) {
	v.mu.Lock()
	short = -1
	if v.off {
		return syscall.EIO, short
	}
	for _, r := range v.rules {
		if !r.meets(op, name) {
			continue
		}
		v.hits = append(v.hits, Hit{op, name, r.Errno})
		if r.Hang {
			v.hanging++
			released := v.release
			v.mu.Unlock()
			<-released
			v.mu.Lock()
			v.hanging--
			if v.off {
				return syscall.EIO, short
			}
		}
		if r.Short > 0 && r.Errno == 0 {
			short = r.Short
		}
		return r.Errno, short
	}
	return 0, short
}

// releaseAll lets the calls that hang go on. v.mu is held.
func (v *volume) releaseAll() {
	close(v.release)
	v.release = make(chan struct{})
}
