package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A running server, within this process.
type running struct {
	*server
	control string
	stop    func() // ends it as a signal would, and checks that it ended well
}

// start serves a pair.
func start(t *testing.T, p pair, o serveOptions, cows ...string) *running {
	t.Helper()
	o.socket, o.control = filepath.Join(p.dir, "nbd.sock"), filepath.Join(p.dir, "control.sock")
	s, err := o.open(p.origin, cows, func(line string) { t.Log(line) })
	if err != nil {
		t.Fatal(err)
	}
	l, err := o.listener(p.origin)
	if err != nil {
		t.Fatal(err)
	}
	ctl, err := listenUnix(o.control)
	if err != nil {
		t.Fatal(err)
	}
	s.uri = func(name string) string { return exportURI(l.Addr(), name, false) }
	ctx, cancel := context.WithCancelCause(context.Background())
	ended := make(chan error)
	go func() { ended <- s.serve(ctx, l, ctl, io.Discard) }()
	r := &running{server: s, control: o.control}
	var once sync.Once
	r.stop = func() {
		once.Do(func() {
			cancel(interrupted{15})
			if err := errors.Join(<-ended, s.close()); err != nil {
				t.Errorf("the server ended with %v", err)
			}
			for _, path := range []string{o.socket, o.control} {
				if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left: %v", path, err)
				}
			}
		})
	}
	t.Cleanup(r.stop)
	return r
}

// dev returns the device behind the export of a snapshot.
func (r *running) dev(name string) *switchable {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.find(name).dev
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
	got := mustJSON[serverReply](t, "status", "--control", r.control)
	socket := "?socket=" + filepath.Join(p.dir, "nbd.sock")
	want := originStatus{Path: p.origin, SizeBytes: int64(len(p.content)), URI: "nbd+unix:///origin" + socket}
	if got.Origin != want || got.Merge != nil || len(got.Snapshots) != 1 {
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
			if _, err := r.origin.WriteAt([]byte{byte(rnd.Uint32())}, rnd.Int64N(500_000)); err != nil {
				t.Error(err)
			}
		}
	})
	monday := filepath.Join(p.dir, "monday.cow")
	s := mustJSON[snapshotStatus](t, "snapshot", "--control", r.control, "monday", monday, "--create", "--chunk-size", "16k", "--store", "PO")
	if s.Name != "monday" || s.ChunkSectors != 32 || s.Store != "PO" || !strings.Contains(s.URI, "/monday?") {
		t.Errorf("attached %+v", s)
	}
	at := readAll(t, r.dev("monday"))
	cancel()
	client.Wait()
	writeAt(t, r.origin, bytes.Repeat([]byte("x"), 300_000), 600_000)
	if !bytes.Equal(readAll(t, r.dev("monday")), at) {
		t.Error("the snapshot changed with its origin")
	}
	if !bytes.Equal(at[600_000:], p.content[600_000:]) || !bytes.Equal(readAll(t, r.dev("disk")), p.content) {
		t.Error("a snapshot does not show the origin as it was when it was attached")
	}
	dmsnap("snapshot", "--control", r.control, "monday", monday).wantRefused(t, `"monday" is taken`)
	dmsnap("snapshot", "--control", r.control, "origin", monday).wantRefused(t, `"origin" is taken`)
	dmsnap("snapshot", "--control", r.control, "other", monday).wantRefused(t, monday, "in use")
	dmsnap("snapshot", "--control", r.control, "other", p.origin).wantRefused(t, "cannot be the same")
	dmsnap("snapshot", "--control", r.control, "other", filepath.Join(p.dir, "none")).wantRefused(t, "no such file")
	if out := mustRun(t, "drop", "--control", r.control, "monday"); out != "monday dropped\n" {
		t.Errorf("drop said %q", out)
	}
	dmsnap("drop", "--control", r.control, "monday").wantRefused(t, `no snapshot "monday"`)
	if st := mustJSON[fileStatus](t, "status", monday); st.InUse || !st.Valid || st.Exceptions == 0 {
		t.Errorf("dropped store %+v", st)
	}
	if names := r.nbd.Names(); strings.Join(names, " ") != "disk origin" {
		t.Errorf("exports %q", names)
	}
}

// What was written and not flushed is on disk after a drop, after the timer, and after the end.
func TestNothingIsLostAtTheEnd(t *testing.T) {
	p := newPair(t)
	r := start(t, p, serveOptions{create: true}, p.cow)
	exceptions := func() uint64 { return mustJSON[fileStatus](t, "status", p.cow).Exceptions }
	writeAt(t, r.dev("disk"), []byte("one"), 0)
	if n := exceptions(); n != 0 {
		t.Fatalf("%d exceptions on disk before any flush", n)
	}
	r.flushDirty()
	if n := exceptions(); n != 1 {
		t.Errorf("%d exceptions on disk after the timer's flush, want 1", n)
	}
	writeAt(t, r.dev("disk"), []byte("two"), 100_000)
	r.stop()
	if n := exceptions(); n != 2 {
		t.Errorf("%d exceptions on disk after the end, want 2", n)
	}
	wantContent(t, p.origin, p.content)
}

func TestSyncAlways(t *testing.T) {
	p := newPair(t)
	r := start(t, p, serveOptions{create: true, sync: syncFlag{snapshot.SyncAlways}}, p.cow)
	writeAt(t, r.dev("disk"), []byte("one"), 0)
	if n := mustJSON[fileStatus](t, "status", p.cow).Exceptions; n != 1 {
		t.Errorf("%d exceptions on disk when the write returned, want 1", n)
	}
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
	m := mustJSON[mergeStatus](t, "merge", "--control", r.control, "disk")
	if m.Name != "disk" || m.TotalChunks == 0 {
		t.Errorf("merge %+v", m)
	}
	clients.Go(func() { client(r.origin, 500_000, 900_000, 3) })
	clients.Wait()
	m = mustJSON[mergeStatus](t, "merge", "--control", r.control, "--wait")
	if m.State != merge.Done || m.MergedChunks != m.TotalChunks || m.Percent != 100 {
		t.Errorf("at the end: %+v", m)
	}
	if !bytes.Equal(readAll(t, r.origin), want) || !bytes.Equal(readAll(t, snap), want) {
		t.Error("origin or export has another content than was written")
	}
	if !bytes.Equal(readAll(t, r.dev("other")), p.content) {
		t.Error("the other snapshot changed")
	}
	writeAt(t, snap, []byte("alias"), 1000)
	if got := readAll(t, r.origin)[1000:1005]; string(got) != "alias" {
		t.Errorf("the export is no alias of the origin: %q", got)
	}
	if e, err := snap.Changed(0, 1<<20); err != nil || len(e) != 1 || e[0] != (block.Extent{Length: 1 << 20}) {
		t.Errorf("dmsnap:changed of an alias: %v, %v", e, err)
	}
	st := mustJSON[serverReply](t, "status", "--control", r.control)
	if s := st.Snapshots[0]; !s.Merged || s.State != "ok" || s.Exceptions != 0 || st.Merge.State != merge.Done {
		t.Errorf("status %+v", st)
	}
	mustRun(t, "merge", "--control", r.control, "disk", "--wait") // once more changes nothing
	mustRun(t, "drop", "--control", r.control, "disk")
	copy(want[1000:], "alias")
	if !bytes.Equal(readAll(t, r.origin), want) {
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
	r := start(t, p, serveOptions{}, p.cow, other)
	dmsnap("merge", "--control", r.control).wantRefused(t, "NAME is needed")
	dmsnap("merge", "--control", r.control, "--pause").wantRefused(t, "no merge was started")
	dmsnap("merge", "--control", r.control, "nobody").wantRefused(t, `no snapshot "nobody"`)

	// A merge that stands still: its driver is replaced by one that is paused before its first step.
	v := r.find("disk")
	if err := r.startPaused("disk"); err != nil {
		t.Fatal(err)
	}
	m := mustJSON[mergeStatus](t, "merge", "--control", r.control, "--pause")
	if m.State != merge.Paused {
		t.Fatalf("paused: %+v", m)
	}
	st := mustJSON[serverReply](t, "status", "--control", r.control).Snapshots[0]
	if st.State != snapshot.StateMerging || st.Merged || st.Exceptions < 4 {
		t.Errorf("status of a paused merge: %+v", st)
	}
	if !bytes.Equal(readAll(t, r.origin), shown) || !bytes.Equal(readAll(t, v.dev), shown) {
		t.Error("a paused merge does not show the merged content")
	}
	dmsnap("drop", "--control", r.control, "disk").wantRefused(t, "is being merged")
	dmsnap("merge", "--control", r.control, "other").wantRefused(t, "one merge at a time")
	dmsnap("merge", "--control", r.control, "other", "--resume").wantRefused(t, "the merge is of disk")
	dmsnap("snapshot", "--control", r.control, "new", filepath.Join(p.dir, "new.cow"), "--create").wantRefused(t, "being merged")

	// The server ends in the middle; served again, the snapshot is right and the merge goes on.
	r.stop()
	if st := mustJSON[fileStatus](t, "status", p.cow); st.Exceptions < 4 {
		t.Errorf("%d exceptions left on disk, want all but one", st.Exceptions)
	}
	r = start(t, p, serveOptions{}, p.cow)
	if !bytes.Equal(readAll(t, r.dev("disk")), shown) {
		t.Error("the snapshot of a merge that was cut short shows something else")
	}
	if m := mustJSON[mergeStatus](t, "merge", "--control", r.control, "--wait"); m.State != merge.Done {
		t.Errorf("resumed: %+v", m)
	}
	r.stop()
	wantContent(t, p.origin, shown)
}

// startPaused is startMerge with a driver that is paused before its second step.
func (s *server) startPaused(name string) error {
	pause := make(chan struct{})
	defer close(pause)
	s.drive = func(m *snapshot.Merging) *merge.Driver {
		d := merge.Start(m, merge.Options{Window: 1, Progress: func(merge.Progress) { <-pause }})
		d.Pause()
		return d
	}
	return s.startMerge(name)
}

func TestLiveMergeRefusals(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	small := filepath.Join(p.dir, "small.cow")
	mustRun(t, "create", p.origin, small, "--cow-size", "16k")
	r := start(t, p, serveOptions{}, p.cow, small)
	r.dev("small").WriteAt(bytes.Repeat([]byte("full"), 10_000), 0)
	if st := r.status().Snapshots[1]; st.State != "invalid" || st.Valid || st.Dmsetup != "Invalid" {
		t.Errorf("a full COW file: %+v", st)
	}
	dmsnap("merge", "--control", r.control, "small").wantRefused(t, "invalid")
	r.stop()

	scratch := filepath.Join(p.dir, "scratch")
	r = start(t, p, serveOptions{create: true, store: storeFlag{snapshot.Transient}}, scratch)
	writeAt(t, r.dev("scratch"), []byte("gone tomorrow"), 0)
	dmsnap("merge", "--control", r.control, "scratch").wantRefused(t, "does not support snapshot-merge")
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
		s := r.status().Snapshots[0]
		if s.Name != "disk.img" || s.COW != p.origin+".cow" || s.Exceptions != uint64(i) {
			t.Errorf("served %+v", s)
		}
		writeAt(t, r.dev("disk.img"), []byte("kept"), 0)
		r.stop()
	}
}

func TestExportNames(t *testing.T) {
	o := serveOptions{}
	for arg, want := range map[string][2]string{
		"disk.cow":        {"disk", "disk.cow"},
		"/a/b/disk.1.cow": {"disk.1", "/a/b/disk.1.cow"},
		"plain":           {"plain", "plain"},
		".cow":            {".cow", ".cow"},
		"a=b.cow":         {"a", "b.cow"},
		"a=b=c":           {"a", "b=c"},
		"./a=b.cow":       {"a=b", "./a=b.cow"},
		"ü 1=x":           {"ü 1", "x"},
	} {
		if a := o.attachments("o", []string{arg})[0]; a.name != want[0] || a.cow != want[1] {
			t.Errorf("%q: name %q, path %q, want %q", arg, a.name, a.cow, want)
		}
	}
}

func TestExportURI(t *testing.T) {
	unix := &net.UnixAddr{Net: "unix", Name: "/run/a b&c?d+e%.sock"}
	tcp := &net.TCPAddr{IP: net.IPv6loopback, Port: 10809}
	for _, c := range []struct {
		l    net.Addr
		name string
		want string
	}{
		{unix, "snap", "nbd+unix:///snap?socket=/run/a%20b%26c%3Fd%2Be%25.sock"},
		{tcp, "snap", "nbd://[::1]/snap"},
		{tcp, "a/b c?#ü%", "nbd://[::1]/a/b%20c%3F%23%C3%BC%25"},
		{tcp, "", "nbd://[::1]/"},
	} {
		if got := exportURI(c.l, c.name, false); got != c.want {
			t.Errorf("URI of %q: %s, want %s", c.name, got, c.want)
		}
	}
}

// The API's own manners: codes, bounds, strictness.
func TestControlAPI(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	r := start(t, p, serveOptions{}, p.cow)
	if info, err := os.Stat(r.control); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("control socket: %v, %v, want mode 0600", info.Mode(), err)
	}
	if info, err := os.Stat(filepath.Join(p.dir, "nbd.sock")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("NBD socket: %v, %v, want mode 0600", info.Mode(), err)
	}
	c := newController(r.control)
	for _, q := range []struct {
		method, path, body string
		status             int
		code               string
	}{
		{"GET", "/v1/status", "", 200, ""},
		{"GET", "/v1/snapshots/disk", "", 200, ""},
		{"GET", "/v1/snapshots/nobody", "", 404, "no_such_snapshot"},
		{"GET", "/v1/snapshots/a%2Fb", "", 404, "no_such_snapshot"},
		{"GET", "/v2/status", "", 404, "no_such_request"},
		{"PUT", "/v1/status", "", 404, "no_such_request"},
		{"GET", "/v1/merge", "", 404, "no_merge"},
		{"POST", "/v1/merge/pause", "", 404, "no_merge"},
		{"POST", "/v1/merge/resume", "", 404, "no_merge"},
		{"POST", "/v1/merge", `{"name":"nobody"}`, 404, "no_such_snapshot"},
		{"POST", "/v1/merge", `{"name":"disk","now":true}`, 400, "bad_request"},
		{"POST", "/v1/merge", ``, 400, "bad_request"},
		{"POST", "/v1/merge", `{"name":"disk"}{}`, 400, "bad_request"},
		{"POST", "/v1/merge", `[]`, 400, "bad_request"},
		{"POST", "/v1/merge", `{"name":"` + strings.Repeat("x", maxBody) + `"}`, 413, "too_large"},
		{"POST", "/v1/snapshots", `{"name":"disk","cow":"x"}`, 409, "name_taken"},
		{"POST", "/v1/snapshots", `{"name":"","cow":"x"}`, 400, "bad_name"},
		{"POST", "/v1/snapshots", `{"name":"..","cow":"x"}`, 400, "bad_name"},
		{"POST", "/v1/snapshots", `{"name":"/","cow":"x"}`, 400, "bad_name"},
		{"POST", "/v1/snapshots", `{"name":"new"}`, 400, "bad_request"},
		{"POST", "/v1/snapshots", `{"name":"new","cow":"x","chunk_size":7}`, 400, "bad_request"},
		{"POST", "/v1/snapshots", `{"name":"new","cow":"x","store":"Q"}`, 400, "bad_request"},
		{"POST", "/v1/snapshots", `{"name":"new","cow":"/nowhere/x","create":true}`, 422, "failed"},
		{"DELETE", "/v1/snapshots/nobody", "", 404, "no_such_snapshot"},
		{"POST", "/v1/merge?wait=x", `{"name":"disk"}`, 400, "bad_request"},
		{"GET", "/v1/merge?wait=61", "", 400, "bad_request"},
		{"GET", "/v1/merge?wait=60", "", 200, ""},
	} {
		req, err := http.NewRequest(q.method, "http://dmsnap"+q.path, strings.NewReader(q.body))
		if err != nil {
			t.Fatal(err)
		}
		got, err := c.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(got.Body)
		got.Body.Close()
		var e errorReply
		if err := json.Unmarshal(body, &e); err != nil || got.StatusCode != q.status || e.Error.Code != q.code || (q.code == "") != (e.Error.Message == "") {
			t.Errorf("%s %s %.60s: %d %s, want %d %q", q.method, q.path, q.body, got.StatusCode, body, q.status, q.code)
		}
	}
}

// A socket that nobody listens on is replaced; one that somebody listens on, and anything else, is not.
func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	l, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listenUnix(path); err == nil || !strings.Contains(err.Error(), "listens there already") {
		t.Errorf("a socket in use: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as if killed
	l.Close()
	if l, err = listenUnix(path); err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	writeFile(t, path, []byte("letter"))
	if _, err := listenUnix(path); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
	wantContent(t, path, []byte("letter"))
	if _, err := listenUnix("/tmp/" + strings.Repeat("x", 200)); err == nil || !strings.Contains(err.Error(), "107") {
		t.Errorf("a long path: %v", err)
	}
}

func TestListenTCPIsLoopbackUnlessAsked(t *testing.T) {
	for _, address := range []string{":0", "0", "localhost:0", "127.0.0.1:0"} {
		l, err := listenTCP(address)
		if err != nil {
			t.Fatal(err)
		}
		if a := l.Addr().(*net.TCPAddr); !a.IP.IsLoopback() {
			t.Errorf("--listen %s listens on %s", address, a)
		}
		l.Close()
	}
}
