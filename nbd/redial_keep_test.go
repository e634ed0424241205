package nbd_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/nbd"
)

func TestRedialerKeepingConformance(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device {
		d := redial(t, block.NewMemory(1<<20), time.Second)
		d.KeepChanges(64 << 10)
		return d.Redialer
	})
}

// A server that is lost with what was not flushed: every change is there again, in order, and flushes succeed.
func TestRedialerKeepsChanges(t *testing.T) {
	const size = 64 << 10
	disk := block.NewMemory(size)
	d := redial(t, disk, 10*time.Second)
	d.KeepChanges(1 << 20)
	want, durable := make([]byte, size), make([]byte, size)
	r := rand.New(rand.NewPCG(1, 2))
	for round := range 20 {
		for range 30 {
			off, n := r.Int64N(size-4096), 1+r.Int64N(4096)
			switch r.IntN(8) {
			case 0:
				if err := d.ZeroAt(off, n, 0); err != nil {
					t.Fatal(err)
				}
				clear(want[off:][:n])
			case 1:
				if err := d.Flush(); err != nil {
					t.Fatal(err)
				}
				copy(durable, want)
			case 2:
				p := blocktest.Pattern(int(n), r.Uint64())
				if err := d.WriteDurableAt(p, off); err != nil {
					t.Fatal(err)
				}
				copy(want[off:], p)
				copy(durable[off:], p)
			default:
				p := blocktest.Pattern(int(n), r.Uint64())
				if _, err := d.WriteAt(p, off); err != nil {
					t.Fatal(err)
				}
				copy(want[off:], p)
				clear(p) // the buffer is the caller's again
			}
		}
		next := block.MemoryFrom(bytes.Clone(durable))
		_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: next, CanTrim: true})
		d.cut(uri("x"))
		wantBytes(t, d, 0, want)
		if err := d.Flush(); err != nil {
			t.Fatal(err)
		}
		copy(durable, want)
		wantBytes(t, next, 0, want)
		if t.Failed() {
			t.Fatalf("round %d", round)
		}
	}
}

// A change in flight is sent again, after those that were acknowledged.
func TestRedialerKeepsTheOrder(t *testing.T) {
	faulty := blocktest.NewFaulty(block.NewMemory(1<<20), nil)
	d := redial(t, faulty, 10*time.Second)
	d.KeepChanges(1 << 20)
	if _, err := d.WriteAt([]byte("older"), 0); err != nil {
		t.Fatal(err)
	}
	h := faulty.Hold(func(op blocktest.Op) bool { return op.Kind == blocktest.Write })
	defer h.Release()
	done := make(chan error, 1)
	go func() {
		_, err := d.WriteAt([]byte("newer"), 0)
		done <- err
	}()
	<-h.Reached()
	next := block.NewMemory(1 << 20)
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: next, CanTrim: true})
	d.cut(uri("x"))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	wantBytes(t, next, 0, []byte("newer"))
}

// Under concurrent writes, each to its own place, and cuts: nothing is lost. Each cut ends the server, as KeepChanges requires: one that
// goes on could execute an old write after a newer one.
func TestRedialerKeepsUnderLoad(t *testing.T) {
	disk := block.NewMemory(1 << 20)
	d := redial(t, disk, 10*time.Second)
	d.KeepChanges(256 << 10)
	end := d.end
	var writers sync.WaitGroup
	var written atomic.Int64
	for w := range 8 {
		writers.Go(func() {
			for i := range 200 {
				if _, err := d.WriteAt(blocktest.Pattern(4096, uint64(i)), int64(w)<<16); err != nil {
					t.Error(err)
				}
				written.Add(1)
				if i%37 == 0 {
					if err := d.Flush(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for cuts := range int64(15) { // with writes before and after each
		for written.Load() < 100*cuts {
			time.Sleep(time.Millisecond)
		}
		d.cut("")
		end()
		var uri func(string) string
		_, uri, end = serveUntil(t, nbd.Options{}, nbd.Export{Name: "x", Device: disk, CanTrim: true})
		d.cut(uri("x"))
	}
	writers.Wait()
	for w := range 8 {
		wantBytes(t, d, int64(w)<<16, blocktest.Pattern(4096, 199))
	}
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
}

// A new server that refuses what the old one acknowledged: flushes fail from then on, and reads succeed.
func TestRedialerKeptChangeRefused(t *testing.T) {
	d := redial(t, block.NewMemory(1<<20), 10*time.Second)
	d.KeepChanges(1 << 20)
	if _, err := d.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	full := blocktest.NewFaulty(block.NewMemory(1<<20), blocktest.FailKind(blocktest.Write, syscall.ENOSPC))
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: full, CanTrim: true})
	d.cut(uri("x"))
	wantBytes(t, d, 0, []byte{0})
	for range 2 {
		if err := d.Flush(); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("flush: %v", err)
		}
	}
}

// What exceeds the limit is flushed.
func TestRedialerKeepsNoMoreThanTheLimit(t *testing.T) {
	faulty := blocktest.NewFaulty(block.NewMemory(1<<20), nil)
	d := redial(t, faulty, 10*time.Second)
	d.KeepChanges(64 << 10)
	var flushes atomic.Int64
	faulty.Set(func(op blocktest.Op) error {
		if op.Kind == blocktest.Flush {
			flushes.Add(1)
		}
		return nil
	})
	for range 64 {
		if _, err := d.WriteAt(make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := flushes.Load(); n != 4 {
		t.Errorf("%d flushes of 256 KiB, want 4", n)
	}
}
