package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/test/e2e/faultfs"
)

// The power fails before each call of a live merge that writes to the origin, its side file or the store. Whenever
// something of the origin's past is overwritten and the merge is not complete, the side file is there: it refuses other
// stores, except for the snapshots that kept what was overwritten, and the merge continues.
func TestPowerCutsOfALiveMerge(t *testing.T) {
	calls := []faultfs.Rule{
		{Op: faultfs.Create, File: ".disk.merging.*"},
		{Op: faultfs.Write, File: ".disk.merging.*"},
		{Op: faultfs.Fsync, File: ".disk.merging.*"},
		{Op: faultfs.Rename, File: ".disk.merging.*"},
		{Op: faultfs.SyncDir, File: "o"},
		{Op: faultfs.Remove, File: "disk.merging"},
		{Op: faultfs.Write, File: "disk"},
		{Op: faultfs.Fsync, File: "disk"},
		{Op: faultfs.Write, File: "v.cow"},
		{Op: faultfs.Fsync, File: "v.cow"},
		{Op: faultfs.Fsync, File: "w.cow"},
	}
	for _, call := range calls {
		t.Run(fmt.Sprintf("%s %s", call.Op, call.File), func(t *testing.T) {
			t.Parallel()
			for call.Skip = 0; ; call.Skip++ {
				if call.Skip > 20 {
					t.Fatal("the merge has no end")
				}
				if !powerCutOfALiveMerge(t, call) {
					break
				}
			}
			if call.Skip == 0 {
				t.Error("there is no such call")
			}
		})
	}
}

// powerCutOfALiveMerge cuts the power before one call. It returns false when the merge was complete without it.
func powerCutOfALiveMerge(t *testing.T, call faultfs.Rule) (hung bool) {
	const size, part = 256 << 10, 64 << 10
	r := newRig(t, size, size, "v", "w", "stranger")
	r.serve([]string{"v", "w"})
	v := r.dial("v")
	past, merged := r.past(size), r.past(size)
	for at := int64(0); at < size; at += 2 * part {
		r.must(v.write(at, fill('V', part), 0))
		copy(merged[at:], fill('V', part))
	}
	r.must(v.flush())
	call.Hang, call.Count = true, 1
	r.inject(call)
	ended := make(chan error, 1)
	s := r.s
	go func() {
		var m mergeStatus
		err := s.api("POST", "merge", map[string]any{"name": "v"}, nil)
		if err == nil {
			err = s.api("GET", "merge?wait=30", nil, &m)
		}
		if err == nil && m.State != "done" {
			err = errors.New(m.State + ": " + m.Error)
		}
		ended <- err
	}()
	for waiting := true; waiting && !hung; {
		select {
		case err := <-ended:
			r.must(err)
			waiting = false
		case <-time.After(time.Millisecond):
			n, err := r.fs.Hanging()
			r.must(err)
			hung = n > 0
		}
	}
	r.cut(uint64(call.Skip))
	if hung {
		<-ended // with whatever error
	}
	origin, err := os.ReadFile(r.origin)
	r.must(err)
	text, err := os.ReadFile(r.origin + ".merging")
	begun := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	switch {
	case begun:
		if !strings.Contains(string(text), r.cow("v")) {
			t.Errorf("%v: the side file names another store: %s", call, text)
		}
		if o := run("merge", r.origin, r.cow("stranger")); o.status != 2 || !strings.Contains(o.stderr, "not complete") {
			t.Errorf("%v: merging another store: %v", call, o)
		}
		if out := run("inspect", "--json", r.origin).out; !strings.Contains(out, `"side_file": "`+r.origin+`.merging"`) {
			t.Errorf("%v: inspect: %s", call, out)
		}
		if _, err := serve(r.dir, r.origin, r.cow("stranger")); err == nil || !strings.Contains(err.Error(), "not complete") {
			t.Errorf("%v: serving another store: %v", call, err)
		}
	case !bytes.Equal(origin, past) && !bytes.Equal(origin, merged):
		t.Errorf("%v: a mixture without a side file", call)
	case !hung && !bytes.Equal(origin, merged):
		t.Errorf("%v: the merge was complete, and is not", call)
	}
	for name, want := range map[string][]byte{"v": merged, "w": past} {
		if got := r.shown(name); !slices.Equal(got, want) {
			t.Errorf("%v: %s shows something else", call, name)
		}
	}
	if call.Skip%2 == 0 {
		r.run(0, "merge", r.origin, r.cow("v"))
	} else {
		r.serve([]string{"v", "w"})
		r.must(r.merge("v"))
		if m := r.mergeState("30"); m.State != "done" {
			t.Errorf("%v: the merge again: %+v", call, m)
		}
		r.terminate(0)
		if got := r.shown("w"); !slices.Equal(got, past) {
			t.Errorf("%v: w shows something else when the merge is complete", call)
		}
		r.run(0, "check", r.cow("w"), "--origin", r.origin)
	}
	r.originHolds(merged, 0)
	if _, err := os.Stat(r.origin + ".merging"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v: the side file is left: %v", call, err)
	}
	r.run(0, "check", r.cow("v"), "--origin", r.origin)
	return hung
}

// An offline merge with an undo store is killed at each call that changes the side file or the origin; the call itself is
// executed. From the moment that there is a side file the undo store belongs to it: it takes the merge back, also when the
// merge was continued first, and then there is none.
func TestKilledMergeIsTakenBack(t *testing.T) {
	for _, call := range []faultfs.Rule{
		{Op: faultfs.Create, File: ".disk.merging.*"},
		{Op: faultfs.Rename, File: ".disk.merging.*"},
		{Op: faultfs.Write, File: "disk"},
		{Op: faultfs.Write, File: "v.cow"},
	} {
		for _, continued := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s %s, continued %v", call.Op, call.File, continued), func(t *testing.T) {
				t.Parallel()
				call, taken := call, 0 // the other test changes its own
				for call.Skip = 0; killedMergeIsTakenBack(t, call, continued, &taken); call.Skip++ {
				}
				if call.Skip == 0 || taken == 0 {
					t.Errorf("%d calls, %d merges were taken back", call.Skip, taken)
				}
			})
		}
	}
}

// killedMergeIsTakenBack kills the merge at one call, and takes it back. It returns false when the merge was complete
// without the call.
func killedMergeIsTakenBack(t *testing.T, call faultfs.Rule, continued bool, taken *int) (hung bool) {
	const size, part = 256 << 10, 64 << 10
	r := newRig(t, size, size, "v")
	r.serve([]string{"v"})
	v := r.dial("v")
	past, merged := r.past(size), r.past(size)
	for at := int64(0); at < size; at += 2 * part {
		r.must(v.write(at, fill('V', part), 0))
		copy(merged[at:], fill('V', part))
	}
	r.must(v.flush())
	r.terminate(0)
	call.Hang, call.Count = true, 1
	r.inject(call)
	ended := make(chan outcome, 1)
	ctx, kill := context.WithCancel(t.Context())
	defer kill()
	go func() {
		ended <- runUntil(ctx, syscall.SIGKILL, "merge", r.origin, r.cow("v"), "--undo", r.cow("undo"))
	}()
	if hung = r.hangs(ended); hung {
		kill()
		time.Sleep(10 * time.Millisecond) // the signal arrives before the call goes on
	}
	r.must(r.fs.Clear())
	if hung {
		<-ended // with whatever status
	}
	_, sideErr := os.Stat(r.origin + ".merging")
	if hung && sideErr == nil && continued {
		r.run(0, "merge", r.origin, r.cow("v"), "--undo", r.cow("undo"))
		r.originHolds(merged, 0)
	}
	if _, err := os.Stat(r.cow("undo")); err == nil {
		r.run(0, "merge", r.origin, r.cow("undo"))
		*taken++
	}
	r.originHolds(past, 0)
	if _, err := os.Stat(r.origin + ".merging"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v: the side file is left: %v", call, err)
	}
	r.run(0, "check", r.cow("v"), "--origin", r.origin)
	return hung
}

// hangs waits until a call hangs, or the program ended, which must be with status 0 then.
func (r *rig) hangs(ended <-chan outcome) bool {
	r.t.Helper()
	for {
		select {
		case o := <-ended:
			if o.status != 0 {
				r.t.Fatal(o)
			}
			return false
		case <-time.After(time.Millisecond):
			if n, err := r.fs.Hanging(); err != nil || n > 0 {
				r.must(err)
				return true
			}
		}
	}
}
