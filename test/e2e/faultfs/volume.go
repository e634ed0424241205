package faultfs

import (
	"math/rand/v2"
	"slices"
	"sort"
	"sync"
	"syscall"
)

const (
	sectorSize = 512
	pageSize   = 4096
)

// maxVersions bounds the contents that are remembered for one sector between two flushes.
const maxVersions = 4

// volume is the content of the file system: top-level directories with files. It outlives mounts. The mutex protects
// everything; methods whose comment says so expect it to be held.
type volume struct {
	mu      sync.Mutex
	nextIno uint64
	folders map[string]*folder
	rules   []*rule
	hits    []Hit
	off     bool          // the power is off: every call fails
	release chan struct{} // closed to release the calls that hang
	hanging int
}

// directory is a top-level directory. It has a limit of its own, as if it were a file system of its own.
type folder struct {
	name    string
	ino     uint64
	limit   int64 // bytes that its files may occupy; 0: no limit
	names   map[string]*file
	durable map[string]*file // the names after a power cut
	log     []nameChange     // since the last fsync of the directory
}

// nameChange is one atomic change of names: a name that is gone and one that is there, either may be "".
type nameChange struct {
	gone, here string
	file       *file
}

// file is a regular file.
type file struct {
	ino           uint64
	mode          uint32
	uid, gid      uint32
	current, disk content
	// dirty has the sectors in which current may differ from disk, with contents that were
	// overwritten since the last flush: each of them may have reached the disk.
	dirty map[int64][]sector
}

type (
	sector [sectorSize]byte
	page   [pageSize]byte
)

// content is what a file holds, in pages. A page that is missing is a hole, a nil one is reserved space;
// both read as zeros.
type content struct {
	size  int64
	pages map[int64]*page
}

func newVolume() *volume {
	return &volume{nextIno: 2, folders: map[string]*folder{}, release: make(chan struct{})}
}

// folder returns the directory of that name, which it makes if there is none.
func (v *volume) folder(name string) *folder {
	d := v.folders[name]
	if d == nil {
		d = &folder{name: name, ino: v.ino(), names: map[string]*file{}, durable: map[string]*file{}}
		v.folders[name] = d
	}
	return d
}

func (v *volume) ino() uint64 {
	v.nextIno++
	return v.nextIno
}

func (v *volume) newFile(mode, uid, gid uint32) *file {
	return &file{ino: v.ino(), mode: mode & 0o7777, uid: uid, gid: gid,
		current: content{pages: map[int64]*page{}}, disk: content{pages: map[int64]*page{}}, dirty: map[int64][]sector{}}
}

func (c *content) sector(n int64) (s sector) {
	if p := c.pages[n/(pageSize/sectorSize)]; p != nil {
		copy(s[:], p[n%(pageSize/sectorSize)*sectorSize:])
	}
	return s
}

func (c *content) setSector(n int64, s *sector) {
	at := n / (pageSize / sectorSize)
	p := c.pages[at]
	if p == nil {
		if _, reserved := c.pages[at]; !reserved && *s == (sector{}) {
			return
		}
		p = new(page)
		c.pages[at] = p
	}
	copy(p[n%(pageSize/sectorSize)*sectorSize:], s[:])
}

// read fills p with what is at off, as far as the file reaches.
func (c *content) read(p []byte, off int64) int {
	if off >= c.size {
		return 0
	}
	n := int(min(int64(len(p)), c.size-off))
	clear(p[:n])
	for done := 0; done < n; {
		at := off + int64(done)
		part := min(n-done, int(pageSize-at%pageSize))
		if pg := c.pages[at/pageSize]; pg != nil {
			copy(p[done:done+part], pg[at%pageSize:])
		}
		done += part
	}
	return n
}

// setSize cuts the content off or makes it longer.
func (c *content) setSize(size int64) {
	if size < c.size {
		for at := range c.pages {
			if at*pageSize >= size {
				delete(c.pages, at)
			}
		}
		if p := c.pages[size/pageSize]; p != nil {
			clear(p[size%pageSize:])
		}
	}
	c.size = size
}

// used is the space that the files of a directory occupy, in bytes.
func (d *folder) used() (n int64) {
	for _, f := range d.names {
		n += int64(len(f.current.pages)) * pageSize
	}
	return n
}

// room returns how many pages from first up to and including last can be written or reserved: those that are there, and
// as many others as the directory's limit leaves.
func (d *folder) room(f *file, first, last int64) (n int64) {
	left := int64(1) << 40
	if d.limit > 0 {
		left = (d.limit - d.used()) / pageSize
	}
	for at := first; at <= last; at++ {
		if _, has := f.current.pages[at]; !has {
			if left <= 0 {
				break
			}
			left--
		}
		n++
	}
	return n
}

// touch notes that a range is about to change.
func (f *file) touch(off, n int64) {
	for s := off / sectorSize; s*sectorSize < off+n; s++ {
		old, again := f.dirty[s]
		if again && len(old) < maxVersions {
			old = append(old, f.current.sector(s))
		}
		f.dirty[s] = old
	}
}

// write writes data at off, as much of it as there is space for.
func (d *folder) write(f *file, data []byte, off int64) (int, syscall.Errno) {
	if len(data) == 0 {
		return 0, 0
	}
	first, last := off/pageSize, (off+int64(len(data))-1)/pageSize
	if n := d.room(f, first, last); n < last-first+1 {
		end := (first + n) * pageSize
		if end <= off {
			return 0, syscall.ENOSPC
		}
		data = data[:end-off]
	}
	f.touch(off, int64(len(data)))
	for done := 0; done < len(data); {
		at := off + int64(done)
		p := f.current.pages[at/pageSize]
		if p == nil {
			p = new(page)
			f.current.pages[at/pageSize] = p
		}
		done += copy(p[at%pageSize:], data[done:])
	}
	f.current.size = max(f.current.size, off+int64(len(data)))
	return len(data), 0
}

// reserve allocates space without changing what is read.
func (d *folder) reserve(f *file, off, n int64) syscall.Errno {
	first, last := off/pageSize, (off+n-1)/pageSize
	if d.room(f, first, last) < last-first+1 {
		return syscall.ENOSPC
	}
	for at := first; at <= last; at++ {
		if _, has := f.current.pages[at]; !has {
			f.current.pages[at] = nil
		}
	}
	return 0
}

// punch makes a range read as zeros. Whole pages become holes, or stay reserved.
func (f *file) punch(off, n int64, keep bool) {
	end := min(off+n, f.current.size)
	if end <= off {
		return
	}
	f.touch(off, end-off)
	for at := off; at < end; {
		part := min(end-at, pageSize-at%pageSize)
		_, has := f.current.pages[at/pageSize]
		switch {
		case part == pageSize && keep && has:
			f.current.pages[at/pageSize] = nil
		case part == pageSize:
			delete(f.current.pages, at/pageSize)
		case f.current.pages[at/pageSize] != nil:
			clear(f.current.pages[at/pageSize][at%pageSize : at%pageSize+part])
		}
		at += part
	}
}

// truncate is ftruncate.
func (f *file) truncate(size int64) {
	if size < f.current.size {
		f.touch(size, f.current.size-size)
	}
	f.current.setSize(size)
}

// sync makes the content durable.
func (f *file) sync() {
	for s := range f.dirty {
		at := s / (pageSize / sectorSize)
		if p, has := f.current.pages[at]; !has || p == nil {
			delete(f.disk.pages, at) // all of its sectors read as zeros
			continue
		}
		b := f.current.sector(s)
		f.disk.setSector(s, &b)
	}
	f.disk.setSize(f.current.size)
	clear(f.dirty)
}

// lose is what a failed fsync does on Linux: what was dirty is not on the disk and counts as clean. The
// kernel's page cache still has it, until it drops the pages; this side has what the disk has.
func (f *file) lose() {
	for s := range f.dirty {
		b := f.disk.sector(s)
		f.current.setSector(s, &b)
	}
	clear(f.dirty)
}

// cut is a power cut: of each sector that was not flushed any version may be on the disk.
func (f *file) cut(r *rand.Rand) (lost int) {
	odds := []float64{0, 0.1, 0.5, 0.9, 1}[r.IntN(5)] // that a sector reached the disk
	if f.current.size != f.disk.size && r.Float64() < odds {
		f.disk.setSize(f.current.size)
	}
	list := make([]int64, 0, len(f.dirty))
	for s := range f.dirty {
		list = append(list, s)
	}
	slices.Sort(list)
	for _, s := range list {
		if s*sectorSize >= f.disk.size || r.Float64() >= odds {
			lost++
			continue
		}
		b := f.current.sector(s)
		if old := f.dirty[s]; len(old) > 0 && r.IntN(4) == 0 {
			b = old[r.IntN(len(old))]
		}
		f.disk.setSector(s, &b)
	}
	f.current = content{size: f.disk.size, pages: map[int64]*page{}}
	for at, p := range f.disk.pages {
		b := *p
		f.current.pages[at] = &b
	}
	clear(f.dirty)
	return lost
}

// change makes a change of names.
func (d *folder) change(c nameChange) {
	apply(d.names, c)
	d.log = append(d.log, c)
}

func apply(names map[string]*file, c nameChange) {
	if c.gone != "" {
		delete(names, c.gone)
	}
	if c.here != "" {
		names[c.here] = c.file
	}
}

// syncNames makes the directory's names durable.
func (d *folder) syncNames() {
	for _, c := range d.log {
		apply(d.durable, c)
	}
	d.log = nil
}

// cut is a power cut for the names: of the changes that were not flushed the first few survive.
func (d *folder) cut(r *rand.Rand) {
	d.log = d.log[:r.IntN(len(d.log)+1)]
	d.syncNames()
	d.names = map[string]*file{}
	for name, f := range d.durable {
		d.names[name] = f
	}
}

// cut is a power cut for everything. What survives depends on the seed and the calls before. It returns
// how many unflushed sectors are lost.
func (v *volume) cut(seed uint64) (lost int) {
	r := rand.New(rand.NewPCG(seed, 0xc07))
	for _, d := range v.sorted() {
		d.cut(r)
		names := make([]string, 0, len(d.names))
		for name := range d.names {
			names = append(names, name)
		}
		sort.Strings(names)
		for _, name := range names {
			lost += d.names[name].cut(r)
		}
	}
	return lost
}

// sorted returns the directories by name.
func (v *volume) sorted() []*folder {
	list := make([]*folder, 0, len(v.folders))
	for _, d := range v.folders {
		list = append(list, d)
	}
	slices.SortFunc(list, func(a, b *folder) int {
		if a.name < b.name {
			return -1
		}
		return 1
	})
	return list
}
