package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/internal/eventlog"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A running server, within this process.
type running struct {
	*server.Server
	t               *testing.T
	socket, control string
	stop            func() // ends it as a signal would, and checks that it ended well
}

// start serves a pair.
func start(t *testing.T, p pair, o serveOptions, cows ...string) *running {
	t.Helper()
	o.socket, o.control = filepath.Join(p.dir, "nbd.sock"), filepath.Join(p.dir, "control.sock")
	s, err := o.open(p.origin, nil, mounted{}, serverLog{Log: eventlog.Log{Line: func(line string) { t.Log(line) }}})
	if err != nil {
		t.Fatal(err)
	}
	l, control, err := server.Listeners{Socket: o.socket, Control: o.control}.Open()
	if err == nil {
		err = o.attach(s, o.attachments(p.origin, cows), len(cows) > 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	wait := s.Start(ctx, l, control)
	r := &running{Server: s, t: t, socket: o.socket, control: o.control}
	r.stop = sync.OnceFunc(func() {
		cancel(interrupted{15})
		if err := errors.Join(wait(), s.Close()); err != nil {
			t.Errorf("the server ended with %v", err)
		}
		for _, path := range []string{o.socket, o.control} {
			if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left: %v", path, err)
			}
		}
	})
	t.Cleanup(r.stop)
	return r
}

// uri is where an export is reached.
func (r *running) uri(name string) string {
	u := nbd.URI{Network: "unix", Address: r.socket, Export: name}
	return u.String()
}

// dev returns the device behind the export of a snapshot.
func (r *running) dev(name string) block.Device {
	r.t.Helper()
	dev, err := r.Device(name)
	if err != nil {
		r.t.Fatal(err)
	}
	return dev
}

// awaitWaiting waits until n changes wait for space.
func (r *running) awaitWaiting(n int64) {
	for {
		st := r.Status()
		waiting := st.Origin.Waiting
		for _, s := range st.Snapshots {
			waiting += s.Waiting
		}
		if waiting >= n {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func readAll(t *testing.T, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func writeAt(t *testing.T, d block.Device, p []byte, off int64) {
	t.Helper()
	if _, err := d.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

func TestServeStatus(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	r := start(t, p, serveOptions{exportOrigin: true}, "odd & ends="+p.cow)
	got := mustJSON[api.Status](t, "status", "--control", r.control)
	socket := "?socket=" + filepath.Join(p.dir, "nbd.sock")
	want := api.Origin{Path: p.origin, Name: "origin", Format: "raw", SizeBytes: int64(len(p.content)), URI: "nbd+unix:///origin" + socket, State: "ok",
		Counters: api.OriginCounters{SyncWaits: api.Latency{Buckets: []api.Bucket{}}}}
	if !reflect.DeepEqual(got.Origin, want) || got.Merge != nil || len(got.Snapshots) != 1 {
		t.Fatalf("status %+v", got)
	}
	s := got.Snapshots[0]
	if s.Name != "odd & ends" || s.COW != p.cow || s.URI != "nbd+unix:///odd%20%26%20ends"+socket || s.Exceptions != 5 ||
		s.State != "ok" || !s.Valid || s.Dmsetup != "56/2080 16" || s.Store != "P" {
		t.Errorf("snapshot %+v", s)
	}
	text := mustRun(t, "status", "--control", r.control)
	for _, word := range []string{p.origin, `snapshot "odd & ends": ok`, "56/2080 16", p.cow} {
		if !strings.Contains(text, word) {
			t.Errorf("text without %q:\n%s", word, text)
		}
	}
	// The raw JSON has the promised names.
	var raw struct{ Snapshots []map[string]any }
	if err := json.Unmarshal([]byte(mustRun(t, "status", "--control", r.control, "--json")), &raw); err != nil {
		t.Fatal(err)
	}
	for _, field := range strings.Fields("name store state valid chunk_sectors exceptions sectors_allocated total_sectors metadata_sectors dmsetup") {
		if _, ok := raw.Snapshots[0][field]; !ok {
			t.Errorf("no field %s", field)
		}
	}
}

// A snapshot is attached while clients write, shows the origin as it was then, and is dropped again.
func TestSnapshotAndDropWhileClientsWrite(t *testing.T) {
	p := newPair(t)
	r := start(t, p, serveOptions{create: true, exportOrigin: true}, p.cow)
	ctx, cancel := context.WithCancel(t.Context())
	var client sync.WaitGroup
	client.Go(func() {
		rnd := rand.New(rand.NewPCG(3, 3))
		for ctx.Err() == nil {
			// The first half of the origin is this client's.
			if _, err := r.Origin().WriteAt([]byte{byte(rnd.Uint32())}, rnd.Int64N(500_000)); err != nil {
				t.Error(err)
			}
		}
	})
	monday := filepath.Join(p.dir, "monday.cow")
	s := mustJSON[api.Snapshot](t, "snapshot", "--control", r.control, "monday", monday, "--create", "--chunk-size", "16k", "--store", "PO")
	if s.Name != "monday" || s.ChunkSectors != 32 || s.Store != "PO" || !strings.Contains(s.URI, "/monday?") {
		t.Errorf("attached %+v", s)
	}
	at := readAll(t, r.dev("monday"))
	cancel()
	client.Wait()
	writeAt(t, r.Origin(), bytes.Repeat([]byte("x"), 300_000), 600_000)
	if !bytes.Equal(readAll(t, r.dev("monday")), at) {
		t.Error("the snapshot changed with its origin")
	}
	if !bytes.Equal(at[600_000:], p.content[600_000:]) || !bytes.Equal(readAll(t, r.dev("disk")), p.content) {
		t.Error("a snapshot does not show the origin as it was when it was attached")
	}
	dmsnap("snapshot", "--control", r.control, "monday", monday).wantRefused(t, `"monday" is taken`)
	dmsnap("snapshot", "--control", r.control, "origin", monday).wantRefused(t, `"origin" is taken`)
	dmsnap("snapshot", "--control", r.control, "other", monday).wantRefused(t, monday, "in use")
	dmsnap("snapshot", "--control", r.control, "other", p.origin).wantRefused(t, "is the origin device")
	dmsnap("snapshot", "--control", r.control, "other", filepath.Join(p.dir, "none")).wantRefused(t, "no such file")
	if out := mustRun(t, "drop", "--control", r.control, "monday"); out != "monday dropped\n" {
		t.Errorf("drop said %q", out)
	}
	dmsnap("drop", "--control", r.control, "monday").wantRefused(t, `no snapshot "monday"`)
	if st := mustJSON[inspect.Status](t, "status", monday); st.InUse || !st.Valid || st.Exceptions == 0 {
		t.Errorf("dropped store %+v", st)
	}
	if c, err := nbd.Dial(t.Context(), r.uri("monday")); err == nil {
		c.Close()
		t.Error("a dropped snapshot is still exported")
	}
}

// What was written and not flushed is on disk after the end.
func TestNothingIsLostAtTheEnd(t *testing.T) {
	p := newPair(t)
	r := start(t, p, serveOptions{create: true}, p.cow)
	exceptions := func() uint64 { return mustJSON[inspect.Status](t, "status", p.cow).Exceptions }
	writeAt(t, r.dev("disk"), []byte("one"), 0)
	if n := exceptions(); n != 0 {
		t.Fatalf("%d exceptions on disk before any flush", n)
	}
	r.stop()
	if n := exceptions(); n != 1 {
		t.Errorf("%d exceptions on disk after the end, want 1", n)
	}
	wantContent(t, p.origin, p.content)
}

func TestSyncAlways(t *testing.T) {
	p := newPair(t)
	r := start(t, p, serveOptions{create: true, sync: syncFlag{snapshot.SyncAlways}}, p.cow)
	writeAt(t, r.dev("disk"), []byte("one"), 0)
	if n := mustJSON[inspect.Status](t, "status", p.cow).Exceptions; n != 1 {
		t.Errorf("%d exceptions on disk when the write returned, want 1", n)
	}
}

// changer has the context dmsnap:changed.
type changer interface {
	Changed(off, n int64) ([]block.Extent, error)
}

// A live merge beside clients of the snapshot's export, of the origin, and another snapshot.
func TestLiveMerge(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	other := filepath.Join(p.dir, "other.cow")
	mustRun(t, "create", p.origin, other)
	r := start(t, p, serveOptions{exportOrigin: true}, p.cow, other)
	snap := r.dev("disk")
	for off := int64(0); off < 1<<20; off += 16 << 10 {
		writeAt(t, snap, bytes.Repeat([]byte{1}, 8<<10), off)
	}
	want := readAll(t, snap)
	var clients sync.WaitGroup
	var mu sync.Mutex
	client := func(dev block.Device, from, to int64, with byte) {
		for off := from; off < to; off += 1000 {
			piece := bytes.Repeat([]byte{with}, 500)
			if _, err := dev.WriteAt(piece, off); err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			copy(want[off:], piece)
			mu.Unlock()
			if got := make([]byte, 500); true {
				if _, err := dev.ReadAt(got, off); err != nil || !bytes.Equal(got, piece) {
					t.Errorf("read back at %d: %v", off, err)
				}
			}
		}
	}
	clients.Go(func() { client(snap, 0, 400_000, 2) }) // before, during and after: one export
	m := mustJSON[api.Merge](t, "merge", "--control", r.control, "disk")
	if m.Name != "disk" || m.TotalChunks == 0 {
		t.Errorf("merge %+v", m)
	}
	clients.Go(func() { client(r.Origin(), 500_000, 900_000, 3) })
	clients.Wait()
	m = mustJSON[api.Merge](t, "merge", "--control", r.control, "--wait")
	if m.State != api.MergeDone || m.MergedChunks != m.TotalChunks || m.Percent != 100 {
		t.Errorf("at the end: %+v", m)
	}
	if !bytes.Equal(readAll(t, r.Origin()), want) || !bytes.Equal(readAll(t, snap), want) {
		t.Error("origin or export has another content than was written")
	}
	if !bytes.Equal(readAll(t, r.dev("other")), p.content) {
		t.Error("the other snapshot changed")
	}
	writeAt(t, snap, []byte("alias"), 1000)
	if got := readAll(t, r.Origin())[1000:1005]; string(got) != "alias" {
		t.Errorf("the export is no alias of the origin: %q", got)
	}
	if e, err := snap.(changer).Changed(0, 1<<20); err != nil || len(e) != 1 || e[0] != (block.Extent{Length: 1 << 20}) {
		t.Errorf("dmsnap:changed of an alias: %v, %v", e, err)
	}
	st := mustJSON[api.Status](t, "status", "--control", r.control)
	if s := st.Snapshots[0]; !s.Merged || s.State != "ok" || s.Exceptions != 0 || st.Merge.State != api.MergeDone {
		t.Errorf("status %+v", st)
	}
	mustRun(t, "merge", "--control", r.control, "disk", "--wait") // once more changes nothing
	mustRun(t, "drop", "--control", r.control, "disk")
	copy(want[1000:], "alias")
	if !bytes.Equal(readAll(t, r.Origin()), want) {
		t.Error("the origin changed when the merged snapshot was dropped")
	}
	r.stop()
	wantContent(t, p.origin, want)
}

func TestLiveMergePausedDroppedAndResumed(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	other := filepath.Join(p.dir, "other.cow")
	mustRun(t, "create", p.origin, other)
	// The merge stands still before its first step until it has been paused.
	paused := make(chan struct{})
	r := start(t, p, serveOptions{merge: merge.Options{Window: 1, Progress: func(merge.Progress) { <-paused }}}, p.cow, other)
	dmsnap("merge", "--control", r.control).wantRefused(t, "NAME is required")
	dmsnap("merge", "--control", r.control, "--pause").wantRefused(t, "no merge was started")
	dmsnap("merge", "--control", r.control, "nobody").wantRefused(t, `no snapshot "nobody"`)

	v := r.dev("disk")
	if _, err := r.StartMerge("disk"); err != nil {
		t.Fatal(err)
	}
	m := mustJSON[api.Merge](t, "merge", "--control", r.control, "--pause")
	close(paused)
	if m.State != api.MergePaused {
		t.Fatalf("paused: %+v", m)
	}
	st := mustJSON[api.Status](t, "status", "--control", r.control).Snapshots[0]
	if st.State != api.StateMerging || st.Merged || st.Exceptions < 4 {
		t.Errorf("status of a paused merge: %+v", st)
	}
	if !bytes.Equal(readAll(t, r.Origin()), shown) || !bytes.Equal(readAll(t, v), shown) {
		t.Error("a paused merge does not show the merged content")
	}
	dmsnap("drop", "--control", r.control, "disk").wantRefused(t, "is being merged")
	dmsnap("merge", "--control", r.control, "other").wantRefused(t, "one merge at a time")
	dmsnap("merge", "--control", r.control, "other", "--resume").wantRefused(t, "the current merge is of disk")
	dmsnap("snapshot", "--control", r.control, "new", filepath.Join(p.dir, "new.cow"), "--create").wantRefused(t, "being merged")

	// The server ends in the middle; served again, the snapshot is right and the merge goes on.
	r.stop()
	if st := mustJSON[inspect.Status](t, "status", p.cow); st.Exceptions < 4 {
		t.Errorf("%d exceptions left on disk, want all but one", st.Exceptions)
	}
	r = start(t, p, serveOptions{}, p.cow)
	if !bytes.Equal(readAll(t, r.dev("disk")), shown) {
		t.Error("the snapshot of a merge that was cut short shows something else")
	}
	if m := mustJSON[api.Merge](t, "merge", "--control", r.control, "--wait"); m.State != api.MergeDone {
		t.Errorf("resumed: %+v", m)
	}
	r.stop()
	wantContent(t, p.origin, shown)
}

func TestLiveMergeRefusals(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	small := filepath.Join(p.dir, "small.cow")
	mustRun(t, "create", p.origin, small, "--cow-size", "16k")
	r := start(t, p, serveOptions{onFull: fullFlag{server.FullInvalidate}}, p.cow, small)
	r.dev("small").WriteAt(bytes.Repeat([]byte("full"), 10_000), 0)
	if st := r.Status().Snapshots[1]; st.State != "invalid" || st.Valid || st.Dmsetup != "Invalid" {
		t.Errorf("a full COW file: %+v", st)
	}
	dmsnap("merge", "--control", r.control, "small").wantRefused(t, "invalid")
	r.stop()

	scratch := filepath.Join(p.dir, "scratch")
	r = start(t, p, serveOptions{create: true, store: storeFlag{snapshot.Transient}}, scratch)
	writeAt(t, r.dev("scratch"), []byte("gone tomorrow"), 0)
	dmsnap("merge", "--control", r.control, "scratch").wantRefused(t, "a transient exception store can't be merged")
	if got := readAll(t, r.dev("scratch")); string(got[:13]) != "gone tomorrow" || !bytes.Equal(got[13:], p.content[13:]) {
		t.Error("after the refused merge the snapshot shows something else")
	}
	r.stop()
	wantContent(t, p.origin, p.content)
}

func TestServeReadOnly(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	before := digests(t, p.dir)
	r := start(t, p, serveOptions{readOnly: true, exportOrigin: true}, p.cow)
	if !bytes.Equal(readAll(t, r.dev("disk")), shown) {
		t.Error("wrong content")
	}
	if _, err := r.dev("disk").WriteAt([]byte("x"), 100); err == nil {
		t.Error("a write to a read-only snapshot worked")
	}
	dmsnap("merge", "--control", r.control, "disk").wantRefused(t, "read-only")
	dmsnap("snapshot", "--control", r.control, "new", p.cow+"2", "--create").wantRefused(t, "read-only")
	r.stop()
	wantSame(t, p.dir, before)
}

// With an origin and no more, ORIGIN.cow is made the first time and used the second.
func TestServeMakesItsOwnCOWFile(t *testing.T) {
	p := newPair(t)
	for i := range 2 {
		r := start(t, p, serveOptions{})
		s := r.Status().Snapshots[0]
		if s.Name != "disk.img" || s.COW != p.origin+".cow" || s.Exceptions != uint64(i) {
			t.Errorf("served %+v", s)
		}
		writeAt(t, r.dev("disk.img"), []byte("kept"), 0)
		r.stop()
	}
}

// A COW path need not be UTF-8: it is the file of that name that is used, and JSON stays JSON.
func TestPathsThatAreNotUTF8(t *testing.T) {
	p := newPair(t)
	r := start(t, p, serveOptions{create: true}, filepath.Join(p.dir, "first\xfe.cow"))
	path := filepath.Join(p.dir, "odd\xff\xfe.cow")
	s := mustJSON[api.Snapshot](t, "snapshot", "--control", r.control, "odd", path, "--create")
	if string(s.COWBase64) != path || !strings.Contains(s.COW, "odd\ufffd") {
		t.Errorf("%+v", s)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
	if st := mustJSON[api.Status](t, "status", "--control", r.control); len(st.Snapshots) != 2 || st.Snapshots[0].Name != "first_" ||
		string(st.Snapshots[1].COWBase64) != path {
		t.Errorf("%+v", st)
	}
	writeAt(t, dial(t, r.uri("first_")), []byte("x"), 0)
	dmsnap("snapshot", "--control", r.control, "\xff", path+"2", "--create").wantRefused(t, "name")
	mustRun(t, "drop", "--control", r.control, "odd")
	if st := mustJSON[inspect.Status](t, "status", path); !st.Valid {
		t.Errorf("%+v", st)
	}
	if entries, err := os.ReadDir(p.dir); err != nil || len(entries) != 5 { // origin, two COW files, two sockets
		t.Errorf("%v, %v", entries, err)
	}
}

// Help that could not be written is a failure, too.
func TestHelpToAFullDisk(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skipf("SKIPPED: %v", err)
	}
	defer full.Close()
	for _, args := range []string{"help", "--help", "help create", "create --help", "serve -h", "completion bash", "version"} {
		var stderr bytes.Buffer
		if status := run(strings.Fields(args), strings.NewReader(""), full, &stderr); status != exitTrouble || !strings.Contains(stderr.String(), "no space left") {
			t.Errorf("%s: status %d, %s", args, status, &stderr)
		}
	}
}

// TestDefaultCOW: the default COW file is beside the origin, whatever its path has; a "=" names no snapshot.
func TestDefaultCOW(t *testing.T) {
	for origin, want := range map[string]string{"disk.img": "disk.img", "a=b.img": "a=b.img", "/x/a=b.img": "a=b.img"} {
		list := (&serveOptions{}).attachments(origin, nil)
		if len(list) != 1 || list[0].Name != want || list[0].COW != origin+".cow" || !list[0].Create {
			t.Errorf("%s: %+v", origin, list)
		}
	}
}
