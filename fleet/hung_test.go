package fleet

import (
	"bytes"
	"context"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testremote"
	"github.com/dmsnap/dmsnap/publish"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/remote"
)

// A registry hangs, and writes to one node and a disk that is added wait for it: checkpoints and forks of that node and of others, and writes to
// them, go on. The waiting requests end in time, and nothing that was acknowledged is lost.
func TestHungRegistry(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	const timeout = 4 * time.Second
	faults := &testremote.Faults{Next: testremote.NewRegistry()}
	server := httptest.NewServer(faults)
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	ref := "oci://" + strings.TrimPrefix(server.URL, "http://") + "/golden/disk:1"
	content := blocktest.Pattern(testSize, 1)
	base := block.NewMemory(testSize)
	put(t, base, 0, string(content))
	repo, err := remote.Open(ref, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := publish.Push(t.Context(), repo, base, nil, publish.Options{Temp: t.TempDir()}); err != nil {
		t.Fatal(err)
	}
	f := newFleet(t, Options{Open: source.Opener(source.Options{Remote: source.RemoteOptions{Options: remote.Options{Timeout: timeout}, CacheDir: t.TempDir()}})})
	if _, err := f.AddDisk(t.Context(), api.AddDiskRequest{Name: "remote", Source: ref}); err != nil {
		t.Fatal(err)
	}
	f.fork("remote", "vm")
	f.fork("golden", "local")
	vm, other, local := f.dial("vm"), f.dial("vm"), f.dial("local")
	put(t, vm, 100, "first") // of the first unit, which is on this host then

	faults.Set(testremote.Hang, 1)
	var hung sync.WaitGroup
	var failed [4]error
	begun := time.Now()
	hung.Go(func() { _, failed[0] = vm.WriteAt([]byte("lost"), testSize/2+100) })
	hung.Go(func() { failed[1] = vm.ZeroAt(testSize/4+100, 8192, 0) })
	hung.Go(func() { failed[3] = block.WriteDurable(vm, []byte("lost"), testSize/8+100) })
	hung.Go(func() { // the reference is another one, of which nothing is known here
		_, failed[2] = f.AddDisk(context.Background(), api.AddDiskRequest{Name: "more", Source: strings.Replace(ref, ":1", ":2", 1)})
	})
	time.Sleep(timeout / 20) // for the requests to begin; one that begins later would be delayed by nothing
	put(t, other, 4096+100, "second")
	put(t, local, 0, "third")
	f.checkpoint("of-both", "vm", "local")
	f.checkpoint("one", "vm")
	f.checkpoint("one-of-local", "local")
	f.fork("vm", "fork")
	f.fork("local@one-of-local", "another")
	put(t, other, 8192, "fourth")
	if err := other.Flush(); err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took > timeout*3/4 {
		t.Errorf("operations beside a hung fetch took %v", took)
	}
	ended := make(chan struct{})
	go func() { hung.Wait(); close(ended) }()
	select {
	case <-ended:
		if took := time.Since(begun); took < timeout*3/4 {
			t.Errorf("requests without an answer ended after %v", took) // nothing was beside them
		}
	case <-time.After(2 * timeout):
		t.Errorf("requests without an answer take longer than %v", timeout)
		faults.Set("", 0)
		server.CloseClientConnections() // the next attempt gets an answer
		<-ended
	}
	for i, err := range failed {
		if err == nil {
			t.Errorf("request %d succeeded without an answer", i)
		}
	}
	faults.Set("", 0)
	shown := append([]byte(nil), content...)
	for _, w := range []struct {
		off  int
		text string
	}{{100, "first"}, {4096 + 100, "second"}, {8192, "fourth"}} {
		copy(shown[w.off:], w.text)
	}
	f.restart()
	got := make([]byte, testSize)
	if _, err := f.dial("vm").ReadAt(got, 0); err != nil || !bytes.Equal(got, shown) {
		t.Errorf("%v, or other bytes", err)
	}
	want(t, f.dial("local"), 0, "third")
	want(t, f.dial("fork"), 4096+100, "second")
}
