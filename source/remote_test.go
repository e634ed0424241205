package source_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/internal/testcerts"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/qcow2"
	"github.com/dmsnap/dmsnap/store"
)

// disk is the content of the disks here: noise, with a hole of 1 MiB.
func disk() []byte {
	b := blocktest.Pattern(4<<20, 7)
	clear(b[1<<20 : 2<<20])
	return b
}

// rawFile writes disk to a sparse file.
func rawFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := block.Create(path, 4<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := block.WriteSparse(f, disk(), 0, block.AllHoles); err != nil {
		t.Fatal(err)
	}
	return path
}

// A peer is an NBD server that can be killed and started again on one socket.
type peer struct {
	t      *testing.T
	socket string
	start  func(socket string) (kill func())
	kill   func()
}

func (p *peer) run() {
	p.t.Helper()
	os.Remove(p.socket)
	p.kill = p.start(p.socket)
	for range 500 {
		if c, err := net.Dial("unix", p.socket); err == nil {
			c.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	p.t.Fatal("the server does not listen")
}

func (p *peer) uri() string { return "nbd+unix:///?socket=" + p.socket }

// process runs a server program until it is killed.
func process(t *testing.T, name string, args ...string) func() {
	t.Helper()
	cmd := exec.Command(name, args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
}

// peers are our own server, nbdkit and qemu-nbd over one file; those that are not installed are reported as SKIPPED.
func peers(t *testing.T, run func(t *testing.T, p *peer)) {
	path := rawFile(t)
	for name, start := range map[string]func(t *testing.T, socket string) func(){
		"dmsnap": func(t *testing.T, socket string) func() {
			f, err := block.Open(path, block.Options{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			s := nbd.NewServer(nbd.Options{})
			if err := s.Add(nbd.Export{Name: "", Device: f, ReadOnly: true, MultiConn: true}); err != nil {
				t.Fatal(err)
			}
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan struct{})
			go func() {
				defer close(done)
				s.Serve(ctx, l)
			}()
			return sync.OnceFunc(func() {
				cancel()
				<-done
				f.Close()
			})
		},
		"nbdkit": func(t *testing.T, socket string) func() {
			return process(t, "nbdkit", "-f", "-r", "-U", socket, "file", path)
		},
		"qemu-nbd": func(t *testing.T, socket string) func() {
			return process(t, "qemu-nbd", "-t", "-r", "-e", "8", "-f", "raw", "-x", "", "-k", socket, path)
		},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(name); err != nil && name != "dmsnap" {
				t.Skipf("SKIPPED: no %s here", name)
			}
			dir, err := os.MkdirTemp("", "nbd")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			p := &peer{t: t, socket: filepath.Join(dir, "s"), start: func(socket string) func() { return start(t, socket) }}
			p.run()
			t.Cleanup(func() { p.kill() })
			run(t, p)
		})
	}
}

func open(t *testing.T, name string, o source.Options) *source.Disk {
	t.Helper()
	o.ReadOnly = true
	d, err := source.Open(name, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// TestRemoteDisk: an export is a disk, with its extents, for reading.
func TestRemoteDisk(t *testing.T) {
	peers(t, func(t *testing.T, p *peer) {
		d := open(t, p.uri(), source.Options{})
		got := make([]byte, d.Size())
		if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, disk()) {
			t.Errorf("another disk, %v", err)
		}
		extents, err := block.Extents(d, 1<<20, 1<<20)
		if err != nil || extents[0].Flags&block.ReadsZero == 0 || extents[0].Length < 512<<10 {
			t.Errorf("extents of the hole: %v, %v", extents, err)
		}
		if err := d.AllowWrites(); err == nil || !d.ReadOnly() || d.Format() != "raw" {
			t.Errorf("it can be written to: %v", err)
		}
		_, err = source.Open(p.uri(), source.Options{ReadOnly: true, Format: source.QCOW2})
		if err == nil || !strings.HasPrefix(err.Error(), p.uri()+": qcow2 image: header, byte 0: ") {
			t.Errorf("opened as an image: %v", err)
		}
	})
}

// TestSourcesConform: the reading half of the suite of devices, on every kind of source.
func TestSourcesConform(t *testing.T) {
	peers(t, func(t *testing.T, p *peer) {
		blocktest.RunReadOnly(t, func(t *testing.T) block.Device { return open(t, p.uri(), source.Options{}) })
	})
	image := imageOf(t, disk())
	blocktest.RunReadOnly(t, func(t *testing.T) block.Device { return open(t, image, source.Options{}) })
	blocktest.RunReadOnly(t, func(t *testing.T) block.Device { return open(t, rawFile(t), source.Options{}) })
}

// imageOf writes a qcow2 image.
func imageOf(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := qcow2.Export(f, block.MemoryFrom(content), qcow2.ExportOptions{Compress: true}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestRemoteKilledUnderLoad: the server is killed and started again while eight readers use it. No read fails, and none returns
// other bytes.
func TestRemoteKilledUnderLoad(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	peers(t, func(t *testing.T, p *peer) {
		d := open(t, p.uri(), source.Options{NBD: source.NBDOptions{Reconnect: 30 * time.Second}})
		want := disk()
		var stop atomic.Bool
		var reads atomic.Int64
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				r := rand.New(rand.NewPCG(uint64(i), 1))
				for !stop.Load() {
					n := 1 + r.IntN(256<<10)
					off := r.IntN(len(want) - n)
					got := make([]byte, n)
					if _, err := d.ReadAt(got, int64(off)); err != nil || !bytes.Equal(got, want[off:off+n]) {
						t.Errorf("read of %d bytes at %d: %v", n, off, err)
						return
					}
					reads.Add(1)
				}
			})
		}
		for range 3 {
			before := reads.Load()
			for reads.Load() < before+50 && !t.Failed() {
				time.Sleep(time.Millisecond)
			}
			p.kill()
			p.run()
		}
		stop.Store(true)
		all.Wait()
		t.Logf("%d reads", reads.Load())
	})
}

// TestRemoteGone: without a server reads fail within the bound, and go on when there is one again.
func TestRemoteGone(t *testing.T) {
	peers(t, func(t *testing.T, p *peer) {
		for _, bound := range []time.Duration{0, 200 * time.Millisecond} {
			d := open(t, p.uri(), source.Options{NBD: source.NBDOptions{Reconnect: bound}})
			p.kill()
			os.Remove(p.socket)
			began := time.Now()
			_, err := d.ReadAt(make([]byte, 512), 0)
			if err == nil || time.Since(began) > 5*time.Second {
				t.Errorf("%v after %v", err, time.Since(began))
			}
			if _, err := source.Open(p.uri(), source.Options{ReadOnly: true}); err == nil || !strings.Contains(err.Error(), p.uri()) {
				t.Errorf("open without a server: %v", err)
			}
			p.run()
			if bound > 0 {
				if _, err := d.ReadAt(make([]byte, 512), 0); err != nil {
					t.Errorf("with a server again: %v", err)
				}
			}
		}
	})
}

// TestSnapshotOfALostServer: a write to a snapshot that needs the rest of its chunk from a server that is gone fails, and the
// snapshot stays valid: chunks that are written as a whole need no server, and what failed succeeds when there is one again.
func TestSnapshotOfALostServer(t *testing.T) {
	peers(t, func(t *testing.T, p *peer) {
		for _, bound := range []time.Duration{0, 200 * time.Millisecond} {
			d := open(t, p.uri(), source.Options{NBD: source.NBDOptions{Reconnect: bound}})
			cow := block.NewMemory(1 << 20)
			s, err := snapshot.NewOrigin(d).Attach(cow, snapshot.Options{ChunkSectors: 8})
			if err != nil {
				t.Fatal(err)
			}
			want := disk()
			write := func(n int, off int64) error {
				_, err := s.WriteAt(blocktest.Pattern(n, 1), off)
				if err == nil {
					copy(want[off:], blocktest.Pattern(n, 1))
				}
				return err
			}
			p.kill()
			os.Remove(p.socket)
			if err := write(512, 8192); !errors.Is(err, block.ErrUnavailable) {
				t.Errorf("a part of a chunk: %v", err)
			}
			if err := errors.Join(write(4096, 4096), s.Flush()); err != nil {
				t.Errorf("a whole chunk: %v", err)
			}
			p.run()
			if bound > 0 {
				if err := errors.Join(write(512, 8192), write(512, 12288)); err != nil {
					t.Errorf("with a server again: %v", err)
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if r, err := check.Run(t.Context(), cow, check.Options{}); err != nil || len(r.Findings) > 0 {
				t.Errorf("the store: %v, %+v", err, r)
			}
			st, err := store.OpenToRead(cow)
			if err != nil || st.Err() != nil {
				t.Fatal(err, st.Err())
			}
			view, err := store.NewView(block.MemoryFrom(disk()), st)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want))
			if _, err := view.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the snapshot shows something else, or %v", err)
			}
		}
	})
}

// TestRemoteHangs: a server that stops answering, in the handshake or later, fails what waits for it within the bound.
func TestRemoteHangs(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var held []net.Conn
	var mu sync.Mutex
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range held {
			c.Close()
		}
	}()
	s := nbd.NewServer(nbd.Options{})
	if err := s.Add(nbd.Export{Name: "", Device: block.MemoryFrom(disk()), ReadOnly: true, MultiConn: true}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "b")
	behind, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{})
	go func() {
		defer close(served)
		s.Serve(ctx, behind)
	}()
	defer func() { cancel(); <-served }()
	var hang atomic.Bool
	go func() { // passes bytes on until it hangs
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			held = append(held, c)
			mu.Unlock()
			if hang.Load() {
				continue
			}
			b, err := net.Dial("unix", path)
			if err != nil {
				c.Close()
				continue
			}
			mu.Lock()
			held = append(held, b)
			mu.Unlock()
			go io.Copy(b, c)
			go func() {
				p := make([]byte, 4096)
				for {
					n, err := b.Read(p)
					if err != nil || hang.Load() {
						return
					}
					c.Write(p[:n])
				}
			}()
		}
	}()
	uri := "nbd+unix:///?socket=" + l.Addr().String()
	o := source.Options{ReadOnly: true, NBD: source.NBDOptions{Timeout: 300 * time.Millisecond, Reconnect: 300 * time.Millisecond}}
	d := open(t, uri, o)
	if _, err := d.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	time.Sleep(400 * time.Millisecond) // a connection without requests is not lost
	if _, err := d.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	hang.Store(true)
	began := time.Now()
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if _, err := d.ReadAt(make([]byte, 512), 0); err == nil {
				t.Error("a read from a server that hangs succeeded")
			}
		})
	}
	all.Wait()
	if _, err := source.Open(uri, o); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("open: %v", err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
}

// TestRemoteTLS: nbds with the certificates of a folder; without them, or with others, it is refused.
func TestRemoteTLS(t *testing.T) {
	dir, strange := t.TempDir(), t.TempDir()
	for _, d := range []string{dir, strange} {
		a, err := testcerts.NewAuthority("of " + d)
		if err == nil {
			err = a.Write(d)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	config, err := server.LoadTLS(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := nbd.NewServer(nbd.Options{TLS: config, RequireTLS: true})
	if err := s.Add(nbd.Export{Name: "x", Device: block.MemoryFrom(disk()), ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{})
	go func() {
		defer close(served)
		s.Serve(ctx, l)
	}()
	defer func() { cancel(); <-served }()
	name := "//" + l.Addr().String() + "/x"
	good, err := source.LoadTLS(dir)
	if err != nil {
		t.Fatal(err)
	}
	d := open(t, "nbds:"+name, source.Options{NBD: source.NBDOptions{TLS: good}})
	got := make([]byte, 4096)
	if _, err := d.ReadAt(got, 4096); err != nil || !bytes.Equal(got, disk()[4096:8192]) {
		t.Error(err)
	}
	bad, err := source.LoadTLS(strange)
	if err != nil {
		t.Fatal(err)
	}
	for what, open := range map[string]func() (*source.Disk, error){
		"without TLS":          func() (*source.Disk, error) { return source.Open("nbd:"+name, source.Options{ReadOnly: true}) },
		"without certificates": func() (*source.Disk, error) { return source.Open("nbds:"+name, source.Options{ReadOnly: true}) },
		"of another authority": func() (*source.Disk, error) {
			return source.Open("nbds:"+name, source.Options{ReadOnly: true, NBD: source.NBDOptions{TLS: bad}})
		},
	} {
		if d, err := open(); err == nil {
			d.Close()
			t.Errorf("%s: it was opened", what)
		}
	}
	if _, err := source.LoadTLS(t.TempDir()); err == nil {
		t.Error("an empty folder has certificates")
	}
}
