package served_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/fleet/daemon"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/internal/testremote"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/publish"
	"github.com/dmsnap/dmsnap/served"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/cache"
	"github.com/dmsnap/dmsnap/source/ondemand"
	"github.com/dmsnap/dmsnap/source/remote"
	"github.com/dmsnap/dmsnap/stream"
)

const diskSize = 16 << 20

// A world is a daemon with the node vm1, over a disk of random content.
type world struct {
	t    *testing.T
	dir  string
	ctl  *api.Client
	stop func()
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: testhost.ShortDir(t)}
	content := append(blocktest.Pattern(diskSize/2, 1), make([]byte, diskSize/2)...)
	if err := os.WriteFile(w.path("golden.img"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	w.start()
	t.Cleanup(func() {
		w.stop()
		files, err := filepath.Glob(w.path("f/layers/*.cow"))
		if err != nil || len(files) == 0 {
			t.Error("no layers: ", err)
		}
		for _, name := range files {
			dev, err := block.Open(name, block.Options{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			if r, err := check.Run(context.Background(), dev, check.Options{}); err != nil || len(r.Findings) > 0 {
				t.Errorf("%s: %v %v", name, r.Findings, err)
			}
			dev.Close()
		}
	})
	if _, err := w.ctl.AddDisk(t.Context(), api.AddDiskRequest{Name: "golden", Source: w.path("golden.img"), Raw: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.ctl.Fork(t.Context(), api.ForkRequest{From: "golden", Name: "vm1"}); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

// start starts the daemon and waits until it can be asked.
func (w *world) start() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan struct{}), make(chan error, 1)
	c := daemon.Config{Dir: w.path("f"), AllowPaths: []string{w.dir}, Group: -1}
	go func() { ended <- c.Serve(ctx, nil, fleet.Options{}, func([]string) { close(ready) }) }()
	select {
	case <-ready:
	case err := <-ended:
		w.t.Fatal(err)
	}
	w.ctl = api.NewClient(w.path("f/control.sock"))
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			w.t.Error(err)
		}
	})
}

// dial connects to an export.
func (w *world) dial(name string) *nbd.Client {
	w.t.Helper()
	c, err := nbd.Dial(w.t.Context(), nbd.URI{Network: "unix", Address: w.path("f/nbd.sock"), Export: name}.String())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c
}

func (w *world) checkpoint(name string) {
	w.t.Helper()
	if _, err := w.ctl.Checkpoint(w.t.Context(), api.CheckpointRequest{Nodes: []string{"vm1"}, Name: name}); err != nil {
		w.t.Fatal(err)
	}
}

// write writes at random to a device, n times.
func write(t testing.TB, dev block.Device, r *rand.Rand, n int) {
	t.Helper()
	for range n {
		off := r.Int64N(dev.Size()/512) * 512
		p := blocktest.Pattern(int(min(dev.Size()-off, 512*(1+r.Int64N(60)))), r.Uint64())
		if r.IntN(4) == 0 {
			clear(p)
		}
		if _, err := dev.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
}

// shown is what an export shows; of a disk, what is beneath the nodes.
func (w *world) shown(name string) []byte {
	w.t.Helper()
	if name == "golden" {
		name = "golden@~0"
	}
	c := w.dial(name)
	defer c.Close()
	return contentOf(w.t, c)
}

func contentOf(t testing.TB, dev block.Device) []byte {
	t.Helper()
	p := make([]byte, dev.Size())
	if _, err := dev.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// send sends what a server keeps.
func send(ctx context.Context, ctl *api.Client, name, since string, w io.Writer) (*served.Disk, stream.Count, error) {
	d, err := served.Open(ctx, ctl, name, since, source.NBDOptions{})
	if err != nil {
		return nil, stream.Count{}, err
	}
	count, err := stream.Send(ctx, w, d.Source, stream.SendOptions{Complete: d.Check})
	return d, count, errors.Join(err, d.Close())
}

func apply(ctx context.Context, s io.Reader, target block.Device) (stream.Applied, error) {
	r, err := stream.NewReader(s)
	if err != nil {
		return stream.Applied{}, err
	}
	return r.Apply(ctx, target, stream.ApplyOptions{})
}

// TestWhileWriting has a client write all the time. A copy at the other end becomes each checkpoint in turn, now and then that
// of a node at the moment of sending, by what changed alone.
func TestWhileWriting(t *testing.T) {
	w := newWorld(t)
	var writers sync.WaitGroup
	ending := make(chan struct{})
	c := w.dial("vm1")
	writers.Go(func() {
		for r := rand.New(rand.NewPCG(7, 7)); ; {
			select {
			case <-ending:
				return
			default:
				write(t, c, r, 1)
			}
		}
	})
	defer writers.Wait()
	defer close(ending)
	r := rand.New(rand.NewPCG(1, 2))
	var mu sync.Mutex
	target, last, whole := block.NewMemory(diskSize), "", int64(0)
	rounds := 25
	if testing.Short() {
		rounds = 8
	}
	for i := range rounds {
		name := "vm1"
		if r.IntN(3) > 0 {
			name = "vm1@c" + strconv.Itoa(i)
			w.checkpoint("c" + strconv.Itoa(i))
		}
		var s bytes.Buffer
		mu.Lock()
		d, count, err := send(t.Context(), w.ctl, name, last, &s)
		mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			whole = count.Data
		} else if count.Data+count.Zero == 0 || d.Since != last {
			t.Fatalf("%s since %s: %+v", d.Name, d.Since, count)
		}
		before := contentOf(t, target)
		if _, err := apply(t.Context(), &s, target); err != nil {
			t.Fatalf("%s since %q: %v", name, last, err)
		}
		shown := w.shown(d.Name)
		if !bytes.Equal(contentOf(t, target), shown) {
			t.Fatalf("the copy is not %s", d.Name)
		}
		if i > 0 { // it has what differs, and no more than the chunks that were written
			differs := int64(0)
			for off := 0; off < diskSize; off += stream.Block {
				if !bytes.Equal(before[off:off+stream.Block], shown[off:off+stream.Block]) {
					differs += stream.Block
				}
			}
			if sent := count.Data + count.Zero; sent < differs || sent > 4*differs+64<<10 {
				t.Errorf("%s: %d bytes were sent, and %d differ", d.Name, sent, differs)
			}
		}
		last = d.Name
	}
	if whole == 0 || whole > diskSize {
		t.Errorf("the whole disk has %d bytes", whole)
	}
}

// TestNames has what can be sent, and what it can be compared with.
func TestNames(t *testing.T) {
	w := newWorld(t)
	c := w.dial("vm1")
	r := rand.New(rand.NewPCG(3, 3))
	write(t, c, r, 5)
	w.checkpoint("one")
	write(t, c, r, 5)
	w.checkpoint("two")
	if _, err := w.ctl.Fork(t.Context(), api.ForkRequest{From: "vm1@two", Name: "vm2", Size: 2 * diskSize}); err != nil {
		t.Fatal(err)
	}
	write(t, w.dial("vm2"), r, 5)
	w.checkpoint("three") // nothing was written
	for _, c := range []struct{ name, since, is, was, err string }{
		{"vm1@two", "", "vm1@two", "", ""},
		{"vm1@two", "vm1@one", "vm1@two", "vm1@one", ""},
		{"vm1@two", "one", "vm1@two", "vm1@one", ""},
		{"vm1@two", "golden", "vm1@two", "golden", ""},
		{"vm1@two", "two", "vm1@two", "vm1@two", ""},
		{"vm1", "vm1@two", "vm1@three", "vm1@two", ""},
		{"vm2", "vm1@two", "vm2@~3", "vm1@two", ""},
		{"vm1@one", "vm1@two", "", "", "it is made of golden, vm1@one"},
		{"vm2", "vm1@three", "", "", "it is made of golden, vm1@one, vm1@two, vm2@~"},
		{"vm3", "", "", "", "no node"},
		{"vm1@four", "", "", "", "no disk, node or checkpoint"},
		{"golden", "", "", "", "no node"},
	} {
		var s bytes.Buffer
		d, _, err := send(t.Context(), w.ctl, c.name, c.since, &s)
		if c.err != "" || err != nil {
			if err == nil || c.err == "" || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s since %q: %v", c.name, c.since, err)
			}
			continue
		}
		if c.is == "vm2@~3" && strings.HasPrefix(d.Name, "vm2@~") {
			c.is = d.Name
		}
		if d.Name != c.is || d.Since != c.was {
			t.Errorf("%s since %q: sent %q since %q", c.name, c.since, d.Name, d.Since)
		}
		target := block.NewMemory(d.Source.Size())
		if d.Since != "" {
			if _, err := target.WriteAt(w.shown(d.Since), 0); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := apply(t.Context(), &s, target); err != nil {
			t.Errorf("%s since %q: %v", c.name, c.since, err)
		}
		if !bytes.Equal(contentOf(t, target), w.shown(d.Name)) {
			t.Errorf("%s since %q: the copy differs", c.name, c.since)
		}
	}
}

// breaking fails after some bytes, or calls a function then.
type breaking struct {
	w    io.Writer
	left int
	then func() error
}

func (b *breaking) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		if err := b.then(); err != nil {
			return 0, err
		}
		b.left = 1 << 30
	}
	return b.w.Write(p)
}

// TestInterrupted has the receiver, the sender's context and the daemon end in the middle. Nothing stays in use, and a further
// sending from where the receiver was completes the copy.
func TestInterrupted(t *testing.T) {
	w := newWorld(t)
	write(t, w.dial("vm1"), rand.New(rand.NewPCG(5, 5)), 20)
	w.checkpoint("one")
	boom := errors.New("boom")
	for what, end := range map[string]func(cancel context.CancelFunc) error{
		"the receiver ends": func(context.CancelFunc) error { return boom },
		"cancelled":         func(cancel context.CancelFunc) error { cancel(); return nil },
		"the daemon ends":   func(context.CancelFunc) error { w.stop(); return nil },
	} {
		ctx, cancel := context.WithCancel(t.Context())
		var s bytes.Buffer
		d, err := served.Open(ctx, w.ctl, "vm1@one", "", source.NBDOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err = stream.Send(ctx, &breaking{&s, 100_000, func() error { return end(cancel) }}, d.Source, stream.SendOptions{}); err == nil {
			t.Errorf("%s: the stream was completed", what)
		}
		d.Close()
		cancel()
		target := block.NewMemory(diskSize)
		r, err := stream.NewReader(bytes.NewReader(s.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		got, err := r.Apply(t.Context(), target, stream.ApplyOptions{CompareFirst: 1})
		if err == nil {
			t.Fatalf("%s: a part was taken for the whole", what)
		}
		if what == "the daemon ends" {
			w.start()
		}
		rest, err := served.Open(t.Context(), w.ctl, "vm1@one", "", source.NBDOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var more bytes.Buffer
		if _, err := stream.Send(t.Context(), &more, rest.Source, stream.SendOptions{From: got.Reached}); err != nil {
			t.Fatal(err)
		}
		rest.Close()
		if _, err := apply(t.Context(), &more, target); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if !bytes.Equal(contentOf(t, target), w.shown("vm1@one")) {
			t.Errorf("%s: the copy differs", what)
		}
	}
	// Nothing holds the checkpoint: its file goes with it.
	for _, drop := range []func() error{func() error { return w.ctl.DropNode(t.Context(), "vm1") }, func() error { return w.ctl.DropCheckpoint(t.Context(), "vm1@one") }} {
		if err := drop(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.ctl.Fork(t.Context(), api.ForkRequest{From: "golden", Name: "vm2"}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		files, err := filepath.Glob(w.path("f/layers/*.cow"))
		if err != nil {
			t.Fatal(err)
		}
		if len(files) == 1 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("files are left: %q", files)
		}
	}
}

// TestSnapshots sends snapshots of a served disk while the origin is written. A snapshot that a client writes to is no state.
func TestSnapshots(t *testing.T) {
	dir := testhost.ShortDir(t)
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(path("disk.img"), blocktest.Pattern(diskSize, 1), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := server.Open(path("disk.img"), server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.ExportOrigin(); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 1))
	attach := func(name string) {
		t.Helper()
		if _, err := s.Attach(api.AttachRequest{Name: name, COW: path(name + ".cow"), Create: true}); err != nil {
			t.Fatal(err)
		}
		write(t, s.Origin(), r, 10)
	}
	attach("monday")
	attach("tuesday")
	l, err := server.ListenUnix(path("nbd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	control, err := server.ListenUnix(path("ctl.sock"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	wait := s.Start(ctx, l, control)
	defer func() {
		cancel()
		if err := errors.Join(wait(), s.Close()); err != nil {
			t.Error(err)
		}
		for _, name := range []string{"monday.cow", "tuesday.cow"} {
			dev, err := block.Open(path(name), block.Options{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			if rep, err := check.Run(context.Background(), dev, check.Options{}); err != nil || !rep.Clean() {
				t.Errorf("%s: %v, %v", name, rep, err)
			}
			dev.Close()
		}
	}()
	ctl := api.NewClient(path("ctl.sock"))
	target := block.NewMemory(diskSize)
	for i, name := range []string{"monday", "tuesday"} {
		var b bytes.Buffer
		since := []string{"", "monday"}[i]
		out := &breaking{&b, 1000, func() error { write(t, s.Origin(), r, 5); return nil }}
		d, count, err := send(t.Context(), ctl, name, since, out)
		if err != nil {
			t.Fatal(err)
		}
		if d.Name != name || d.Since != since || i == 1 && count.Data+count.Zero == 0 {
			t.Errorf("%+v, %+v", d, count)
		}
		if _, err := apply(t.Context(), &b, target); err != nil {
			t.Fatal(err)
		}
		dev, err := s.Device(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(contentOf(t, target), contentOf(t, dev)) {
			t.Errorf("the copy is not %s", name)
		}
	}
	for _, written := range []string{"monday", "tuesday"} {
		dev, err := s.Device(written)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		_, _, err = send(t.Context(), ctl, "tuesday", "monday", &breaking{&b, 500, func() error { write(t, dev, r, 1); return nil }})
		if err == nil || !strings.Contains(err.Error(), "was written to") {
			t.Errorf("%s was written: %v", written, err)
		}
		if _, err := apply(t.Context(), &b, block.NewMemory(diskSize)); err == nil {
			t.Error("the stream is taken for a whole one")
		}
	}
	if _, _, err := send(t.Context(), ctl, "wednesday", "", io.Discard); err == nil || !strings.Contains(err.Error(), "wednesday") {
		t.Errorf("a snapshot that there is not: %v", err)
	}
	if _, err := s.StartMerge("monday"); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][2]string{{"monday", ""}, {"tuesday", "monday"}} {
		if _, _, err := send(t.Context(), ctl, c[0], c[1], io.Discard); err == nil || !strings.Contains(err.Error(), "is merged") {
			t.Errorf("%q: %v", c, err)
		}
	}
}

// TestPush pushes a node again and again while it is written: the base is written once, and of what follows what is new.
func TestPush(t *testing.T) {
	w := newWorld(t)
	host := testremote.Start(t, testremote.NewRegistry())
	blobs, err := cache.Open(t.TempDir(), cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer blobs.Close()
	c := w.dial("vm1")
	r := rand.New(rand.NewPCG(9, 9))
	push := func(name, tag string) publish.Pushed {
		t.Helper()
		repo, err := remote.Open(host+"/vms/vm1:"+tag, remote.Options{})
		if err != nil {
			t.Fatal(err)
		}
		tree, err := served.OpenTree(t.Context(), w.ctl, name, source.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer tree.Close()
		got, err := tree.Push(t.Context(), repo, publish.Options{Temp: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		d, err := ondemand.Open(t.Context(), host+"/vms/vm1:"+tag, ondemand.Options{Cache: blobs})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if !bytes.Equal(contentOf(t, d), w.shown(tree.Name)) {
			t.Errorf("%s: what was pushed is not %s", tag, tree.Name)
		}
		return got
	}
	first := push("vm1", "empty")
	if first.Layers != 1 || first.Written < diskSize/4 {
		t.Errorf("%+v", first)
	}
	write(t, c, r, 10)
	w.checkpoint("one")
	write(t, c, r, 3)
	if one := push("vm1@one", "one"); one.Layers != 2 || one.Written > first.Written/2 {
		t.Errorf("%+v after %+v", one, first)
	}
	if _, err := w.ctl.Fork(t.Context(), api.ForkRequest{From: "vm1", Name: "vm2"}); err != nil { // leaves a checkpoint without a name
		t.Fatal(err)
	}
	write(t, c, r, 3)
	w.checkpoint("two")
	if two := push("vm1@two", "two"); two.Layers != 3 || two.Written > first.Written/2 {
		t.Errorf("%+v", two)
	}
	if again := push("vm1@two", "again"); again.Written != 0 {
		t.Errorf("pushed again: %+v", again)
	}
	if now := push("vm1", "now"); now.Layers != 3 {
		t.Errorf("nothing was written: %+v", now)
	}
	// Another host has the tree as files, and shows the same.
	d, err := ondemand.Open(t.Context(), host+"/vms/vm1:two", ondemand.Options{Cache: blobs})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	files, err := publish.Pull(t.Context(), d, t.TempDir(), publish.Options{Cache: blobs})
	if err != nil || len(files) != 3 {
		t.Fatalf("%+v, %v", files, err)
	}
	for _, f := range files[1:] {
		dev, err := block.Open(f.Path, block.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		if rep, err := check.Run(t.Context(), dev, check.Options{}); err != nil || !rep.Clean() {
			t.Errorf("%s: %v, %v", f.Path, rep, err)
		}
		dev.Close()
	}
}
