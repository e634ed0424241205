package kernel_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// A history is what one writer did to a device: for each sector the seeds of the streams that it may hold
// after a cut, which are that of the last flushed write and those of all writes since.
type history struct{ sectors [][]uint64 }

func newHistory(sectors int64) *history {
	h := &history{sectors: make([][]uint64, sectors)}
	for i := range h.sectors {
		h.sectors[i] = []uint64{originSeed}
	}
	return h
}

// writing is called before a write.
func (h *history) writing(st step) {
	for i := st.off / 512; i < (st.off+st.n)/512; i++ {
		h.sectors[i] = append(h.sectors[i], st.seed)
	}
}

// flushed is called when a flush returned that began after every write had returned.
func (h *history) flushed() {
	for i, s := range h.sectors {
		h.sectors[i] = s[len(s)-1:]
	}
}

// check wants each sector to hold what it may.
func (h *history) check(t *testing.T, what string, content []byte) {
	t.Helper()
	wrong := 0
	for i, seeds := range h.sectors {
		ok := false
		for _, seed := range seeds {
			ok = ok || bytes.Equal(content[i*512:(i+1)*512], streamBytes(seed, int64(i)*512, 512))
		}
		if !ok {
			if wrong++; wrong <= 3 {
				t.Errorf("%s: sector %d holds none of what it may (%d writes)", what, i, len(seeds))
			}
		}
	}
	if wrong > 3 {
		t.Errorf("%s: %d sectors wrong in all", what, wrong)
	}
}

// load writes to dev and flushes now and then until dev fails, and keeps the history.
func load(dev block.Device, h *history, chunk int64, r *rand.Rand) (operations int) {
	for ; ; operations++ {
		if r.IntN(6) == 0 {
			if dev.Flush() != nil {
				return operations
			}
			h.flushed()
			continue
		}
		st := step{seed: r.Uint64()}
		st.off, st.n = extent(r, int64(len(h.sectors)), chunk)
		h.writing(st)
		if _, err := dev.WriteAt(streamBytes(st.seed, st.off, st.n), st.off); err != nil {
			return operations
		}
	}
}

// TestServeKilled kills `dmsnap serve` at random moments while clients write to the origin and to a
// snapshot. What it left is activated by the kernel, which must show every flushed write.
func TestServeKilled(t *testing.T) {
	need(t)
	for round := range 4 * rounds(t) {
		t.Run(fmt.Sprint(round), func(t *testing.T) { serveKilled(t, uint64(round)) })
	}
}

func serveKilled(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0x6b696c6c))
	c := int64(8) << r.IntN(4) // sectors
	s := script{originSectors: 2000 + 8*r.Int64N(200)}
	s.snaps = []snapConf{{store: "P", chunk: c, length: s.originSectors, cowSectors: c * (2*s.originSectors/c + 20)}}
	dir := t.TempDir()
	disk, cow, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "cow"), filepath.Join(dir, "s")
	write(t, disk, s.before().disk)
	write(t, cow, s.before().cows[0])
	cmd := exec.Command(filepath.Join(binaries, "dmsnap"), "serve", disk, "snap="+cow, "--create", "--export-origin",
		"--chunk-size", fmt.Sprintf("%ds", c), "--sync", []string{"flush", "always"}[r.IntN(2)], "--socket", socket)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	lines := bufio.NewScanner(out)
	var clients []*nbd.Client
	for range 2 {
		if !lines.Scan() {
			t.Fatalf("no exports: %s", said.String())
		}
		f := strings.Fields(lines.Text())
		if f[0] != []string{"snap", "origin"}[len(clients)] {
			t.Fatalf("exports in another order: %q", f)
		}
		client, err := nbd.Dial(context.Background(), f[1])
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		clients = append(clients, client)
	}
	histories := []*history{newHistory(s.originSectors), newHistory(s.originSectors)}
	var wg sync.WaitGroup
	done := make([]int, 2)
	for i, client := range clients {
		// An origin write makes durable what the snapshot holds; half of the time only flushes may.
		if i == 1 && seed%2 == 0 {
			break
		}
		own := rand.New(rand.NewPCG(seed, uint64(i)))
		wg.Go(func() { done[i] = load(client, histories[i], c, own) })
	}
	time.Sleep(time.Duration(10+r.IntN(300)) * time.Millisecond)
	cmd.Process.Kill()
	wg.Wait()
	cmd.Wait()
	t.Logf("killed after %d and %d operations", done[0], done[1])

	k := newKernel(t, sharedMachine(t))
	size := s.originSectors * 512
	b := images{disk: read(t, disk, int(size)), cows: [][]byte{read(t, cow, int(s.snaps[0].cowSectors)*512)}}
	newTheirs(k, s, &b)
	if strings.Contains(k.status(snapName(0)), "Invalid") {
		t.Fatalf("status %q", k.status(snapName(0)))
	}
	histories[0].check(t, "snapshot as the kernel shows it", k.get(snapName(0), 0, 0))
	histories[1].check(t, "origin", b.disk)
	tally.add(func(c *counts) { c.kills++; c.operations += done[0] + done[1] })
}

// TestGuestKilled pulls the plug of a kernel at random moments while it writes to an origin and to a
// snapshot. dmsnap loads what is on the disks and must show every flushed write.
func TestGuestKilled(t *testing.T) {
	need(t)
	for round := range rounds(t) {
		t.Run(fmt.Sprint(round), func(t *testing.T) { guestKilled(t, uint64(round)) })
	}
}

func guestKilled(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0x706c7567))
	c := int64(1) << r.IntN(5)
	s := script{originSectors: 3000}
	s.snaps = []snapConf{{store: "P", chunk: c, length: s.originSectors, cowSectors: 2*s.originSectors + 20*c}}
	dir := t.TempDir()
	disk, cow := filepath.Join(dir, "disk"), filepath.Join(dir, "cow")
	write(t, disk, s.before().disk)
	write(t, cow, s.before().cows[0])
	m := boot(t, disk, cow)
	k := newKernelOf(t, m)
	k.must(job.Op{Do: job.Create, Dev: "dm:snap0", Stdin: fmt.Sprintf("0 %d snapshot %s %s P %d", s.originSectors, m.Disk(0), m.Disk(1), c)},
		job.Op{Do: job.Create, Dev: "dm:origin", Stdin: fmt.Sprintf("0 %d snapshot-origin %s", s.originSectors, m.Disk(0))})
	histories := map[string]*history{"dm:snap0": newHistory(s.originSectors), "dm:origin": newHistory(s.originSectors)}
	plug := time.AfterFunc(time.Duration(50+r.IntN(1500))*time.Millisecond, m.Plug)
	defer plug.Stop()
	operations := 0
	for ; ; operations++ {
		dev := []string{"dm:snap0", "dm:origin"}[r.IntN(2)]
		h := histories[dev]
		op := job.Op{Do: job.Flush, Dev: dev}
		if r.IntN(4) > 0 {
			st := step{seed: r.Uint64()}
			st.off, st.n = extent(r, s.originSectors, c)
			h.writing(st)
			op = job.Op{Do: job.Write, Dev: dev, Off: st.off, N: st.n, Seed: st.seed}
		}
		res, err := m.Do(op)
		if err != nil {
			break
		}
		if res[0].Err != "" {
			t.Fatalf("%+v: %s", op, res[0].Err)
		}
		if op.Do == job.Flush {
			h.flushed()
		}
	}
	m.Kill()
	t.Logf("plug pulled after %d operations", operations)
	b := images{disk: read(t, disk, int(s.originSectors)*512), cows: [][]byte{read(t, cow, int(s.snaps[0].cowSectors)*512)}}
	o, err := newOurs(s, b, snapshot.SyncFlush, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	view := make([]byte, s.originSectors*512)
	if _, err := o.snaps[0].ReadAt(view, 0); err != nil {
		t.Fatal(err)
	}
	histories["dm:snap0"].check(t, "snapshot as dmsnap shows it", view)
	histories["dm:origin"].check(t, "origin", b.disk)
	tally.add(func(c *counts) { c.kills++; c.operations += operations })
}
