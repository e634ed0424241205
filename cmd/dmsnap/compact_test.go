package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
)

// wantView exports the snapshot and compares.
func (p pair) wantView(t *testing.T, cow string, want []byte) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	mustRun(t, "export", p.origin, cow, image)
	wantContent(t, image, want)
	if out := mustRun(t, "check", cow, "--origin", p.origin); !strings.Contains(out, "clean") {
		t.Errorf("check says %q", out)
	}
}

// Compacted in every way, the store shows the same; neither it nor the origin is touched.
func TestCompactVerb(t *testing.T) {
	p := newPair(t)
	view := p.withStore(t)
	before, out := digests(t, p.dir), filepath.Join(t.TempDir(), "dense.cow")
	// Stored are chunks 0, 24 and 25, 122, and the last one, which is half a chunk; written were 2, 2, 3 and 2
	// sectors of them.
	for _, c := range []struct {
		args []string
		want offline.CompactResult // without paths and space
	}{
		{nil, offline.CompactResult{ChunkSectors: 8, Exceptions: 5, DataBytes: 5 * 4096}},
		{[]string{"--origin", p.origin}, offline.CompactResult{ChunkSectors: 8, Exceptions: 5, DataBytes: 5 * 4096}},
		{[]string{"--origin", p.origin, "--chunk-size", "16KiB"}, offline.CompactResult{ChunkSectors: 32, Exceptions: 4, DataBytes: 4 * 16384, FilledBytes: 12288 + 8192 + 12288}},
		{[]string{"--origin", p.origin, "--chunk-size", "512", "--drop-unchanged"}, offline.CompactResult{ChunkSectors: 1, Exceptions: 9, DataBytes: 9 * 512, DroppedBytes: (4*8 + 4 - 9) * 512}},
		{[]string{"--chunk-size", "2KiB"}, offline.CompactResult{ChunkSectors: 4, Exceptions: 10, DataBytes: 10 * 2048, EndUnknown: true}},
	} {
		res := mustJSON[offline.CompactResult](t, append([]string{"compact", p.cow, out, "--force"}, c.args...)...)
		if info, err := os.Stat(out); err != nil || res.Bytes != info.Size() || res.AllocatedBytes > 256<<10 || res.Path != out {
			t.Errorf("%q: %+v, %v", c.args, res, err)
		}
		res.Path, res.Bytes, res.AllocatedBytes = "", 0, 0
		if res != c.want {
			t.Errorf("%q:\n got %+v\nwant %+v", c.args, res, c.want)
		}
		if !res.EndUnknown {
			p.wantView(t, out, view)
		}
		wantSame(t, p.dir, before)
	}
	for _, c := range []struct{ args, say string }{
		{"--chunk-size 2KiB", "if the disk ends between byte 1048576 and byte 1052672, run this again with --origin"},
		{"--origin ORIGIN --drop-unchanged", "0 bytes unchanged and dropped"},
		{"--origin ORIGIN --chunk-size 8KiB", "filled from the origin"},
	} {
		args := append([]string{"compact", p.cow, out, "--force"}, strings.Fields(strings.Replace(c.args, "ORIGIN", p.origin, 1))...)
		if said := mustRun(t, args...); !strings.HasPrefix(said, out+": ") || !strings.Contains(said, c.say) {
			t.Errorf("%s: it said %q", c.args, said)
		}
	}
}

// What compact refuses: with the verb that is the remedy, and with nothing touched.
func TestCompactRefuses(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for what, c := range map[string]struct {
		set  func(t *testing.T, p *pair)
		args string
		say  []string
	}{
		"invalid":           {func(t *testing.T, p *pair) { spoil(t, p.cow) }, "COW OUT", []string{"invalid", "dmsnap rescue"}},
		"invalid, punch":    {func(t *testing.T, p *pair) { spoil(t, p.cow) }, "COW --punch", []string{"invalid", "dmsnap rescue"}},
		"damaged":           {func(t *testing.T, p *pair) { damageSlot(t, p.cow) }, "COW OUT", []string{"DS019", "dmsnap check", "dmsnap repair"}},
		"damaged, punch":    {func(t *testing.T, p *pair) { damageSlot(t, p.cow) }, "COW --punch", []string{"DS019", "dmsnap check", "dmsnap repair"}},
		"void slots, punch": {patch(4096+16*9+8, 9), "COW --punch", []string{"DS013", "dmsnap repair"}},
		"origin too small":  {func(t *testing.T, p *pair) { os.Truncate(p.origin, 1<<19) }, "COW OUT --origin ORIGIN", []string{"too small"}},
		"origin in use":     {func(t *testing.T, p *pair) { openFile(t, p.origin, false) }, "COW OUT --origin ORIGIN", []string{"in use"}},
		"COW is read":       {func(t *testing.T, p *pair) { openFile(t, p.cow, true) }, "COW --punch", []string{"in use"}},
		"out is there":      {func(t *testing.T, p *pair) { writeFile(t, filepath.Join(p.dir, "out"), []byte("precious")) }, "COW OUT", []string{"exists", "--force"}},
		"out is the COW":    {func(t *testing.T, p *pair) {}, "COW COW --force", []string{"same file"}},
		"out is the origin": {func(t *testing.T, p *pair) {}, "COW ORIGIN --force --origin ORIGIN", []string{"same file"}},
	} {
		t.Run(what, func(t *testing.T) {
			p := newPair(t)
			p.withStore(t)
			c.set(t, &p)
			args := p.with(strings.Fields("compact " + c.args))
			for i, a := range args {
				if a == "ORIGIN" {
					args[i] = p.origin
				}
			}
			before := digestsOf(t, p.dir)
			dmsnap(args...).wantRefused(t, c.say...)
			if after := digestsOf(t, p.dir); after != before {
				t.Errorf("files were touched; before:\n%safter:\n%s", before, after)
			}
		})
	}
}

// With void slots a copy is made all the same, and has none.
func TestCompactLeavesVoidSlots(t *testing.T) {
	p := newPair(t)
	view := p.withStore(t)
	patch(4096+16*9+8, 9)(t, &p)
	out := filepath.Join(p.dir, "out")
	mustRun(t, "compact", p.cow, out)
	p.wantView(t, out, view)
}

// --punch frees what a merge left, and the store goes on.
func TestPunchVerb(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	if said := mustRun(t, "compact", p.cow, "--punch"); !strings.HasPrefix(said, p.cow+": ") || !strings.Contains(said, "that no exception uses") {
		t.Errorf("it said %q", said)
	}
	origin, cow := openFile(t, p.origin, false), openFile(t, p.cow, false)
	snap, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := snap.WriteAt(blocktest.Pattern(700<<10, 1), 0); err != nil {
		t.Fatal(err)
	}
	m, err := snap.BeginMerge()
	if err != nil {
		t.Fatal(err)
	}
	for m.Store().Len() > 10 {
		if _, err := m.Step(20); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{m.Close(), cow.Close(), origin.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(t.TempDir(), "image")
	mustRun(t, "export", p.origin, p.cow, image)
	view, size := readFile(t, image), int64(len(readFile(t, p.cow)))
	res := mustJSON[offline.PunchResult](t, "compact", p.cow, "--punch")
	if res.FreedBytes == 0 {
		t.Skip("SKIPPED: the file system of the temporary folder frees no space of files")
	}
	if res.FreedBytes < 600<<10 || res.UnusedBytes < res.FreedBytes || res.AllocatedBytes > 128<<10 {
		t.Errorf("%+v", res)
	}
	if after := int64(len(readFile(t, p.cow))); after != size {
		t.Errorf("the file has %d bytes, and had %d", after, size)
	}
	p.wantView(t, p.cow, view)
	if res := mustJSON[offline.PunchResult](t, "compact", p.cow, "--punch"); res.FreedBytes != 0 {
		t.Errorf("the second time: %+v", res)
	}
	mustRun(t, "merge", p.origin, p.cow)
	wantContent(t, p.origin, view)
}

// manyChunks makes a store that takes a while to copy: small chunks, in the wrong order.
func manyChunks(t *testing.T, p pair) {
	t.Helper()
	l := ondisk.Layout{ChunkSectors: 1}
	const n = 100_000
	image := blocktest.Pattern(int(l.ChunksNeeded(n))*512, 3)
	clear(image[:512])
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 1, ChunkSectors: 1}.Encode(image)
	for k := range uint64(n)/l.SlotsPerArea() + 1 {
		clear(image[l.COWOffset(l.AreaChunk(k)):][:512])
	}
	for i := range uint64(n) {
		ondisk.Exception{Old: ondisk.OriginChunk(2 * (n - i)), New: l.DataChunk(i)}.Encode(
			image[l.SlotOffset(ondisk.Slot{Area: i / l.SlotsPerArea(), Index: i % l.SlotsPerArea()}):])
	}
	writeFile(t, p.cow, image)
}

// Killed half-way it leaves nothing under the final name; ended by a signal that can be caught, nothing
// at all.
func TestCompactCutHalfWay(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		p := newPair(t)
		manyChunks(t, p)
		out := filepath.Join(p.dir, "out")
		writeFile(t, out, []byte("precious"))
		before := digests(t, p.dir)
		cmd := exec.Command(program(t), "compact", p.cow, out, "--force")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var begun []string
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		for len(begun) == 0 && len(ended) == 0 {
			begun, _ = filepath.Glob(filepath.Join(p.dir, ".out.*"))
		}
		cmd.Process.Signal(sig)
		<-ended
		if len(begun) == 0 || cmd.ProcessState.Success() {
			t.Fatalf("%v: it ended before it was cut: %v, %v", sig, begun, cmd.ProcessState)
		}
		if sig == syscall.SIGKILL {
			os.Remove(begun[0])
		} else if status := cmd.ProcessState.ExitCode(); status != exitSignal+int(sig) {
			t.Errorf("status %d", status)
		}
		wantSame(t, p.dir, before)
	}
}

// Where there is no space for the new store, that is said, and nothing is left.
func TestCompactWithoutRoom(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	before := digests(t, p.dir)
	// A limit on the size of files stands for a full file system: errors are met at the same place.
	cmd := exec.Command("sh", "-c", `ulimit -f 100; exec "$0" "$@"`, program(t), "compact", p.cow, filepath.Join(p.dir, "out"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	if cmd.ProcessState.ExitCode() != exitTrouble || !strings.Contains(stderr.String(), "no space for the new store") || strings.Count(stderr.String(), "\n") != 1 {
		t.Errorf("%v: %q", err, stderr.String())
	}
	wantSame(t, p.dir, before)
}

// A device is no file that one can make holes in.
func TestPunchDevice(t *testing.T) {
	dev := testhost.Loop(t, newPair(t).origin, 512)
	dmsnap("compact", dev, "--punch").wantRefused(t, dev, "block device")
}
