package kernel_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/testremote"
	"github.com/dmsnap/dmsnap/publish"
	"github.com/dmsnap/dmsnap/source/cache"
	"github.com/dmsnap/dmsnap/source/ondemand"
	"github.com/dmsnap/dmsnap/source/remote"
	"github.com/dmsnap/dmsnap/store"
)

// A disk with a store over it is pushed and pulled: the kernel activates the files, shows what was pushed, and goes on with them.
func TestPulledStores(t *testing.T) {
	need(t)
	host := testremote.Start(t, testremote.NewRegistry())
	for _, chunk := range []int64{1, 8, 128} {
		t.Run(fmt.Sprintf("c=%d", chunk), func(t *testing.T) {
			s := script{originSectors: 4096 + chunk/2, snaps: []snapConf{{store: "P", chunk: chunk}}}
			s.snaps[0].length = s.originSectors
			base := block.MemoryFrom(s.before().disk)
			st, want := writtenOver(t, base, uint32(chunk))
			ref := fmt.Sprintf("oci://%s/disk:%d", host, chunk)
			repo, err := remote.Open(ref, remote.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := publish.Push(t.Context(), repo, base, []*store.Store{st}, publish.Options{Temp: t.TempDir()}); err != nil {
				t.Fatal(err)
			}
			b := pulled(t, ref)
			s.snaps[0].cowSectors = int64(len(b.cows[0])) / block.SectorSize
			k := newKernel(t, sharedMachine(t))
			newTheirs(k, s, &b)
			if got := k.get("snap0", 0, base.Size()); !bytes.Equal(got, want) {
				t.Errorf("the kernel shows other content, from byte %d on", firstDifference(got, want))
			}
			k.clear()
			handedOver(t, k, s, b)
		})
	}
}

// pulled returns the files of a disk of two layers.
func pulled(t *testing.T, ref string) images {
	t.Helper()
	c, err := cache.Open(t.TempDir(), cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	d, err := ondemand.Open(t.Context(), ref, ondemand.Options{Cache: c})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	files, err := publish.Pull(t.Context(), d, t.TempDir(), publish.Options{Cache: c})
	if err != nil || len(files) != 2 {
		t.Fatalf("%+v, %v", files, err)
	}
	return images{disk: file(t, files[0].Path), cows: [][]byte{file(t, files[1].Path)}}
}
