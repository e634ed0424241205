package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
)

// A served is a daemon over a real fleet, with a disk "base" of 1 MiB.
type served struct {
	*api.Client
	config Config
	end    func()
}

func serve(t *testing.T, change func(*Config)) *served {
	t.Helper()
	dir := testhost.ShortDir(t)
	s := &served{config: Config{Dir: filepath.Join(dir, "f"), Group: -1, AllowPaths: []string{dir}, Log: func(line string) { t.Log(line) }}}
	if change != nil {
		change(&s.config)
	}
	disk := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(disk, bytes.Repeat([]byte("the base"), 128<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- s.config.Serve(ctx, nil, fleet.Options{Open: cowfile.OpenRaw}, func([]string) { close(ready) })
	}()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatal(err)
	}
	s.end = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the daemon ended with %v", err)
		}
	})
	t.Cleanup(s.end)
	s.Client = api.NewClient(s.config.control())
	if _, err := s.AddDisk(t.Context(), api.AddDiskRequest{Name: "base", Source: disk}); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *served) uri(name string) string {
	return (nbd.URI{Network: "unix", Address: s.config.socket(), Export: name}).String()
}

// wantSound ends the daemon, opens the directory again, and checks each layer.
func (s *served) wantSound(t *testing.T) {
	t.Helper()
	s.end()
	files, err := filepath.Glob(filepath.Join(s.config.Dir, "layers", "*.cow"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no layers: %v", err)
	}
	for _, path := range files {
		f, err := block.Open(path, block.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		if r, err := check.Run(context.Background(), f, check.Options{}); err != nil || !r.Clean() {
			t.Errorf("%s: %v, %v", path, r.Found, err)
		}
		f.Close()
	}
}

// What a request may be refused with while others change the same tree.
var expected = []api.Code{api.CodeNameTaken, api.CodeNoSuchNode, api.CodeNoSuchCheckpoint, api.CodeNoSuchElement, api.CodeHasChildren,
	api.CodeNotAncestor, api.CodeInUse}

// TestCrowd has 50 clients make requests of all kinds about few names, while others write. Nothing fails but in expected ways,
// events report what happened, and afterwards the tree is what its files are.
func TestCrowd(t *testing.T) {
	const clients = 50
	calls := 20
	if os.Getenv("DMSNAP_DEEP") != "" {
		calls = 200
	} else if testing.Short() {
		calls = 4
	}
	s := serve(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var events atomic.Int64
	watching := make(chan error, 1)
	go func() {
		watching <- s.Events(ctx, func(api.Event) error { events.Add(1); return nil })
	}()
	for i := range 4 {
		if _, err := s.Fork(ctx, api.ForkRequest{From: "base", Name: fmt.Sprintf("n%d", i)}); err != nil {
			t.Fatal(err)
		}
	}
	var all sync.WaitGroup
	var done, refused atomic.Int64
	for i := range clients {
		r := rand.New(rand.NewPCG(uint64(i), 7))
		all.Go(func() {
			for range calls {
				what, err := s.anyRequest(ctx, r)
				var e *api.Error
				switch {
				case err == nil:
					done.Add(1)
				case errors.As(err, &e) && slices.Contains(expected, e.Code):
					refused.Add(1)
				default:
					t.Errorf("%s: %v", what, err)
				}
			}
		})
	}
	writing, stop := context.WithCancel(ctx)
	var writers sync.WaitGroup
	for i := range 4 {
		writers.Go(func() {
			for n := 0; writing.Err() == nil; n++ {
				c, err := nbd.Dial(writing, s.uri(fmt.Sprintf("n%d", i)))
				if err != nil {
					time.Sleep(time.Millisecond) // dropped; another client makes it again
					continue
				}
				for m := range 20 {
					if _, err := c.WriteAt(fmt.Appendf(nil, "%d", n), int64(m)*4096); err != nil {
						break // dropped, or rolled back by force
					}
				}
				c.Close()
			}
		})
	}
	all.Wait()
	stop()
	writers.Wait()
	if done.Load() < int64(clients*calls/10) || events.Load() == 0 {
		t.Errorf("%d of %d requests were done, %d refused, %d events", done.Load(), clients*calls, refused.Load(), events.Load())
	}
	tree, err := s.Tree(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range tree.Elements {
		if e.State != api.ElementOK {
			t.Errorf("%s: %s %s", e.Name, e.State, e.Error)
		}
		if e.Kind == api.KindNode {
			c, err := nbd.Dial(ctx, s.uri(e.Name))
			if err != nil {
				t.Errorf("%s: %v", e.Name, err)
				continue
			}
			if _, err := c.ReadAt(make([]byte, 1<<20), 0); err != nil {
				t.Errorf("%s: %v", e.Name, err)
			}
			c.Close()
		}
	}
	s.wantSound(t)
	if err := <-watching; err != nil { // the end of the daemon
		t.Error(err)
	}
	t.Logf("%d requests done, %d refused, %d events", done.Load(), refused.Load(), events.Load())
}

// anyRequest makes a request.
func (s *served) anyRequest(ctx context.Context, r *rand.Rand) (what string, err error) {
	node := fmt.Sprintf("n%d", r.IntN(8))
	checkpoint := fmt.Sprintf("c%d", r.IntN(4))
	switch n := r.IntN(20); {
	case n < 4:
		from := []string{"base", fmt.Sprintf("n%d", r.IntN(8)), node + "@" + checkpoint}[r.IntN(3)]
		_, err = s.Fork(ctx, api.ForkRequest{From: from, Name: node})
		return "fork " + from + " " + node, err
	case n < 8:
		nodes := []string{node}
		if other := fmt.Sprintf("n%d", r.IntN(8)); other != node {
			nodes = append(nodes, other)
		}
		_, err = s.Checkpoint(ctx, api.CheckpointRequest{Nodes: nodes, Name: checkpoint})
		return "checkpoint " + strings.Join(nodes, " "), err
	case n < 10:
		return "drop " + node, s.DropNode(ctx, node)
	case n < 12:
		return "drop " + node + "@" + checkpoint, s.DropCheckpoint(ctx, node+"@"+checkpoint)
	case n < 14:
		_, err = s.Rollback(ctx, api.RollbackRequest{Node: node, Checkpoint: node + "@" + checkpoint, Force: true})
		return "rollback " + node, err
	case n < 15:
		target := []string{node, node + "@" + checkpoint}[r.IntN(2)]
		_, err = s.Squash(ctx, target)
		return "squash " + target, err
	case n < 16:
		_, err = s.SetPolicy(ctx, "base", map[string]string{"max-nodes": "100"})
		return "policy", err
	case n < 17:
		_, err = s.Table(ctx, node)
		return "table " + node, err
	case n < 18:
		_, err = s.Node(ctx, node)
		return "node " + node, err
	case n < 19:
		_, err = s.Daemon(ctx)
		return "daemon", err
	}
	_, err = s.Tree(ctx)
	return "tree", err
}

// The freeze command runs before and after, sees the nodes, and refuses the checkpoint when it fails.
func TestFreezeOfCheckpoints(t *testing.T) {
	dir := t.TempDir()
	out, fail := filepath.Join(dir, "out"), filepath.Join(dir, "fail")
	s := serve(t, func(c *Config) {
		c.Freeze.Command = fmt.Sprintf(`f() { echo "$1 $DMSNAP_NODES" >>%s; [ $1 = thaw ] || [ ! -e %s ]; }; f`, out, fail)
	})
	ctx := t.Context()
	for _, name := range []string{"a", "b"} {
		if _, err := s.Fork(ctx, api.ForkRequest{From: "base", Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Checkpoint(ctx, api.CheckpointRequest{Nodes: []string{"b", "a"}, Name: "one"}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(fail, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var e *api.Error
	if _, err := s.Checkpoint(ctx, api.CheckpointRequest{Nodes: []string{"a"}, Name: "two"}); !errors.As(err, &e) || e.Code != api.CodeFreezeFailed {
		t.Errorf("a failing command: %v", err)
	}
	if _, err := s.Node(ctx, "a@two"); err == nil {
		t.Error("there is a checkpoint that was refused")
	}
	if b, err := os.ReadFile(out); err != nil || string(b) != "freeze b a\nthaw b a\nfreeze a\nthaw a\n" {
		t.Errorf("%q, %v", b, err)
	}
	s.wantSound(t)
}

// A freeze command that hangs is ended by its timeout, which refuses the checkpoint; status, tree and other operations are
// answered meanwhile, and the thaw follows.
func TestHangingFreezeCommand(t *testing.T) {
	dir := t.TempDir()
	out, begun := filepath.Join(dir, "out"), filepath.Join(dir, "begun")
	s := serve(t, func(c *Config) {
		c.Freeze.Command = fmt.Sprintf(`f() { echo "$1" >>%s; [ $1 = thaw ] || { >%s; sleep 600; }; }; f`, out, begun)
		c.Freeze.Timeout = 3 * time.Second
	})
	ctx := t.Context()
	if _, err := s.Fork(ctx, api.ForkRequest{From: "base", Name: "a"}); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := s.Checkpoint(ctx, api.CheckpointRequest{Nodes: []string{"a"}, Name: "one"})
		done <- err
	}()
	for _, err := os.Stat(begun); err != nil; _, err = os.Stat(begun) {
		time.Sleep(time.Millisecond)
	}
	for what, do := range map[string]func() error{
		"tree":   func() error { _, err := s.Tree(ctx); return err },
		"status": func() error { _, err := s.Daemon(ctx); return err },
		"fork":   func() error { _, err := s.Fork(ctx, api.ForkRequest{From: "base", Name: "b"}); return err },
		"node":   func() error { _, err := s.Node(ctx, "a"); return err },
	} {
		if err := do(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	select {
	case err := <-done:
		t.Fatalf("the checkpoint ended before its timeout: %v", err)
	default:
	}
	var e *api.Error
	if err := <-done; !errors.As(err, &e) || e.Code != api.CodeFreezeFailed || !strings.Contains(e.Message, "longer than 3s") {
		t.Errorf("after the timeout: %v", err)
	}
	if b, err := os.ReadFile(out); err != nil || string(b) != "freeze\nthaw\n" {
		t.Errorf("%q, %v", b, err)
	}
	s.wantSound(t)
}

// Two daemons on one directory are refused, and the refused one leaves the sockets of the other.
func TestTwoDaemons(t *testing.T) {
	s := serve(t, nil)
	err := s.config.Serve(t.Context(), nil, fleet.Options{}, func([]string) { t.Error("the second one serves") })
	if !errors.Is(err, fleet.ErrLocked) {
		t.Errorf("the second daemon: %v", err)
	}
	if _, err := s.Tree(t.Context()); err != nil {
		t.Errorf("the first one: %v", err)
	}
}
