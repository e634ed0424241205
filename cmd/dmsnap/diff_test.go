package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/diff"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
)

// differing runs the program, which must say "no" quietly, and returns what it printed.
func differing(t *testing.T, args ...string) string {
	t.Helper()
	o := dmsnap(args...)
	if o.status != exitNo || o.stderr != "" {
		t.Fatalf("dmsnap %q: status %d, %s", args, o.status, o.stderr)
	}
	return o.out
}

// patched is the origin with the snapshot's bytes put in at all ranges, as a backup script would.
func patched(t *testing.T, origin, shown []byte, ranges string) []byte {
	t.Helper()
	got := bytes.Clone(origin)
	for line := range strings.Lines(ranges) {
		o, n, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		off, err := strconv.ParseInt(o, 10, 64)
		length, err2 := strconv.ParseInt(n, 10, 64)
		if !ok || err != nil || err2 != nil || length <= 0 || off+length > int64(len(got)) {
			t.Fatalf("line %q", line)
		}
		copy(got[off:off+length], shown[off:])
	}
	return got
}

func TestDiff(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	before := digests(t, p.dir)
	ranges := differing(t, "diff", p.origin, p.cow, "--format", "ranges")
	if want := "0 4096\n98304 8192\n499712 4096\n1048576 2048\n"; ranges != want {
		t.Errorf("ranges %q, want %q", ranges, want)
	}
	verified := differing(t, "diff", p.origin, p.cow, "--format", "ranges", "--verify")
	if want := "0 1024\n101888 1024\n499712 1536\n"; !strings.HasPrefix(verified, want) {
		t.Errorf("verified ranges %q, want %q first", verified, want)
	}
	for _, r := range []string{ranges, verified} {
		if !bytes.Equal(patched(t, p.content, shown, r), shown) {
			t.Errorf("the origin with these ranges put in isn't the snapshot:\n%s", r)
		}
	}

	var list []diff.JSONRange
	out := differing(t, "diff", p.origin, p.cow, "--json", "--verify")
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if out != differing(t, "diff", p.origin, p.cow, "--format", "json", "--verify") {
		t.Error("--json and --format json differ")
	}
	off, fromJSON := int64(0), ""
	for _, r := range list {
		if r.Start != off || r.Changed && !r.Stored {
			t.Errorf("%+v after byte %d", r, off)
		}
		if off += r.Length; r.Changed {
			fromJSON += fmt.Sprintf("%d %d\n", r.Start, r.Length)
		}
	}
	if off != int64(len(p.content)) || fromJSON != verified {
		t.Errorf("JSON covers %d of %d bytes and says\n%swant\n%s", off, len(p.content), fromJSON, verified)
	}

	text := differing(t, "diff", p.origin, p.cow)
	if !strings.Contains(text, "18 KiB of 1.0 MiB may differ, in 4 ranges\n") || !strings.Contains(text, "98304  8 KiB\n") {
		t.Errorf("text %q", text)
	}
	wantSame(t, p.dir, before)
}

// A chunk that was copied and never changed: the store has it, the bytes are the same.
func TestDiffOfNoDifference(t *testing.T) {
	p := newPair(t)
	mustRun(t, "create", p.origin, p.cow)
	if got, want := mustRun(t, "diff", p.origin, p.cow), "no difference in 1.0 MiB\n"; got != want {
		t.Errorf("an empty store: %q, want %q", got, want)
	}
	if got := mustRun(t, "diff", p.origin, p.cow, "--format", "ranges"); got != "" {
		t.Errorf("an empty store has ranges %q", got)
	}
	p.write(t, 8192, p.content[8192:12288])
	differing(t, "diff", p.origin, p.cow)
	if got, want := mustRun(t, "diff", p.origin, p.cow, "--verify"), "no difference in 1.0 MiB; 4 KiB are stored and the same\n"; got != want {
		t.Errorf("the same bytes written again: %q, want %q", got, want)
	}
	if got := mustRun(t, "diff", p.origin, p.cow, "--verify", "--format", "ranges"); got != "" {
		t.Errorf("it has ranges %q", got)
	}
}

// write writes to the snapshot.
func (p pair) write(t *testing.T, off int64, b []byte) {
	t.Helper()
	origin, cow := openFile(t, p.origin, true), openFile(t, p.cow, false)
	snap, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = snap.WriteAt(b, off)
	for _, err := range []error{err, snap.Close(), cow.Close(), origin.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// The script of --help: a copy made at the snapshot's time is brought up to date with what changed since.
func TestDiffFeedsABackupScript(t *testing.T) {
	p := newPair(t)
	mustRun(t, "create", p.origin, p.cow)
	backup := filepath.Join(p.dir, "copy.img")
	writeFile(t, backup, p.content)
	origin, cow := openFile(t, p.origin, false), openFile(t, p.cow, false)
	o := snapshot.NewOrigin(origin)
	snap, err := o.Attach(cow, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{3000, 400_000, origin.Size() - 700} {
		if _, err := o.WriteAt(bytes.Repeat([]byte("tuesday"), 100), off); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{snap.Close(), cow.Close(), origin.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	_, script, ok := strings.Cut(newDiff().Example, "dmsnap diff --format ranges")
	if !ok {
		t.Fatal("the help has no script")
	}
	c := exec.Command("sh", "-ec", `"$0" diff --format ranges`+script, program(t))
	c.Dir = p.dir
	if out, err := c.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("%v, %s", err, out)
	}
	wantContent(t, backup, readFile(t, p.origin))
}

func TestDiffOfTwoSnapshots(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	second := p
	second.cow = filepath.Join(p.dir, "second.cow")
	mustRun(t, "create", p.origin, second.cow, "--chunk-size", "64k")
	second.write(t, 0, bytes.Repeat([]byte("snapshot"), 100))
	second.write(t, 200_000, []byte("other"))
	got := differing(t, "diff", p.origin, p.cow, second.cow, "--verify", "--format", "ranges")
	if want := "101888 1024\n199680 512\n499712 1536\n"; !strings.HasPrefix(got, want) {
		t.Errorf("ranges %q, want %q first", got, want)
	}
	if got := mustRun(t, "diff", p.origin, p.cow, p.cow, "--verify"); !strings.HasPrefix(got, "no difference") {
		t.Errorf("a snapshot and itself: %q", got)
	}
	spoil(t, second.cow)
	before := digests(t, p.dir)
	dmsnap("diff", p.origin, p.cow, second.cow).wantRefused(t, second.cow, "invalid")
	wantSame(t, p.dir, before)
	os.Truncate(p.origin, 1<<19)
	before = digests(t, p.dir)
	dmsnap("diff", p.origin, p.cow).wantRefused(t, p.cow, "too small", "origin chunk 256")
	wantSame(t, p.dir, before)
}

func TestList(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	type listed struct {
		inspect.StoreList
		Runs []inspect.Run `json:"runs"`
	}
	got := mustJSON[listed](t, "list", p.cow)
	want := []inspect.Run{
		{OriginChunk: 0, COWChunk: 2, Chunks: 1, OriginOffset: 0, COWOffset: 8192, Length: 4096},
		{OriginChunk: 24, COWChunk: 3, Chunks: 2, OriginOffset: 98304, COWOffset: 12288, Length: 8192},
		{OriginChunk: 122, COWChunk: 5, Chunks: 1, OriginOffset: 499712, COWOffset: 20480, Length: 4096},
		{OriginChunk: 256, COWChunk: 6, Chunks: 1, OriginOffset: 1048576, COWOffset: 24576, Length: 4096},
	}
	if fmt.Sprint(got.Runs) != fmt.Sprint(want) || got.StoreList != (inspect.StoreList{Path: p.cow, ChunkSectors: 8, Exceptions: 5}) {
		t.Errorf("listed %+v, want %v", got, want)
	}
	text := mustRun(t, "list", p.cow)
	for _, w := range []string{"         98304                    24-25                      3-4  8 KiB\n", ": 5 exceptions in 4 runs, 20 KiB; a chunk is 4 KiB\n"} {
		if !strings.Contains(text, w) {
			t.Errorf("%q is not in\n%s", w, text)
		}
	}
	empty := filepath.Join(p.dir, "empty.cow")
	mustRun(t, "create", p.origin, empty)
	if got := mustJSON[listed](t, "list", empty); got.Runs == nil || len(got.Runs) > 0 {
		t.Errorf("an empty store: %+v", got)
	}
}

// Verbs that only read refuse a store in use and name the remedy; --live-read reads it.
func TestLiveRead(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	openFile(t, p.cow, false)
	for _, args := range p.looking() {
		dmsnap(args...).wantRefused(t, p.cow, "in use", "--live-read")
		if o := dmsnap(append(args, "--live-read")...); o.status == exitTrouble || o.out == "" {
			t.Errorf("%q --live-read: status %d, %s", args, o.status, o.stderr)
		}
	}
}

// looking are the verbs that look at a store.
func (p pair) looking() [][]string {
	return [][]string{{"diff", p.origin, p.cow}, {"list", p.cow}, {"map", p.cow}}
}

// Exceptions for chunks that no disk has: offsets in bytes would overflow.
func TestLookingAtImpossibleChunks(t *testing.T) {
	for _, old := range []ondisk.OriginChunk{1 << 51, 1 << 52, 1<<63 - 1, 1<<64 - 1} {
		p := newPair(t)
		p.withStore(t)
		var b [ondisk.SlotSize]byte
		ondisk.Exception{Old: old, New: 2}.Encode(b[:])
		patch(4096, b[:]...)(t, &p)
		for _, args := range p.looking() {
			dmsnap(args...).wantRefused(t, p.cow, "too small", strconv.FormatUint(uint64(old), 10))
		}
	}
}
