package fleet

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/server/api"
)

// A merge is paused before it has copied anything, nothing more is copied meanwhile, the node is used, and it is resumed: the
// disk is then what the node shows. A start of the fleet resumes it as well.
func TestPausedMerge(t *testing.T) {
	for _, restart := range []bool{false, true} {
		f := newFleet(t, Options{})
		f.fork("golden", "vm")
		for i := range int64(200) {
			put(t, f.nodes["vm"].dev, i*4096, "merged")
		}
		if _, err := f.PauseMerge(t.Context(), "vm"); codeOf(err) != api.CodeNoMerge {
			t.Errorf("pause without a merge: %v", err)
		}
		release, err := f.acquire(t.Context()) // the first pass waits for it
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.beginMerge(t.Context(), "vm"); err != nil {
			t.Fatal(err)
		}
		m, err := f.PauseMerge(t.Context(), "vm")
		release()
		if err != nil || m.State != api.MergePaused {
			t.Fatalf("%+v, %v", m, err)
		}
		if again, err := f.PauseMerge(t.Context(), "vm"); err != nil || again.State != api.MergePaused {
			t.Errorf("paused twice: %+v, %v", again, err)
		}
		time.Sleep(50 * time.Millisecond)
		d, err := f.Disk("golden")
		if err != nil || d.Merge == nil || d.Merge.State != api.MergePaused || d.Merge.CopiedBytes != 0 {
			t.Errorf("while it is paused: %+v, %v", d.Merge, err)
		}
		if err := merge.CheckOrigin(f.golden); !errors.Is(err, merge.ErrMixture) || !strings.Contains(err.Error(), f.dir) {
			t.Errorf("the disk is not marked as a mixture: %v", err)
		}
		put(t, f.nodes["vm"].dev, 0, "during")
		if err := f.Drop(t.Context(), "vm"); codeOf(err) != api.CodeInUse {
			t.Errorf("drop of a node whose merge is paused: %v", err)
		}
		if restart {
			f.restart()
		} else if m, err := f.ResumeMerge(t.Context(), "vm"); err != nil || m.State != api.MergeRunning {
			t.Errorf("resume: %+v, %v", m, err)
		}
		f.waitMerged("golden")
		e, err := f.Element("vm")
		if err != nil || e.Counters == nil || e.Counters.MergeWaits.Count < 2 || e.Counters.MergeWaits.Seconds <= 0 { // for a pass, and for the end
			t.Errorf("waits for the merge: %+v, %v", e.Counters, err)
		}
		if _, err := f.ResumeMerge(t.Context(), "vm"); codeOf(err) != api.CodeNoMerge {
			t.Errorf("resume of a merge that is complete: %v", err)
		}
		want(t, f.disks["golden"].file, 0, "during")
		want(t, f.disks["golden"].file, 199*4096, "merged")
		if err := merge.CheckOrigin(f.golden); err != nil {
			t.Errorf("the merge is complete: %v", err)
		}
		f.stop()
	}
}
