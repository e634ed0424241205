package kernel_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/dump"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/repair"
	"github.com/dmsnap/dmsnap/store"
	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// TestRepairedStores: the kernel loads each repaired store of the damage catalogue, with the same figures as dmsnap,
// shows what was kept, and continues with it; check finds the result clean.
func TestRepairedStores(t *testing.T) {
	need(t)
	for _, problem := range check.Problems() {
		if problem.Repair == check.NotRepairable {
			continue
		}
		t.Run(problem.Code.String(), func(t *testing.T) {
			cow := repaired(t, problem)
			st, err := store.Open(cow)
			if err != nil {
				t.Fatal(err)
			}
			k := newKernel(t, sharedMachine(t))
			c := int64(st.Layout().ChunkSectors)
			k.disk("disk", 256*c)
			k.must(job.Op{Do: job.Write, Dev: "dm:disk", N: 256 * c * 512, Seed: originSeed})
			k.disk("cow0", cow.Size()/512+16*c) // space for what the kernel adds
			k.put("cow0", 0, cow.Bytes())
			table := fmt.Sprintf("0 %d snapshot dm:disk dm:cow0 P %d", 256*c, c)
			k.create("snap", table)
			usage := st.Usage()
			usage.Total += uint64(16 * c)
			if got := statusText(k.status("snap")); got != usage.String() {
				t.Errorf("the kernel says %q, want %q", got, usage)
			}
			want := k.get("disk", 0, 256*c*512)
			for run := range st.Exceptions() {
				n := int64(run.Count) * c * 512
				if _, err := cow.ReadAt(want[int64(run.Old)*c*512:][:n], st.Layout().COWOffset(run.New)); err != nil {
					t.Fatal(err)
				}
			}
			if got := k.get("snap", 0, 256*c*512); !bytes.Equal(got, want) {
				t.Errorf("the kernel shows other content, from byte %d on", firstDifference(got, want))
			}
			k.must(job.Op{Do: job.Write, Dev: "dm:snap", Off: 200 * c * 512, N: 3 * c * 512, Seed: 7})
			k.remove("snap")
			after := block.MemoryFrom(k.get("cow0", 0, cow.Size()+16*c*512))
			r, err := check.Run(t.Context(), after, check.Options{})
			if err != nil || !r.Clean() || r.Exceptions != st.Len()+3 {
				t.Errorf("after the kernel's writes: %d exceptions of %d, %v, %v", r.Exceptions, st.Len()+3, r.Findings, err)
			}
		})
	}
}

// repaired restores a store of the catalogue and repairs it. What the text says about devices that can't be
// read does not matter here: their stores are sound otherwise.
func repaired(t *testing.T, problem check.Problem) *block.Memory {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "check", "testdata", problem.Code.String(), "store.txt"))
	if err != nil {
		t.Fatal(err)
	}
	var damaged *block.Memory
	_, err = dump.Restore(t.Context(), strings.NewReader(string(text)), func(size int64) (block.Device, error) {
		damaged = block.NewMemory(size)
		return damaged, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var o repair.Options
	if problem.Repair == check.WithChunkSize {
		o.ChunkSectors = ondisk.DefaultChunkSectors
	}
	p, err := repair.NewPlan(t.Context(), damaged, o)
	if err != nil {
		t.Fatal(err)
	}
	out := block.NewMemory(p.Size())
	if err := p.Fresh(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	return out
}
