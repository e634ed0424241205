package snapshot_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"

	"github.com/dmsnap/dmsnap/block/blocktest"
)

// The kernel tests use a sample of the images (test/kernel, TestCrashImages): every n-th, as files in a directory.
var (
	sampleFolder   = os.Getenv("DMSNAP_CRASH_SAMPLE")
	sampleEvery, _ = strconv.ParseInt(os.Getenv("DMSNAP_CRASH_SAMPLE_EVERY"), 10, 64)
	sampled        atomic.Int64
)

// give writes the disks of an image, one pair for each valid snapshot, what dmsnap shows of it and its status
// text, when the image belongs to the sample. What stands there was judged before.
func (a *aftermath) give(img *blocktest.Image) error {
	if sampleFolder == "" {
		return nil
	}
	n := sampled.Add(1)
	if n%max(sampleEvery, 1) != 0 {
		return nil
	}
	for i, s := range a.snaps {
		if s == nil {
			continue
		}
		view := make([]byte, s.Size())
		if _, err := s.ReadAt(view, 0); err != nil {
			return err
		}
		for name, content := range map[string][]byte{
			"origin": img.Disk(a.disk), "cow": img.Disk(a.moment.cows[i].disk), "view": view, "status": []byte(s.Status().Text())} {
			if err := os.WriteFile(filepath.Join(sampleFolder, fmt.Sprintf("%d-%d.%s", n, i, name)), content, 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}
