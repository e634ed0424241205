package server

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/writeback"
)

// TestOriginWritesThatCantBeWritten is the table of docs/durability.md, a subtest a cell: what reads, flushes, status, the
// end of the server and a restart say of acknowledged origin writes that the origin's disk does not take.
func TestOriginWritesThatCantBeWritten(t *testing.T) {
	type want struct {
		flush error // of the second flush, when the fault may be over
		state api.OriginState
		lost  bool // the bytes, at the end
		fails bool // the end
	}
	for _, c := range []struct {
		name  string
		kind  blocktest.Kind
		cause error
		once  bool // the fault ends after the first flush
		want  want
	}{
		{"EIO once", blocktest.Write, syscall.EIO, true, want{nil, api.OriginOK, false, false}},
		{"EIO for ever", blocktest.Write, syscall.EIO, false, want{syscall.EIO, api.OriginFailing, true, true}},
		{"ENOSPC once", blocktest.Write, syscall.ENOSPC, true, want{nil, api.OriginOK, false, false}},
		{"ENOSPC for ever", blocktest.Write, syscall.ENOSPC, false, want{syscall.ENOSPC, api.OriginFailing, true, true}},
		{"EIO of a flush, once", blocktest.Flush, syscall.EIO, true, want{syscall.EIO, api.OriginFailed, false, true}},
		{"ENOSPC of a flush, once", blocktest.Flush, syscall.ENOSPC, true, want{syscall.ENOSPC, api.OriginFailed, false, true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t)
			var failing atomic.Bool
			failing.Store(true)
			originDevice = func(d block.Device) block.Device {
				return blocktest.NewFaulty(d, func(op blocktest.Op) error {
					if op.Kind == c.kind && failing.Load() {
						return c.cause
					}
					return nil
				})
			}
			defer func() { originDevice = func(d block.Device) block.Device { return d } }()
			var mu sync.Mutex
			var log []string
			s, err := Open(p.origin, Options{OnFull: FullFail, Log: func(line string) {
				mu.Lock()
				defer mu.Unlock()
				log = append(log, line)
			}})
			if err != nil {
				t.Fatal(err)
			}
			if err := s.ExportOrigin(); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Attach(api.AttachRequest{Name: "disk", COW: p.cow}); err != nil {
				t.Fatal(err)
			}
			snap, err := s.Device("disk")
			if err != nil {
				t.Fatal(err)
			}
			fresh := bytes.Repeat([]byte("new data"), 1024)
			if _, err := s.Origin().WriteAt(fresh, 65536); err != nil {
				t.Fatal(err)
			}
			wantRead := func(t *testing.T, what string, dev block.Device, want []byte) {
				t.Helper()
				got := make([]byte, len(want))
				if _, err := dev.ReadAt(got, 65536); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s reads %.8q, %v, want %.8q", what, got, err, want)
				}
			}
			old := p.content[65536 : 65536+len(fresh)]
			t.Run("flush", func(t *testing.T) {
				if err := s.Origin().Flush(); !errors.Is(err, c.cause) {
					t.Errorf("the first: %v", err)
				}
				if c.kind == blocktest.Write {
					if st := s.Status().Origin; st.State != api.OriginFailing || st.DirtyBytes != int64(len(fresh)) || st.Error == "" {
						t.Errorf("status meanwhile: %+v", st)
					}
				}
				failing.Store(!c.once)
				for range 2 {
					if err := s.Origin().Flush(); !errors.Is(err, c.want.flush) {
						t.Errorf("a later one: %v, want %v", err, c.want.flush)
					}
				}
			})
			t.Run("reads", func(t *testing.T) {
				wantRead(t, "the origin", s.Origin(), fresh)
				wantRead(t, "the snapshot", snap, old)
			})
			t.Run("status", func(t *testing.T) {
				st := s.Status()
				if o := st.Origin; o.State != c.want.state || (o.Error == "") != (o.State == api.OriginOK) || (o.DirtyBytes > 0) != c.want.lost {
					t.Errorf("origin %+v", o)
				}
				if v := st.Snapshots[0]; v.State != api.State(snapshot.StateOK) {
					t.Errorf("snapshot %+v", v)
				}
			})
			t.Run("end", func(t *testing.T) {
				err := s.Close()
				if (err != nil) != c.want.fails {
					t.Errorf("close: %v", err)
				}
				if c.want.lost {
					var lost *writeback.LostError
					if !errors.As(err, &lost) || !errors.Is(err, c.cause) || !strings.Contains(err.Error(), fmt.Sprintf("bytes 65536-%d", 65536+len(fresh)-1)) {
						t.Errorf("close: %v", err)
					}
				}
				mu.Lock()
				defer mu.Unlock()
				if text := strings.Join(log, "\n"); strings.Contains(text, "can't be written") != (c.kind == blocktest.Write) {
					t.Errorf("log %q", text)
				}
			})
			t.Run("restart", func(t *testing.T) {
				failing.Store(false)
				s := p.open(t, Options{OnFull: FullFail})
				want := fresh
				if c.want.lost {
					want = old
				}
				wantRead(t, "the origin", s.Origin(), want)
				snap, err := s.Device("disk")
				if err != nil {
					t.Fatal(err)
				}
				wantRead(t, "the snapshot", snap, old)
				if st := s.Status().Origin; st.State != api.OriginOK {
					t.Errorf("status %+v", st)
				}
				if err := s.Origin().Flush(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestAFullOriginCostsNoSnapshot: while the origin's disk has no space for acknowledged writes, a snapshot is dropped,
// another one is refused, and the server ends: every store stays valid.
func TestAFullOriginCostsNoSnapshot(t *testing.T) {
	p := newPair(t)
	var failing atomic.Bool
	originDevice = func(d block.Device) block.Device {
		return blocktest.NewFaulty(d, func(op blocktest.Op) error {
			if op.Kind == blocktest.Write && failing.Load() {
				return syscall.ENOSPC
			}
			return nil
		})
	}
	defer func() { originDevice = func(d block.Device) block.Device { return d } }()
	s, err := Open(p.origin, Options{OnFull: FullFail})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.ExportOrigin(); err != nil {
		t.Fatal(err)
	}
	paths := map[string]string{"disk": p.cow, "dropped": p.cow + ".dropped", "refused": p.cow + ".refused"}
	for _, name := range []string{"disk", "dropped", "refused"} {
		if _, err := s.Attach(api.AttachRequest{Name: name, COW: paths[name], Create: name != "disk"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Drop(t.Context(), "refused"); err != nil {
		t.Fatal(err)
	}
	failing.Store(true)
	if _, err := s.Origin().WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Origin().Flush(); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("flush: %v", err)
	}
	if _, err := s.Attach(api.AttachRequest{Name: "refused", COW: paths["refused"]}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("attach: %v", err)
	}
	if _, err := s.StartMerge("disk"); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("merge: %v", err)
	}
	snap, err := s.Device("disk") // goes on after the merge was refused
	if err != nil {
		t.Fatal(err)
	}
	if _, err := snap.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
	if err := s.Drop(t.Context(), "dropped"); err != nil {
		t.Errorf("drop: %v", err)
	}
	if err := s.Close(); !errors.As(err, new(*writeback.LostError)) {
		t.Errorf("close: %v", err)
	}
	failing.Store(false)
	s, err = Open(p.origin, Options{OnFull: FullFail})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for name, path := range paths {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
		if st, err := s.Attach(api.AttachRequest{Name: name, COW: path}); err != nil || st.State != api.State(snapshot.StateOK) {
			t.Errorf("%s: %v, %v", name, st.State, err)
		}
		dev, err := s.Device(name)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 4096)
		if _, err := dev.ReadAt(got, 0); err != nil || !bytes.Equal(got, p.content[:4096]) {
			t.Errorf("%s shows %.8q, %v", name, got, err)
		}
	}
}
