package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/test/e2e/faultfs"
)

// snapshot shows its past or is marked invalid, what was flushed is on the origin, and the failure is not a secret.
func TestCOWFlushFails(t *testing.T) {
	const size = 256 << 10
	for _, policy := range []string{"fail", "pause", "invalidate"} {
		for _, sync := range []string{"flush", "always"} {
			for skip := range 2 {
				for _, end := range []string{"term", "kill", "cut"} {
					t.Run(fmt.Sprintf("%s,%s,%d,%s", policy, sync, skip, end), func(t *testing.T) {
						r := newRig(t, size, size, "v")
						r.serve([]string{"v"}, "--on-full", policy, "--sync", sync)
						o, v := r.dial("origin"), r.dial("v")
						r.must(v.write(0, fill('V', 512), 0))
						r.must(v.flush())
						want := r.past(size)
						copy(want, fill('V', 512))
						r.inject(faultfs.Rule{Op: faultfs.Fsync, File: "v.cow", Errno: eio, Count: 1, Skip: skip})
						for i := range int64(4) {
							if err := o.write(8192*(i+1), fill('B', 8192), 0); err != nil && !errors.As(err, new(nbdError)) {
								t.Fatal(err)
							}
						}
						flushed := o.flush() == nil
						if hits, err := r.fs.Hits(); err != nil || len(hits) == 0 {
							t.Fatalf("nothing was injected: %v", err)
						}
						if st := r.state("v"); st.State == "ok" {
							t.Errorf("the API calls the snapshot %q", st.State)
						}
						switch end {
						case "term":
							status, err := r.s.terminate()
							r.must(err)
							if log := r.s.log(); !strings.Contains(log, "v.cow") && !strings.Contains(log, "input/output error") {
								t.Errorf("the log names no cause: %s", log)
							}
							if r.s = nil; status != 2 {
								t.Errorf("SIGTERM: status %d, want 2: a snapshot was lost", status)
							}
						case "kill":
							r.kill()
						case "cut":
							r.cut(uint64(skip))
						}
						r.rightOrInvalid("v", want)
						if flushed {
							r.originHolds(fill('B', 8192*4), 8192)
						}
						r.serve([]string{"v"})
						if st := r.state("v"); st.Valid {
							got, err := r.dial("v").read(0, size)
							if err != nil || !bytes.Equal(got, want) {
								t.Errorf("restarted: the snapshot is %q and shows something else (%v)", st.State, err)
							}
						}
						r.terminate(0)
					})
				}
			}
		}
	}
}

// can be neither kept nor marked; the snapshot can be dropped, and then the origin goes on.
func TestCOWFlushAlwaysFails(t *testing.T) {
	const size = 256 << 10
	for _, policy := range []string{"fail", "pause"} {
		for _, end := range []string{"kill", "cut", "drop"} {
			t.Run(policy+","+end, func(t *testing.T) {
				r := newRig(t, size, size, "v")
				r.serve([]string{"v"}, "--on-full", policy)
				o := r.dial("origin")
				r.inject(faultfs.Rule{Op: faultfs.Fsync, File: "v.cow", Errno: eio})
				o.write(0, fill('B', 8192), 0)
				flushed := o.flush() == nil
				if end == "drop" {
					r.s.api("DELETE", "snapshots/v", nil, nil) // it may say that not all is durable
					r.must(o.write(0, fill('C', 8192), 0))
					r.must(o.flush())
					r.originHolds(fill('C', 8192), 0)
					r.terminate(0, 2)
					return
				}
				if end == "cut" {
					r.cut(1)
				} else {
					r.kill()
					r.must(r.fs.Clear())
				}
				r.rightOrInvalid("v", r.past(size))
				if flushed {
					r.originHolds(fill('B', 8192), 0)
				}
			})
		}
	}
}

// that is not on the disk: it does not let the origin change before the mark is.
func TestMarkOnlyInThePageCache(t *testing.T) {
	const size = 256 << 10
	for _, policy := range []string{"fail", "pause"} {
		t.Run(policy, func(t *testing.T) {
			r := newRig(t, size, size, "v")
			r.serve([]string{"v"}, "--on-full", policy)
			o := r.dial("origin")
			r.inject(faultfs.Rule{Op: faultfs.Fsync, File: "v.cow", Errno: eio})
			o.write(0, fill('B', 8192), 0)
			o.flush()
			r.kill()
			r.must(r.fs.Clear())
			r.serve([]string{"v"}, "--on-full", policy)
			o = r.dial("origin")
			o.write(65536, fill('C', 8192), 0)
			flushed := o.flush() == nil
			r.cut(1)
			r.rightOrInvalid("v", r.past(size))
			if flushed {
				r.originHolds(fill('C', 8192), 65536)
			}
		})
	}
}

// what was acknowledged is written once there is space.
func TestOriginWithoutRoom(t *testing.T) {
	const size, full = 4 << 20, 64 << 10
	for _, what := range []string{"wait", "term", "drop", "attach", "attach existing", "merge"} {
		t.Run(what, func(t *testing.T) {
			r := newRig(t, size, full, "v", "w", "y")
			r.serve([]string{"v", "w"})
			o, v := r.dial("origin"), r.dial("v")
			r.must(v.write(0, fill('V', 4096), 0))
			r.must(v.flush())
			shows := r.past(full)
			copy(shows, fill('V', 4096))
			r.must(r.fs.Folder("o", full+128<<10))
			written := int64(full)
			for ; written < size; written += 64 << 10 {
				if err := o.write(written, fill('B', 64<<10), 0); errors.Is(err, nbdError(nbdENOSPC)) {
					break
				} else {
					r.must(err)
				}
				if o.flush() != nil {
					written += 64 << 10
					break
				}
			}
			if written == size {
				t.Fatal("there was space for all")
			}
			if b, err := o.read(full, 64<<10); err != nil || !bytes.Equal(b, fill('B', 64<<10)) {
				t.Errorf("what was acknowledged is not read (%v)", err)
			}
			want := r.past(full)
			status := []int{2}
			switch what {
			case "wait":
				r.must(r.fs.Folder("o", 0))
				r.must(o.flush())
				r.originHolds(fill('B', int(written-full)), full)
				status = []int{0}
			case "drop":
				err := r.s.api("DELETE", "snapshots/w", nil, nil)
				t.Log("drop:", err)
			case "attach":
				err := r.s.api("POST", "snapshots", map[string]any{"name": "x", "cow": r.cow("x"), "create": true}, nil)
				if _, missing := os.Stat(r.cow("x")); (err == nil) != (missing == nil) {
					t.Errorf("attach: %v; the file: %v", err, missing)
				}
			case "attach existing":
				err := r.s.api("POST", "snapshots", map[string]any{"name": "y", "cow": r.cow("y")}, nil)
				t.Log("attach:", err)
				if !r.validOnDisk("y") {
					t.Error("a refused attach made a sound store invalid")
				}
			case "merge":
				err := r.merge("v")
				t.Log("merge:", err)
				v.net.SetDeadline(time.Now().Add(5 * time.Second))
				if b, err := r.dial("v").read(0, 4096); err != nil || !bytes.Equal(b, fill('V', 4096)) {
					t.Errorf("read of the snapshot whose merge was refused: %v", err)
				}
				r.must(r.fs.Folder("o", 0))
				if err == nil {
					r.s.api("POST", "merge/resume", nil, nil)
					if m := r.mergeState("20"); m.State != "done" {
						t.Errorf("with space the merge is %+v", m)
					}
					r.terminate(0)
					return
				}
				r.must(o.flush())
				if b, err := r.dial("v").read(0, 4096); err != nil || !bytes.Equal(b, fill('V', 4096)) {
					t.Errorf("read of the snapshot whose merge was refused: %v", err)
				}
				status = []int{0}
			}
			if st := r.state("v"); st.State != "ok" {
				t.Errorf("v is %q", st.State)
			}
			r.terminate(status...)
			for _, name := range []string{"v", "w"} {
				if !r.validOnDisk(name) {
					t.Errorf("%s was made invalid by the origin's lack of space", name)
				}
				r.run(0, "check", r.cow(name))
			}
			if got := r.shown("v"); !bytes.Equal(got, shows) {
				t.Error("v shows something else")
			}
			if got := r.shown("w"); what != "drop" && !bytes.Equal(got, want) {
				t.Error("w shows something else")
			}
		})
	}
}

// A COW device without space for its slots costs no other snapshot anything.
func TestLackOfSpaceFailsOneSnapshot(t *testing.T) {
	const size = 256 << 10
	r := newRig(t, size, size, "v", "w")
	r.serve([]string{"v", "w"})
	o := r.dial("origin")
	r.inject(faultfs.Rule{Op: faultfs.Fsync, File: "w.cow", Errno: enospc})
	o.write(0, fill('B', 8192), 0)
	time.Sleep(300 * time.Millisecond) // it would be written out by itself
	o.flush()
	if st := r.state("v"); st.State != "ok" {
		t.Errorf("v is %q", st.State)
	}
	err := r.s.api("DELETE", "snapshots/v", nil, nil)
	t.Log("drop v:", err)
	if !r.validOnDisk("v") {
		t.Error("v is invalid")
	}
	r.run(0, "check", r.cow("v"))
	r.kill()
	r.must(r.fs.Clear())
	r.rightOrInvalid("w", r.past(size))
}

// The flush that clears merged slots fails once. A merge that is "done" afterwards is done on the disk too.
func TestMergeThatIsDoneIsDurable(t *testing.T) {
	const size, part = 256 << 10, 64 << 10
	for skip := range 4 {
		t.Run(fmt.Sprint(skip), func(t *testing.T) {
			r := newRig(t, size, size, "v")
			r.serve([]string{"v"})
			v := r.dial("v")
			r.must(v.write(0, fill('V', part), 0))
			r.must(v.flush())
			r.inject(faultfs.Rule{Op: faultfs.Fsync, File: "v.cow", Errno: eio, Count: 1, Skip: skip})
			var m mergeStatus
			if err := r.merge("v"); err != nil {
				t.Log("refused:", err)
			} else if m = r.mergeState("10"); m.State == "failed" {
				r.s.api("POST", "merge/resume", nil, nil)
				m = r.mergeState("10")
			}
			merged := r.past(size)
			copy(merged, fill('V', part))
			if m.State != "done" {
				r.cut(uint64(skip))
				if got := r.shown("v"); !bytes.Equal(got, merged) {
					t.Error("the merge is not done, and the snapshot shows something else")
				}
				return
			}
			r.must(r.s.api("DELETE", "snapshots/v", nil, nil))
			o := r.dial("origin")
			r.must(o.write(0, fill('N', part), flagFUA))
			r.must(o.flush())
			r.cut(uint64(skip))
			r.originHolds(fill('N', part), 0)
			// As docs/recovery.md has it, after a merge of which it is not known whether it was complete.
			r.run(0, "merge", r.origin, r.cow("v"))
			r.originHolds(fill('N', part), 0)
		})
	}
}

// it is not trusted: the next process overwrites the origin, flushes, and loses its power.
func TestPageCacheAfterAFailedFlush(t *testing.T) {
	const size = 256 << 10
	for skip := range 3 {
		for _, sync := range []string{"flush", "always"} {
			t.Run(fmt.Sprint(skip, sync), func(t *testing.T) {
				r := newRig(t, size, size, "v")
				r.serve([]string{"v"}, "--sync", sync)
				r.inject(faultfs.Rule{Op: faultfs.Fsync, File: "v.cow", Errno: eio, Count: 1, Skip: skip, Hang: true})
				o := r.dial("origin")
				_, err := o.send(cmdWrite, flagFUA, 16384, 16384, fill('B', 16384))
				r.must(err)
				for late := time.Now().Add(time.Second); time.Now().Before(late); time.Sleep(5 * time.Millisecond) {
					if n, err := r.fs.Hanging(); err != nil || n > 0 {
						break
					}
				}
				r.s.cmd.Process.Kill()
				time.Sleep(20 * time.Millisecond) // the kill is on its way before the flush ends
				r.must(r.fs.Release())
				r.kill()
				r.must(r.fs.Clear())
				r.serve([]string{"v"}, "--sync", sync)
				o = r.dial("origin")
				// Nothing but what the store has exceptions for: no slot is written, so nothing is dirty by itself.
				err = o.write(16384, fill('C', 16384), 0)
				flushed := err == nil && o.flush() == nil
				r.cut(uint64(skip))
				r.rightOrInvalid("v", r.past(size))
				if flushed {
					r.originHolds(fill('C', 16384), 16384)
				}
			})
		}
	}
}

// A flush fails once in a live merge: resuming completes it, or the message says what does. Nothing is lost.
func TestMergeWhoseFlushFailsOnce(t *testing.T) {
	const size, part = 256 << 10, 64 << 10
	for _, file := range []string{"disk", "v.cow"} {
		for skip := range 3 {
			t.Run(fmt.Sprint(file, skip), func(t *testing.T) {
				r := newRig(t, size, size, "v")
				r.serve([]string{"v"})
				v := r.dial("v")
				r.must(v.write(0, fill('V', part), 0))
				r.must(v.flush())
				merged := r.past(size)
				copy(merged, fill('V', part))
				r.inject(faultfs.Rule{Op: faultfs.Fsync, File: file, Errno: eio, Count: 1, Skip: skip})
				refused := r.merge("v")
				var m mergeStatus
				if refused == nil {
					if m = r.mergeState("10"); m.State == "failed" {
						r.s.api("POST", "merge/resume", nil, nil)
						m = r.mergeState("10")
					}
					if m.State != "done" && !strings.Contains(m.Error, "opened again") {
						t.Errorf("resume does not help, and nothing says what does: %+v", m)
					}
				}
				c := r.dial("v")
				if b, err := c.read(0, size); err != nil || !bytes.Equal(b, merged) {
					t.Errorf("the snapshot shows something else (%v)", err)
				}
				r.terminate(0, 2)
				if refused != nil && !r.validOnDisk("v") {
					return // the snapshot's own flush failed before the merge began
				}
				if m.State != "done" {
					r.run(0, "merge", r.origin, r.cow("v"))
				}
				r.originHolds(merged, 0)
				r.run(0, "check", r.cow("v"))
			})
		}
	}
}
