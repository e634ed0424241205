package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/test/e2e/faultfs"
)

// The concurrent mode: several connections, each with sectors of its own, write to the origin and to a snapshot, while
// snapshots are attached and dropped and merges begin, are paused and go on. Then the server ends, in any way, in the middle
// of it. Neighbouring sectors belong to different connections, so that they meet in chunks.

// version is one content of a sector, and when it was written.
type version struct {
	content    []byte
	began, end time.Time // end is zero if it was never acknowledged
}

// writer is a connection with its sectors.
type writer struct {
	r       *rand.Rand
	export  string
	sectors []int64
	mu      sync.Mutex
	// history has, by sectors, the last version that is durable, and all later ones; log has all of this life.
	history, log map[int64][]version
	writes       int
}

// run writes, reads and flushes until the connection ends, or stop is closed.
func (w *writer) run(socket string, stop <-chan struct{}) error {
	c, err := dial(socket, w.export, nil)
	if err != nil {
		return nil // killed before it was ready
	}
	defer c.kill()
	var n nbdError
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		s := w.sectors[w.r.IntN(len(w.sectors))]
		switch w.r.IntN(10) {
		default:
			w.writes++
			p := bytes.Repeat(fmt.Appendf(nil, "<%s.%d.%9d>", w.export, s, w.writes), 60)[:sectorSize]
			cmd, flags, payload := uint16(cmdWrite), uint16(0), p
			if w.r.IntN(8) == 0 {
				p, cmd, payload = make([]byte, sectorSize), cmdWriteZeroes, nil
			}
			if w.r.IntN(8) == 0 {
				flags = flagFUA
			}
			w.note(s, p)
			_, err := c.call(cmd, flags, s*sectorSize, sectorSize, payload)
			if errors.As(err, &n) && n != nbdESHUTDOWN {
				return fmt.Errorf("write of %s, sector %d: %w", w.export, s, err)
			} else if err != nil {
				return nil
			}
			w.acknowledged(s, flags == flagFUA)
		case 0:
			b, err := c.read(s*sectorSize, sectorSize)
			if errors.As(err, &n) && n != nbdESHUTDOWN {
				return fmt.Errorf("read of %s, sector %d: %w", w.export, s, err)
			} else if err != nil {
				return nil
			}
			if want := w.last(s); !bytes.Equal(b, want) {
				return fmt.Errorf("%s, sector %d holds %s, want %s", w.export, s, describe(b), describe(want))
			}
		case 1:
			if w.r.IntN(4) > 0 {
				continue
			}
			began := time.Now()
			err := c.flush()
			if errors.As(err, &n) && n != nbdESHUTDOWN {
				return fmt.Errorf("flush of %s: %w", w.export, err)
			} else if err != nil {
				return nil
			}
			w.flushed(began)
		}
	}
}

func (w *writer) note(s int64, p []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v := version{content: p, began: time.Now()}
	w.history[s] = append(w.history[s], v)
	if len(w.log[s]) == 0 { // what it was before
		w.log[s] = w.history[s][len(w.history[s])-2 : len(w.history[s])-1 : len(w.history[s])-1]
	}
	w.log[s] = append(w.log[s], v)
}

func (w *writer) acknowledged(s int64, durable bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := w.history[s]
	list[len(list)-1].end = time.Now()
	w.log[s][len(w.log[s])-1].end = list[len(list)-1].end
	if durable {
		w.history[s] = slices.Clone(list[len(list)-1:])
	}
}

func (w *writer) last(s int64) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := w.history[s]
	return list[len(list)-1].content
}

// flushed forgets what was overwritten before a flush that succeeded.
func (w *writer) flushed(began time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for s, list := range w.history {
		for i := len(list) - 1; i > 0; i-- {
			if end := list[i].end; !end.IsZero() && end.Before(began) {
				w.history[s] = slices.Clone(list[i:])
				break
			}
		}
	}
}

// during returns the contents that a snapshot may show that was made between from and to.
func (w *writer) during(s int64, from, to time.Time) (all [][]byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	log := w.log[s]
	if len(log) == 0 {
		log = w.history[s][len(w.history[s])-1:]
	}
	for _, v := range log {
		if v.began.After(to) {
			break
		}
		if !v.end.IsZero() && v.end.Before(from) {
			all = nil // it replaced what was before
		}
		all = append(all, v.content)
	}
	return all
}

// crowd is the world of the concurrent mode.
type crowd struct {
	seed    uint64
	r       *rand.Rand
	dir     string
	fs      *faultfs.FS
	origin  string
	cows    string
	writers []*writer
	size    int64
	first   []byte // what the origin held when the snapshot was made
	done    bool   // the snapshot was merged
}

const crowdSectors = 1024

// TestConcurrent is the concurrent mode. Its schedule is not repeatable, but the seed decides what is done.
func TestConcurrent(t *testing.T) {
	program()
	first, given := seedOf(t)
	if !given {
		first = uint64(time.Now().UnixNano())
	}
	end := time.Now().Add(budget(t) / 4)
	runs, writes := 0, 0
	for seed := first; seed == first || time.Now().Before(end) && !given; seed++ {
		c := &crowd{seed: seed, r: rand.New(rand.NewPCG(seed, 77)), size: crowdSectors * sectorSize, dir: newFolder(t)}
		l, err := c.live(t)
		runs += l
		for _, w := range c.writers {
			writes += w.writes
		}
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	t.Logf("%d runs, %d writes", runs, writes)
}

func (c *crowd) live(t *testing.T) (runs int, err error) {
	folder := c.dir
	if c.seed%3 > 0 {
		if err := os.Mkdir(c.dir+"/m", 0o700); err != nil {
			return 0, err
		}
		f, err := faultfs.Start(c.dir + "/m")
		switch {
		case errors.Is(err, faultfs.ErrUnavailable):
			t.Logf("SKIPPED power cuts: %v", err)
		case err != nil:
			return 0, err
		default:
			c.fs, folder = f, c.dir+"/m"
			defer func() { err = errors.Join(err, f.Close()) }()
			if err := errors.Join(f.Folder("o", 0), f.Folder("c", 0)); err != nil {
				return 0, err
			}
		}
	}
	if c.fs == nil {
		if err := errors.Join(os.Mkdir(folder+"/o", 0o700), os.Mkdir(folder+"/c", 0o700)); err != nil {
			return 0, err
		}
	}
	c.origin, c.cows = folder+"/o/disk", folder+"/c"
	c.first = bytes.Repeat([]byte("the origin's own"), int(c.size)/16)
	if err := writeDurably(c.origin, c.first); err != nil {
		return 0, err
	}
	if o := run("create", c.origin, c.cows+"/s.cow", "--chunk-size", chunkSizes[c.r.IntN(len(chunkSizes))]); o.status != 0 {
		return 0, errors.New(o.String())
	}
	for i := range 4 {
		w := &writer{r: rand.New(rand.NewPCG(c.seed, uint64(i))), export: []string{"origin", "s"}[i%2], history: map[int64][]version{}}
		for s := int64(i); s < crowdSectors; s += 4 {
			w.sectors = append(w.sectors, s)
			w.history[s] = []version{{content: c.first[:sectorSize]}}
		}
		c.writers = append(c.writers, w)
	}
	for range 3 {
		runs++
		if merged, err := c.life(); err != nil || merged {
			return runs, err
		}
	}
	return runs, nil
}

func writeDurably(path string, p []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	return errors.Join(err, f.Sync(), f.Close(), syncDir(filepath.Dir(path)))
}

// life is one run of the server. merged: the snapshot was merged, which ends the test.
func (c *crowd) life() (merged bool, err error) {
	args := []string{c.origin, "--export-origin", "s=" + c.cows + "/s.cow"}
	if c.r.IntN(3) == 0 {
		args = append(args, "--sync", "always")
	}
	s, err := serve(c.dir, args...)
	if err != nil {
		return false, err
	}
	defer s.kill()
	stop, stopOrigin := make(chan struct{}), make(chan struct{})
	failed := make(chan error, len(c.writers))
	var all, ofOrigin sync.WaitGroup
	for _, w := range c.writers {
		w.log = map[int64][]version{}
		if w.export == "origin" {
			ofOrigin.Go(func() { failed <- w.run(s.socket, stopOrigin) })
		} else {
			all.Go(func() { failed <- w.run(s.socket, stop) })
		}
	}
	endOrigin := sync.OnceFunc(func() { close(stopOrigin); ofOrigin.Wait() })
	merging, err := c.control(s, endOrigin)
	how := []string{"term", "kill", "cut"}[c.r.IntN(3)]
	if how == "cut" && c.fs == nil {
		how = "kill"
	}
	status := 0
	var ending error
	switch how {
	case "term":
		status, ending = s.terminate()
	case "kill":
		s.kill()
	case "cut":
		ending = c.fs.PowerOff()
		s.kill()
	}
	endOrigin()
	close(stop)
	all.Wait()
	close(failed)
	for e := range failed {
		if how == "cut" && errors.Is(e, nbdError(nbdEIO)) {
			continue // the disks went before the server
		}
		err = errors.Join(err, e)
	}
	if how == "cut" {
		_, e := c.fs.PowerOn(c.r.Uint64())
		ending = errors.Join(ending, e)
	}
	if status != 0 {
		ending = errors.Join(ending, fmt.Errorf("SIGTERM: status %d", status))
	}
	if err = errors.Join(err, ending); err != nil {
		return false, fmt.Errorf("%s: %w\n%.5000s", how, err, s.log())
	}
	return merging, c.look(how, merging)
}

// control attaches and drops snapshots while the writers write, and then begins a merge now and then.
func (c *crowd) control(s *server, endOrigin func()) (merging bool, err error) {
	for i := range 1 + c.r.IntN(4) {
		time.Sleep(time.Duration(c.r.IntN(40)) * time.Millisecond) // when it happens is up to chance
		if err := c.passing(s, fmt.Sprintf("x%d", i)); err != nil {
			return false, err
		}
	}
	if c.r.IntN(3) > 0 {
		return false, nil
	}
	// Both exports are one disk from the beginning of the merge on: what was written to the origin is lost.
	endOrigin()
	if err := s.api("POST", "merge", map[string]any{"name": "s"}, nil); err != nil {
		return true, fmt.Errorf("merge: %w", err)
	}
	o, err := dial(s.socket, "origin", nil)
	if err != nil {
		return true, err
	}
	defer o.kill()
	for range c.r.IntN(6) {
		how := []string{"merge/pause", "merge/resume", "merge/resume"}[c.r.IntN(3)]
		if err := s.api("POST", how, nil, nil); err != nil {
			return true, fmt.Errorf("%s: %w", how, err)
		}
		b, err := o.read(0, c.size)
		if err != nil {
			return true, err
		}
		for _, w := range c.writers {
			for _, sector := range w.sectors {
				if got := b[sector*sectorSize : (sector+1)*sectorSize]; w.export == "origin" && !bytes.Equal(got, c.first[:sectorSize]) {
					return true, fmt.Errorf("the origin under merge, sector %d holds %s, want %s", sector, describe(got), describe(c.first[:sectorSize]))
				}
			}
		}
		time.Sleep(time.Duration(c.r.IntN(15)) * time.Millisecond)
	}
	if c.r.IntN(2) == 0 {
		var m mergeStatus
		if err := errors.Join(s.api("POST", "merge/resume", nil, nil), s.api("GET", "merge?wait=40", nil, &m)); err != nil || m.State != "done" {
			return true, fmt.Errorf("the merge ends as %+v, %v", m, err)
		}
		c.done = true
	}
	return true, nil
}

// passing attaches a snapshot, compares it with what the origin may have been, twice, and drops it.
func (c *crowd) passing(s *server, name string) error {
	path := c.cows + "/" + name + ".cow"
	from := time.Now()
	err := s.api("POST", "snapshots", map[string]any{"name": name, "cow": path, "create": true}, nil)
	to := time.Now()
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	want := map[int64][][]byte{}
	for _, w := range c.writers {
		if w.export == "origin" {
			for _, sector := range w.sectors {
				want[sector] = w.during(sector, from, to)
			}
		}
	}
	conn, err := dial(s.socket, name, allContexts)
	if err != nil {
		return err
	}
	defer conn.kill()
	var shown []byte
	for round := range 2 {
		b, err := conn.read(0, c.size)
		if err != nil {
			return err
		}
		if round == 0 {
			shown = b
			for sector, list := range want {
				got := b[sector*sectorSize : (sector+1)*sectorSize]
				if !slices.ContainsFunc(list, func(x []byte) bool { return bytes.Equal(x, got) }) {
					return fmt.Errorf("snapshot %s, sector %d holds %s, want one of %d, the last %s", name, sector, describe(got), len(list), describe(list[len(list)-1]))
				}
			}
		} else if !bytes.Equal(b, shown) {
			return fmt.Errorf("snapshot %s has changed", name)
		}
		if err := zeroExtents(conn, shown); err != nil {
			return fmt.Errorf("snapshot %s: %w", name, err)
		}
		time.Sleep(time.Duration(c.r.IntN(30)) * time.Millisecond)
	}
	if err := s.api("DELETE", "snapshots/"+name, nil, nil); err != nil {
		return fmt.Errorf("drop: %w", err)
	}
	return os.Remove(path)
}

// zeroExtents checks that block status calls nothing zero that is not.
func zeroExtents(c *conn, shown []byte) error {
	for at := int64(0); at < int64(len(shown)); {
		a, err := c.call(cmdBlockStatus, 0, at, int64(len(shown))-at, nil)
		if err != nil {
			return err
		}
		for _, e := range a.extents["base:allocation"] {
			if e.flags&2 != 0 && len(bytes.Trim(shown[at:at+e.n], "\x00")) > 0 {
				return fmt.Errorf("%d+%d is called zero and is not", at, e.n)
			}
			at += e.n
		}
	}
	return nil
}

// look looks at the disks after the server has ended.
func (c *crowd) look(how string, merging bool) error {
	if o := run("check", c.cows+"/s.cow", "--level", "error"); o.status != 0 {
		return errors.New(o.String())
	}
	o := run("export", c.origin, c.cows+"/s.cow", "-")
	if o.status != 0 {
		return errors.New(o.String())
	}
	origin, err := os.ReadFile(c.origin)
	if err != nil {
		return err
	}
	list, err := filepath.Glob(c.cows + "/x*")
	if err != nil {
		return err
	}
	for _, path := range list { // their attach was cut short
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	shown := map[string][]byte{"s": []byte(o.out), "origin": origin}
	if c.done && !bytes.Equal(shown["s"], origin) {
		return fmt.Errorf("%s: the snapshot was merged and is not what the origin is", how)
	}
	for _, w := range c.writers {
		b := shown[w.export]
		for _, s := range w.sectors {
			if merging && w.export == "origin" {
				break
			}
			got := b[s*sectorSize : (s+1)*sectorSize]
			l := w.history[s]
			i := len(l) - 1 // the newest that it can be
			for i >= 0 && !bytes.Equal(l[i].content, got) {
				i--
			}
			replaced := i >= 0 && slices.ContainsFunc(l[i+1:], func(v version) bool { return !v.end.IsZero() })
			if i < 0 || how == "term" && replaced {
				return fmt.Errorf("%s: %s, sector %d holds %s, flushed was %s, %d later ones", how, w.export, s, describe(got), describe(l[0].content), len(l)-1)
			}
			if how == "kill" { // what is found may still get lost
				w.history[s] = append(slices.Delete(l, i, i+1), version{content: got, end: time.Now()})
			} else {
				w.history[s] = []version{{content: got}}
			}
		}
		if w.export == "origin" { // the snapshot shows these as they were
			for _, s := range w.sectors {
				if !bytes.Equal(shown["s"][s*sectorSize:(s+1)*sectorSize], c.first[:sectorSize]) {
					return fmt.Errorf("%s: the snapshot shows an origin write in sector %d", how, s)
				}
			}
		}
	}
	return nil
}
