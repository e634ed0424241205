package kernel_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestCrashImages gives the kernel a sample of the disks that power cuts leave (package snapshot, TestCrash, which
// checks all of them): wherever dmsnap shows a valid snapshot the kernel loads one, with the same figures and the same
// content.
func TestCrashImages(t *testing.T) {
	need(t)
	every := "250"
	if os.Getenv("DMSNAP_SCRIPTS") != "" { // the long run
		every = "20"
	}
	dir := t.TempDir()
	cmd := exec.Command("go", "test", "-count=1", "-run", "^TestCrash$", "../../snapshot")
	cmd.Env = append(os.Environ(), "DMSNAP_CRASH_SAMPLE="+dir, "DMSNAP_CRASH_SAMPLE_EVERY="+every)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("the exploration: %v\n%s", err, out)
	}
	cows, err := filepath.Glob(filepath.Join(dir, "*.cow"))
	if err != nil || len(cows) < 20 {
		t.Fatalf("%d images in the sample, %v", len(cows), err)
	}
	k := newKernel(t, sharedMachine(t))
	for _, path := range cows {
		name := strings.TrimSuffix(path, ".cow")
		crashImage(t, k, filepath.Base(name), file(t, name+".origin"), file(t, path), file(t, name+".view"), string(file(t, name+".status")))
	}
	t.Logf("%d snapshots after power cuts, loaded by the kernel", len(cows))
}

// crashImage has the kernel load one snapshot.
func crashImage(t *testing.T, k *kernel, name string, origin, cow, view []byte, status string) {
	t.Helper()
	k.disk("disk", int64(len(origin)/512))
	k.put("disk", 0, origin)
	k.disk("cow0", int64(len(cow)/512))
	k.put("cow0", 0, cow)
	k.create("snap", fmt.Sprintf("0 %d snapshot dm:disk dm:cow0 P 8", len(origin)/512))
	if got := statusText(k.status("snap")); got != status {
		t.Errorf("%s: the kernel says %q, dmsnap %q", name, got, status)
	} else if got := k.get("snap", 0, 0); !bytes.Equal(got, view) {
		t.Errorf("%s: the kernel shows other content, from byte %d on", name, firstDifference(got, view))
	}
	for _, dev := range []string{"snap", "cow0", "disk"} {
		k.remove(dev)
	}
	tally.add(func(c *counts) { c.crashes++ })
}

func file(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
