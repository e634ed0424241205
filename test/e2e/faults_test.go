package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

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
							if r.s = nil; status != 2 && r.validOnDisk("v") {
								t.Errorf("SIGTERM: status %d, and the snapshot is not marked", status)
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
