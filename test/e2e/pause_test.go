package e2e_test

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/test/e2e/faultfs"
)

// A merge that is refused leaves the policy as it was.
func TestRefusedMergeKeepsPause(t *testing.T) {
	const size = 4 << 20
	r := newRig(t, size, 0, "p")
	r.serve([]string{"p"}, "--on-full", "pause")
	r.must(os.WriteFile(r.cow("n"), make([]byte, 64<<10), 0o600))
	r.must(r.s.api("POST", "snapshots", map[string]any{"name": "n", "cow": r.cow("n"), "store": "N"}, nil))
	if err := r.merge("n"); err == nil {
		t.Fatal("a merge of a transient store was not refused")
	}
	c := r.dial("n")
	for i := range int64(40) {
		_, err := c.send(cmdWrite, 0, i*4096, 4096, fill('x', 4096))
		r.must(err)
	}
	for i := 0; ; i++ {
		a, err := c.receive(time.Second)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		r.must(err)
		if a.err != nil {
			t.Fatalf("write %d does not wait: %v", i, a.err)
		}
	}
	r.terminate(0)
}

// ends; nothing that is done meanwhile waits for them.
func TestPausedWritesEnd(t *testing.T) {
	const size = 2 << 20
	for _, how := range []string{"term", "vanish", "drop", "merge", "grow", "attach another", "drop another"} {
		for _, side := range []string{"v", "origin"} {
			t.Run(how+","+side, func(t *testing.T) {
				r := newRig(t, size, size, "w")
				r.create("v", "--cow-size", "256KiB")
				r.serve([]string{"v", "w"}, "--on-full", "pause")
				// More chunks than there is space for.
				const conns, each = 3, 30
				var list []*conn
				for i := range conns {
					c := r.dial(side)
					for k := range each {
						_, err := c.send(cmdWrite, 0, int64(i*each+k)*4096, 4096, fill('q', 4096))
						r.must(err)
					}
					list = append(list, c)
				}
				r.waitFull("v")
				began := time.Now()
				answered := false // all of them, before the end of the server
				switch how {
				case "vanish":
					for _, c := range list {
						c.kill()
					}
					time.Sleep(100 * time.Millisecond)
				case "drop":
					r.must(r.s.api("DELETE", "snapshots/v", nil, nil))
					answered = true
				case "merge":
					r.must(r.merge("v"))
					if m := r.mergeState("20"); m.State != "done" {
						t.Errorf("the merge is %+v", m)
					}
					answered = true
				case "grow":
					r.must(r.s.api("POST", "snapshots/v/grow", map[string]any{"size": 8 << 20}, nil))
					answered = true
				case "attach another":
					r.must(r.s.api("POST", "snapshots", map[string]any{"name": "x", "cow": r.cow("x"), "create": true}, nil))
				case "drop another":
					r.must(r.s.api("DELETE", "snapshots/w", nil, nil))
				}
				if d := time.Since(began); d > 10*time.Second {
					t.Errorf("it took %v", d)
				}
				if answered {
					r.answers(list, each, how)
				}
				r.terminate(0)
				if !answered && how != "vanish" {
					r.answers(list, each, "term")
				}
				for _, name := range []string{"v", "w"} {
					r.run(0, "check", r.cow(name))
				}
				if side == "origin" && how != "drop another" && how != "merge" {
					r.rightOrInvalid("w", r.past(size))
				}
			})
		}
	}
}

// waitFull waits until the API says that a COW device is full.
func (r *rig) waitFull(name string) {
	r.t.Helper()
	for late := time.Now().Add(10 * time.Second); !r.state(name).Full; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(late) {
			r.t.Fatal("nothing waits for space")
		}
	}
}

// all succeed.
func (r *rig) answers(list []*conn, each int, how string) {
	r.t.Helper()
	for _, c := range list {
		for range each {
			a, err := c.receive(20 * time.Second)
			if err != nil {
				if c.export == "v" || how == "term" {
					break // the connection may be closed behind the answers that are due
				}
				r.t.Errorf("%s: %v", how, err)
				return
			}
			switch {
			case a.err == nil:
			case errors.Is(a.err, nbdError(nbdESHUTDOWN)) && (how == "term" || how == "drop" && c.export == "v"):
			default:
				r.t.Errorf("%s: a write to %s was answered with %v", how, c.export, a.err)
				return
			}
		}
	}
}

// A write that waited for space on a closed connection is never executed: not after a newer one that was acknowledged.
func TestVanishedWriteIsNotExecuted(t *testing.T) {
	const size = 1 << 20
	for round := range 4 {
		r := newRig(t, size, size)
		r.create("v", "--cow-size", "128KiB")
		r.serve([]string{"v"}, "--on-full", "pause")
		filler := r.dial("v")
		for i := range int64(40) {
			_, err := filler.send(cmdWrite, 0, i*4096, 4096, fill('f', 4096))
			r.must(err)
		}
		r.waitFull("v")
		old := r.dial("v")
		_, err := old.send(cmdWrite, 0, 512<<10, 4096, fill('O', 4096))
		r.must(err)
		time.Sleep(50 * time.Millisecond)
		old.kill()
		time.Sleep(time.Duration(round*50) * time.Millisecond)
		fresh := r.dial("v")
		_, err = fresh.send(cmdWrite, 0, 512<<10, 4096, fill('N', 4096))
		r.must(err)
		time.Sleep(50 * time.Millisecond)
		r.must(r.s.api("POST", "snapshots/v/grow", map[string]any{"size": 8 << 20}, nil))
		a, err := fresh.receive(20 * time.Second)
		r.must(errors.Join(err, a.err))
		time.Sleep(100 * time.Millisecond)
		b, err := fresh.read(512<<10, 4096)
		r.must(err)
		if b[0] != 'N' {
			t.Errorf("round %d: an older write than the acknowledged one is read: %q", round, b[:1])
		}
		r.terminate(0)
	}
}

// A rewrite of a trimmed chunk needs space as well: it waits, with the same policy.
func TestPausedRewriteOfTrimmedChunk(t *testing.T) {
	const size = 8 << 20
	r := newRig(t, size, 0, "v")
	r.serve([]string{"v"}, "--on-full", "pause")
	c := r.dial("v")
	for i := range int64(64) {
		r.must(c.write(i*4096, fill('x', 4096), 0))
	}
	r.must(c.flush())
	_, err := c.call(cmdTrim, 0, 0, 64*4096, nil)
	r.must(err)
	r.must(c.flush())
	used, err := r.fs.Used("c")
	r.must(err)
	r.must(r.fs.Folder("c", used))
	_, err = c.send(cmdWrite, 0, 0, 4096, fill('y', 4096))
	r.must(err)
	if a, err := c.receive(time.Second); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("it does not wait: %v, %v", a.err, err)
	}
	r.must(r.fs.Folder("c", 0))
	a, err := c.receive(20 * time.Second)
	r.must(errors.Join(err, a.err))
	if b, err := c.read(0, 4096); err != nil || b[0] != 'y' {
		t.Errorf("read %q, %v", b[:1], err)
	}
	r.terminate(0)
	r.run(0, "check", r.cow("v"))
}

// says that it failed.
func TestAreaWriteWithoutRoom(t *testing.T) {
	const size = 1 << 20
	for _, op := range []faultfs.Op{faultfs.Write, faultfs.Fsync} {
		for skip := range 3 {
			t.Run(fmt.Sprint(op, skip), func(t *testing.T) {
				r := newRig(t, size, size, "v")
				r.serve([]string{"v"}, "--on-full", "pause")
				c := r.dial("v")
				r.must(c.write(0, fill('a', 4096), 0))
				r.must(c.flush())
				want := r.past(size)
				copy(want, fill('a', 4096))
				r.inject(faultfs.Rule{Op: op, File: "v.cow", Errno: enospc, Count: 1, Skip: skip})
				var last error
				for i := int64(1); i < 4; i++ {
					_, err := c.send(cmdWrite, 0, i*8192, 4096, fill('b', 4096))
					r.must(err)
					a, err := c.receive(10 * time.Second)
					if err != nil {
						t.Fatalf("a write waits though there is space; the snapshot is %+v", r.state("v"))
					}
					if a.err == nil {
						copy(want[i*8192:], fill('b', 4096))
					}
					last = a.err
					_, err = c.send(cmdFlush, 0, 0, 0, nil)
					r.must(err)
					if a, err = c.receive(10 * time.Second); err != nil {
						t.Fatalf("a flush waits though there is space; the snapshot is %+v", r.state("v"))
					}
					last = errors.Join(last, a.err)
				}
				if st := r.state("v"); last != nil && st.State == "ok" {
					t.Errorf("writes fail (%v), and the snapshot is %q", last, st.State)
				}
				r.terminate(0, 2)
				if last == nil {
					r.rightOrInvalid("v", want)
				}
				r.run(0, "check", "--level", "error", r.cow("v"))
			})
		}
	}
}
