package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/rescue"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

func TestCreate(t *testing.T) {
	p := newPair(t)
	mustRun(t, "create", p.origin, p.cow)
	wantContent(t, p.origin, p.content)
	// 1 MiB and a half chunk are 257 chunks; with header, two areas of 256 slots: 260.
	info, err := os.Stat(p.cow)
	if err != nil || info.Size() != 260*4096 {
		t.Errorf("COW file of %d bytes, %v, want %d", info.Size(), err, 260*4096)
	}
	if blocks := info.Sys().(*syscall.Stat_t).Blocks; blocks*512 > 64<<10 {
		t.Errorf("the empty store takes %d bytes of disk", blocks*512)
	}
	st := mustJSON[inspect.Status](t, "status", p.cow)
	want := inspect.Status{Path: p.cow, Version: 1, Figures: api.Figures{Store: "P", State: "ok", Valid: true, ChunkSectors: 8,
		SectorsAllocated: 16, TotalSectors: 260 * 8, MetadataSectors: 16, Percent: 100 * 16.0 / (260 * 8), Dmsetup: "16/2080 16"}}
	if st != want {
		t.Errorf("status of a new store: %+v, want %+v", st, want)
	}
}

// The default size holds every chunk of the origin, and one chunk less would not.
func TestCreateNeverOverflows(t *testing.T) {
	for _, chunk := range []string{"512", "4KiB", "64KiB"} {
		p := newPair(t)
		made := mustJSON[created](t, "create", p.origin, p.cow, "--chunk-size", chunk)
		origin, cow := openFile(t, p.origin, true), openFile(t, p.cow, false)
		snap, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := snap.WriteAt(p.content, 0); err != nil {
			t.Errorf("chunk %s: a snapshot that was written all over: %v", chunk, err)
		}
		st := snap.Status()
		if st.State != snapshot.StateOK || uint64(made.roomBytes()) != st.Exceptions*uint64(st.ChunkSectors)*512 {
			t.Errorf("chunk %s: %s, %d exceptions; create said there is space for %d bytes", chunk, st.State, st.Exceptions, made.roomBytes())
		}
		snap.Close()
	}
}

func TestRoomBytes(t *testing.T) {
	for c := uint64(2); c < 200; c++ {
		m := created{ChunkSectors: 1, TotalSectors: c}
		n := uint64(m.roomBytes() / 512)
		l := ondisk.Layout{ChunkSectors: 1}
		if l.ChunksNeeded(n) > c || l.ChunksNeeded(n+1) <= c {
			t.Errorf("%d chunks: space for %d exceptions, which need %d; one more needs %d", c, n, l.ChunksNeeded(n), l.ChunksNeeded(n+1))
		}
	}
}

func TestCreateOptions(t *testing.T) {
	p := newPair(t)
	made := mustJSON[created](t, "create", p.origin, p.cow, "--chunk-size", "16k", "--cow-size", "1M", "--store", "PO")
	if want := (created{p.cow, "PO", 32, 2048, "raw"}); made != want {
		t.Errorf("made %+v, want %+v", made, want)
	}
	if st := mustJSON[inspect.Status](t, "status", p.cow); st.ChunkSectors != 32 || st.TotalSectors != 2048 {
		t.Errorf("status %+v", st)
	}
}

func TestCreateOnWhatExists(t *testing.T) {
	p := newPair(t)
	writeFile(t, p.cow, make([]byte, 100<<10)) // a file of the user's size
	mustRun(t, "create", p.origin, p.cow)
	if got := len(readFile(t, p.cow)); got != 100<<10 {
		t.Errorf("create made it %d bytes long", got)
	}
	empty := filepath.Join(p.dir, "empty")
	writeFile(t, empty, nil)
	mustRun(t, "create", p.origin, empty)
	if got := len(readFile(t, empty)); got != 260*4096 {
		t.Errorf("an empty file was made %d bytes long", got)
	}

	p.withStoreAt(t, filepath.Join(p.dir, "full.cow"))
	full := filepath.Join(p.dir, "full.cow")
	dmsnap("create", p.origin, full).wantRefused(t, full, "already holds an exception store", "--force")
	if st := mustJSON[inspect.Status](t, "status", full); st.Exceptions == 0 {
		t.Error("the refused create emptied the store")
	}
	mustRun(t, "create", p.origin, full, "--force")
	if st := mustJSON[inspect.Status](t, "status", full); st.Exceptions != 0 || !st.Valid {
		t.Errorf("after --force: %+v", st)
	}
	other := filepath.Join(p.dir, "letter.txt")
	writeFile(t, other, bytes.Repeat([]byte("dear all\n"), 5000))
	dmsnap("create", p.origin, other).wantRefused(t, other, "holds text", "--force")
}

// A disk that holds something is not overwritten by any of the ways to make a store or scratch space, unless --force
// says so. The bytes are those of file systems and partition tables that begin with zeros; real programs' are tested in
// package image.
func TestCreateSparesDisks(t *testing.T) {
	for what, c := range map[string]struct {
		at    int64
		bytes string
	}{
		"ext4": {1080, "\x53\xef"}, "btrfs": {65600, "_BHRfS_M"}, "swap": {4086, "SWAPSPACE2"}, "gpt": {512, "EFI PART"},
		"second": {1<<20 - 512, "EFI PART"}, "iso9660": {32769, "CD001"}, "0x80000": {1 << 19, "data"}, "lvm2-pv": {512, "LABELONE"},
	} {
		p := newPair(t)
		content := make([]byte, 1<<20)
		copy(content[c.at:], c.bytes)
		writeFile(t, p.cow, content)
		before := digests(t, p.dir)
		socket := filepath.Join(testhost.ShortDir(t), "s")
		for _, args := range [][]string{
			{"create", p.origin, p.cow},
			{"serve", p.origin, "x=" + p.cow, "--create", "--socket", socket},
			{"serve", p.origin, "x=" + p.cow, "--store", "N", "--socket", socket},
			{"serve", p.origin, "x=" + p.cow, "--store", "N", "--create", "--socket", socket},
		} {
			o := dmsnap(args...)
			o.wantRefused(t, p.cow, "--force")
			if !strings.Contains(o.stderr, "holds") {
				t.Errorf("%s, %v: %s", what, args, o.stderr)
			}
		}
		wantSame(t, p.dir, before)

		made := filepath.Join(p.dir, "made.cow") // the arguments the wrong way round
		mustRun(t, "create", p.origin, made)
		before = digests(t, p.dir)
		dmsnap("create", made, p.cow).wantRefused(t, "not a raw disk")
		dmsnap("create", made, p.cow, "--raw").wantRefused(t, p.cow, "--force")
		wantSame(t, p.dir, before)
		mustRun(t, "create", p.origin, p.cow, "--force")
	}
}

// A mistyped device does not become a file in /dev.
func TestNoFileInDev(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	const typo = "/dev/dmsnap-test-typo"
	for _, args := range [][]string{
		{"create", p.origin, typo},
		{"serve", p.origin, "x=" + typo, "--create", "--socket", filepath.Join(p.dir, "s")},
		{"serve", p.origin, "x=" + typo, "--create", "--store", "N", "--socket", filepath.Join(p.dir, "s")},
		{"export", p.origin, p.cow, typo},
		{"rescue", p.origin, p.cow, typo},
		{"compact", p.cow, typo},
		{"repair", p.cow, typo},
		{"dump", p.cow, "-o", typo},
	} {
		dmsnap(args...).wantRefused(t, typo)
		if _, err := os.Lstat(typo); err == nil {
			os.Remove(typo)
			t.Errorf("%v made %s", args, typo)
		}
	}
}

// An origin that is known to be no raw disk is refused by name by every verb that takes one, unless --raw is given. With a
// store without a label, the signature of qcow2 is content.
func TestOriginMustBeRaw(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	for name, magic := range map[string]string{"qcow2": "QFI\xfb\x00\x00\x00\x03", "vmdk": "KDMV", "gzip": "\x1f\x8b\x08"} {
		content := readFile(t, p.origin)
		copy(content, magic)
		writeFile(t, p.origin, content)
		before := digests(t, p.dir)
		out := filepath.Join(t.TempDir(), "out")
		for _, args := range [][]string{
			{"create", p.origin, out},
			{"serve", p.origin, p.cow, "--socket", filepath.Join(testhost.ShortDir(t), "s")},
			{"merge", p.origin, p.cow},
			{"merge", "--dry-run", p.origin, p.cow},
			{"export", p.origin, p.cow, out},
			{"rescue", p.origin, p.cow, out},
			{"diff", p.origin, p.cow},
			{"compact", p.cow, out, "--origin", p.origin},
			{"check", p.cow, "--origin", p.origin},
			{"map", p.cow, "--origin", p.origin},
		} {
			if name == "qcow2" && args[0] != "create" {
				if args[0] != "serve" && args[0] != "merge" {
					if o := dmsnap(args...); o.status == exitTrouble {
						t.Errorf("%v: %+v", args, o)
					}
					os.Remove(out)
				}
				continue
			}
			dmsnap(args...).wantRefused(t, p.origin, name, "--raw")
			if _, err := os.Lstat(out); err == nil {
				t.Fatalf("%v left a file", args)
			}
			if args[0] != "serve" && args[0] != "merge" {
				if o := dmsnap(append(args, "--raw")...); o.status == exitTrouble {
					t.Errorf("%v --raw: %+v", args, o)
				}
				os.Remove(out)
			}
		}
		wantSame(t, p.dir, before)
	}
}

// An origin that ends before the store's exceptions do is refused, with how much is missing; --force serves it.
func TestOriginTooShort(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	if err := os.Truncate(p.origin, 8192); err != nil {
		t.Fatal(err)
	}
	before := digests(t, p.dir)
	for _, args := range [][]string{
		{"serve", p.origin, p.cow, "--socket", filepath.Join(testhost.ShortDir(t), "s")},
		{"export", p.origin, p.cow, filepath.Join(t.TempDir(), "out")},
		{"diff", p.origin, p.cow},
		{"merge", p.origin, p.cow},
	} {
		dmsnap(args...).wantRefused(t, "too small", "behind its end")
	}
	dmsnap("serve", p.origin, p.cow, "--socket", filepath.Join(testhost.ShortDir(t), "s")).wantRefused(t, "--force")
	r := mustJSON[rescue.Result](t, "rescue", p.origin, p.cow, filepath.Join(t.TempDir(), "out"))
	if r.Behind != 4*4096 || r.Certain+r.Doubtful+r.Lost != 8192 || r.Doubtful == 0 || len(r.Problems) == 0 {
		t.Errorf("rescue: %+v", r)
	}
	if text := mustRun(t, "rescue", "--dry-run", p.origin, p.cow); !strings.Contains(text, "16 KiB more are kept") {
		t.Errorf("rescue says %s", text)
	}
	wantSame(t, p.dir, before)
	start(t, p, serveOptions{force: true, onFull: fullFlag{FullPolicy: server.FullFail}}, p.cow).stop()
}

func (p pair) withStoreAt(t *testing.T, cow string) []byte {
	t.Helper()
	p.cow = cow
	return p.withStore(t)
}

// A create that fails leaves no half-made file.
func TestCreateLeavesNothingBehind(t *testing.T) {
	p := newPair(t)
	for _, args := range [][]string{
		{"--cow-size", "8191"},
		{"--chunk-size", "3k"},
		{"--chunk-size", "1GiB", "--cow-size", "1GiB"},
		{"--cow-size", "8388607T"},
		{"--store", "N"},
	} {
		dmsnap(append([]string{"create", p.origin, p.cow}, args...)...).wantRefused(t)
		if _, err := os.Stat(p.cow); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("create %q left a file behind (%v)", args, err)
		}
	}
}

func TestStatusOfAnInvalidStore(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	spoil(t, p.cow)
	st := mustJSON[inspect.Status](t, "status", p.cow)
	if st.State != "invalid" || st.Valid || st.Dmsetup != "Invalid" {
		t.Errorf("status %+v", st)
	}
	dmsnap("export", p.origin, p.cow, p.cow+".out").wantRefused(t, p.cow, "invalid", "full or failed")
	before := digests(t, p.dir)
	dmsnap("merge", p.origin, p.cow).wantRefused(t, p.cow, "invalid")
	wantSame(t, p.dir, before)
}

// spoil marks a store invalid.
func spoil(t *testing.T, cow string) {
	t.Helper()
	f := openFile(t, cow, false)
	defer f.Close()
	st, err := store.Open(f)
	if err == nil {
		err = st.Invalidate(errors.New("for the test"))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// status reads a store that a server has open, says so, and writes nothing.
func TestStatusOfAStoreInUse(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	before := digests(t, p.dir)
	if mustJSON[inspect.Status](t, "status", p.cow).InUse {
		t.Error("in use, though nobody uses it")
	}
	f := openFile(t, p.cow, false)
	st := mustJSON[inspect.Status](t, "status", p.cow)
	if !st.InUse || st.Exceptions != 5 {
		t.Errorf("status of a store in use: %+v", st)
	}
	if text := mustRun(t, "status", p.cow); !strings.Contains(text, st.Dmsetup) || !strings.Contains(text, "in use") {
		t.Errorf("text %q", text)
	}
	f.Close()
	wantSame(t, p.dir, before)
}

func TestExport(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	out := filepath.Join(p.dir, "out.img")
	before := digests(t, p.dir)
	mustRun(t, "export", p.origin, p.cow, out)
	wantContent(t, out, shown)
	info, err := os.Stat(out)
	if err != nil {
		t.Fatal(err)
	}
	if blocks := info.Sys().(*syscall.Stat_t).Blocks * 512; blocks > info.Size()-400<<10 {
		t.Errorf("the image of %d bytes takes %d bytes of disk, though half of it is a hole", info.Size(), blocks)
	}
	if got := mustRun(t, "export", p.origin, p.cow, "-"); got != string(shown) {
		t.Error("standard output has another content than the snapshot")
	}
	dmsnap("export", p.origin, p.cow, out).wantRefused(t, out, "exists", "--force")
	writeFile(t, out, []byte("old"))
	mustRun(t, "export", "--force", p.origin, p.cow, out)
	wantContent(t, out, shown)

	os.Remove(out)
	wantSame(t, p.dir, before) // no temporary file, inputs untouched
	for _, in := range []string{p.origin, p.cow} {
		dmsnap("export", "--force", p.origin, p.cow, in).wantRefused(t, in, "same file")
	}
	dmsnap("export", "--force", p.origin, p.cow, "/dev/null").wantRefused(t, "/dev/null", "not a regular file")
	dmsnap("export", p.origin, p.cow, filepath.Join(p.dir, "missing", "out")).wantRefused(t, "missing")
	wantSame(t, p.dir, before)
}

func TestMerge(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	before := digests(t, p.dir)
	plan := mustJSON[offline.MergeResult](t, "merge", "--dry-run", p.origin, p.cow)
	want := offline.MergeResult{DryRun: true, ChunkSectors: 8, Chunks: 5, Runs: 4, Bytes: 5*4096 - 2048, Ranges: 4, UndoBytes: 7 * 4096}
	if !reflect.DeepEqual(plan, want) {
		t.Errorf("dry run: %+v, want %+v", plan, want)
	}
	wantSame(t, p.dir, before)
	did := mustJSON[offline.MergeResult](t, "merge", p.origin, p.cow)
	if plan.DryRun = false; !reflect.DeepEqual(did, plan) {
		t.Errorf("merged %+v, planned %+v", did, plan)
	}
	wantContent(t, p.origin, shown)
	if st := mustJSON[inspect.Status](t, "status", p.cow); st.Exceptions != 0 || !st.Valid || st.SectorsAllocated != st.MetadataSectors {
		t.Errorf("store after the merge: %+v", st)
	}
	mustRun(t, "merge", p.origin, p.cow) // once more: nothing to do
	wantContent(t, p.origin, shown)
}

func TestMergeAndExportRefuseAnOriginThatIsTooSmall(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	os.Truncate(p.origin, 1<<19)
	before := digests(t, p.dir)
	dmsnap("merge", p.origin, p.cow).wantRefused(t, "too small", "origin chunk 256")
	dmsnap("merge", "-n", p.origin, p.cow).wantRefused(t, "too small")
	dmsnap("export", p.origin, p.cow, p.cow+".out").wantRefused(t, "too small")
	wantSame(t, p.dir, before)
}

func wantSame(t *testing.T, dir string, before map[string]string) {
	t.Helper()
	after := digests(t, dir)
	for name, d := range before {
		if after[name] != d {
			t.Errorf("%s was changed: %s, now %s", name, d, after[name])
		}
		delete(after, name)
	}
	for name := range after {
		t.Errorf("%s appeared", name)
	}
}

func TestVersion(t *testing.T) {
	v := mustJSON[versionInfo](t, "version")
	if v.Go == "" || v.Platform == "" {
		t.Errorf("version %+v", v)
	}
	if text := mustRun(t, "version"); !strings.HasPrefix(text, "dmsnap ") || !strings.Contains(text, v.Go) {
		t.Errorf("version %q", text)
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if text := mustRun(t, "completion", shell); !strings.Contains(text, "dmsnap") {
			t.Errorf("completion for %s: %q", shell, text)
		}
	}
}

func TestMan(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1000000000")
	a, b := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
	mustRun(t, "man", a)
	mustRun(t, "man", b)
	wantSame(t, a, digests(t, b))
	page := string(readFile(t, filepath.Join(a, "dmsnap-serve.1")))
	for _, want := range []string{"Sep 2001", "export-origin", "EXAMPLE"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page of serve has no %q", want)
		}
	}
}
