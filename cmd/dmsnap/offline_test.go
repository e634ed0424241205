package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/repair"
	"github.com/dmsnap/dmsnap/store"
)

func (p pair) with(args []string, more ...string) []string {
	out := append(append([]string{}, args...), more...)
	for i, a := range out {
		switch a {
		case "COW":
			out[i] = p.cow
		case "OUT":
			out[i] = filepath.Join(p.dir, "out")
		}
	}
	return out
}

// damageSlot makes slot 1 of the store name the chunk of slot 0.
func damageSlot(t *testing.T, cow string) {
	t.Helper()
	f := openFile(t, cow, false)
	defer f.Close()
	if _, err := f.WriteAt([]byte{2}, 4096+16+8); err != nil {
		t.Fatal(err)
	}
}

func TestCheckVerb(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	if out := mustRun(t, "check", p.cow, "--origin", p.origin); out != p.cow+": clean: 5 exceptions, 4 KiB a chunk\n" {
		t.Errorf("a sound store: %q", out)
	}
	if res := mustJSON[check.Result](t, "check", p.cow); !res.Clean || res.Exceptions != 5 || res.ChunkSectors != 8 || len(res.Findings) != 0 {
		t.Errorf("%+v", res)
	}
	os.Truncate(p.origin, 1<<19)
	o := dmsnap("check", p.cow, "--origin", p.origin)
	if o.status != exitNo || !strings.Contains(o.out, "DS021") {
		t.Errorf("an origin too small: status %d, %s", o.status, o.out)
	}
	damageSlot(t, p.cow)
	o = dmsnap("check", "--json", p.cow)
	var res map[string]any
	if err := json.Unmarshal([]byte(o.out), &res); err != nil || o.status != exitNo || res["clean"] != false {
		t.Fatalf("status %d, %v, %s", o.status, err, o.out)
	}
	f := res["findings"].([]any)[0].(map[string]any)
	if f["code"] != "DS019" || f["severity"] != "error" || f["place"] != "area 0 slot 1, byte 0x1010" || f["repair"] != "yes" {
		t.Errorf("%v", f)
	}
	// Notes can be left out, errors can't: the hole at chunk 3 is a note.
	if o := dmsnap("check", "--level", "error", p.cow); o.status != exitNo || strings.Contains(o.out, "DS022") || !strings.Contains(o.out, "DS019") {
		t.Errorf("only errors: status %d, %s", o.status, o.out)
	}
	if res["found"].(map[string]any)["DS022"] != 1.0 {
		t.Errorf("no hole in %v", res["found"])
	}
}

// TestCatalogueByVerbs goes through the damage catalogue as a user would: check returns 1, repair repairs or refuses as
// the table states, check returns 0.
func TestCatalogueByVerbs(t *testing.T) {
	for _, problem := range check.Problems() {
		if problem.Code == check.ChunkNotBlocks || problem.Code == check.Unreadable {
			continue // these need a device of their own: see package repair
		}
		t.Run(problem.Code.String(), func(t *testing.T) {
			dir := t.TempDir()
			cow, out, undoFile := filepath.Join(dir, "cow"), filepath.Join(dir, "out"), filepath.Join(dir, "undo")
			text := filepath.Join("..", "..", "check", "testdata", problem.Code.String(), "store.txt")
			mustRun(t, "restore", text, cow)
			var more []string
			if problem.Repair == check.WithChunkSize {
				more = []string{"--chunk-size", "4KiB"}
			}
			origin := filepath.Join(dir, "origin")
			writeFile(t, origin, make([]byte, 32768))
			checkArgs := func(path string) []string {
				if problem.Code == check.OriginTooSmall {
					return []string{"check", path, "--origin", origin}
				}
				return []string{"check", path}
			}
			if o := dmsnap(checkArgs(cow)...); o.status != exitNo || o.stderr != "" || !strings.Contains(o.out, problem.Code.String()) || !strings.Contains(o.out, problem.Means) {
				t.Errorf("check: status %d, %s%s", o.status, o.out, o.stderr)
			}
			before := digests(t, dir)
			if problem.Repair == check.NotRepairable && problem.Code != check.OriginTooSmall {
				dmsnap("repair", cow, out).wantRefused(t, cow, problem.Code.String())
				wantSame(t, dir, before)
				return
			}
			if problem.Repair == check.WithChunkSize {
				dmsnap("repair", cow, out).wantRefused(t, cow, problem.Code.String(), "--chunk-size")
				wantSame(t, dir, before)
			}
			mustRun(t, append([]string{"repair", cow, out}, more...)...)
			if problem.Code == check.OriginTooSmall {
				return
			}
			if said := mustRun(t, "check", out); strings.Count(said, "\n") != 1 {
				t.Errorf("the second check said %q", said)
			}
			os.Remove(out)
			wantSame(t, dir, before)
			res := mustJSON[repair.Result](t, append([]string{"repair", cow, "--in-place", "--undo", undoFile}, more...)...)
			if !res.Changed || res.Found[problem.Code] == 0 {
				t.Errorf("in place: %+v", res)
			}
			mustRun(t, "check", cow)
			mustRun(t, "repair", cow, "--undo-apply", undoFile)
			os.Remove(undoFile)
			wantSame(t, dir, before)
		})
	}
}

func TestRepairVerb(t *testing.T) {
	p := newPair(t)
	shown := p.withStore(t)
	damageSlot(t, p.cow)
	out := filepath.Join(p.dir, "out")
	said := mustRun(t, "repair", p.cow, out)
	for _, want := range []string{out + ": sound now: kept 16 KiB in", "lost  bytes 98304 to 102399 of the origin: DS019, COW chunk used twice"} {
		if !strings.Contains(said, want) {
			t.Errorf("%q does not say %q", said, want)
		}
	}
	image := filepath.Join(p.dir, "image")
	mustRun(t, "export", p.origin, out, image)
	copy(shown[98304:102400], p.content[98304:102400]) // what is lost is the origin's of today
	wantContent(t, image, shown)

	before := readFile(t, out)
	undoFile := filepath.Join(p.dir, "undo")
	if res := mustJSON[repair.Result](t, "repair", out, "--in-place", "--undo", undoFile); res.Changed || len(res.Found) > 0 {
		t.Errorf("nothing was wrong: %+v", res)
	}
	wantContent(t, out, before)
	if _, err := os.Stat(undoFile); err == nil {
		t.Error("an undo file with nothing to undo")
	}
	// An undo file is of its store alone.
	mustRun(t, "repair", p.cow, "--in-place", "--undo", undoFile)
	damaged := readFile(t, p.cow)
	dmsnap("repair", p.origin, "--undo-apply", undoFile).wantRefused(t, undoFile, "not of this store")
	b := readFile(t, undoFile)
	writeFile(t, undoFile, b[:len(b)-1])
	dmsnap("repair", p.cow, "--undo-apply", undoFile).wantRefused(t, undoFile, "not a whole undo file")
	wantContent(t, p.cow, damaged)
}

func TestOfflineUsage(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	before := digests(t, p.dir)
	for _, c := range []struct{ args, say string }{
		{"check COW --level bad", "note, warning or error"},
		{"check COW --chunk-size 3k", "power of two"},
		{"check COW --origin COW", "is the origin device"},
		{"check COW --origin missing", "missing"},
		{"dump COW --format xml", "text or json"},
		{"dump COW --pack --json", "pack"},
		{"dump COW --pack --data", "data"},
		{"restore COW", "accepts 2 arg"},
		{"repair COW", "COW and NEWCOW"},
		{"repair COW --in-place", "--undo FILE"},
		{"repair COW OUT --in-place --undo OUT", "no NEWCOW"},
		{"repair COW OUT --undo OUT", "requires --in-place"},
		{"repair COW --undo-apply OUT --in-place", "no other option"},
		{"repair COW --undo-apply missing", "missing"},
		{"repair COW OUT --chunk-size 7", "512-byte sectors"},
		{"compact COW", "COW and NEWCOW"},
		{"compact COW OUT --chunk-size 3k", "power of two"},
		{"compact COW OUT --chunk-size 64k", "--origin ORIGIN"},
		{"compact COW OUT --drop-unchanged", "--origin ORIGIN"},
		{"compact COW OUT --origin missing", "missing"},
		{"compact COW OUT --origin COW", "is the origin device"},
		{"compact COW OUT --punch", "no NEWCOW"},
		{"compact COW --punch --force", "only with --json"},
		{"compact COW --punch --chunk-size 4k", "only with --json"},
	} {
		t.Run(c.args, func(t *testing.T) {
			dmsnap(p.with(strings.Fields(c.args))...).wantRefused(t, c.say)
			wantSame(t, p.dir, before)
		})
	}
}

// A dump goes through a pipe and comes back as the same store.
func TestDumpThroughAPipe(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	for _, how := range [][]string{{"dump", p.cow}, {"dump", "--pack", p.cow}, {"dump", "--data", p.cow}} {
		text := mustRun(t, how...)
		out := filepath.Join(t.TempDir(), "out")
		var stdout, stderr bytes.Buffer
		if status := run([]string{"restore", "-", out, "--json"}, strings.NewReader(text), &stdout, &stderr); status != exitDone {
			t.Fatalf("%q: status %d, %s", how, status, stderr.String())
		}
		var res restoreResult
		if err := json.Unmarshal(stdout.Bytes(), &res); err != nil || res != (restoreResult{out, 260 * 4096, 8, 5}) {
			t.Errorf("%+v, %v", res, err)
		}
		if got, want := readFile(t, out)[:8192], readFile(t, p.cow)[:8192]; !bytes.Equal(got, want) {
			t.Errorf("%q: other metadata", how)
		}
		if strings.Contains(how[1], "data") {
			f := openFile(t, out, true)
			if st, err := store.Open(f); err != nil || st.Len() != 5 {
				t.Errorf("%v", err)
			}
			wantContent(t, out, readFile(t, p.cow))
		}
	}
}

// A restore that is cut half-way leaves nothing under the final name; a signal that can be caught leaves
// nothing at all.
func TestRestoreCutHalfWay(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		p := newPair(t)
		p.withStore(t)
		text := mustRun(t, "dump", p.cow)
		out := filepath.Join(p.dir, "out")
		before := digests(t, p.dir)
		cmd := exec.Command(program(t), "restore", "-", out)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// More than a pipe holds: when it is written most of it was read, and the file is begun.
		half := strings.TrimSuffix(text, "end\n") + strings.Repeat("# and so on\n", 50_000)
		if _, err := stdin.Write([]byte(half)); err != nil {
			t.Fatal(err)
		}
		begun, err := filepath.Glob(filepath.Join(p.dir, ".out.*"))
		if err != nil || len(begun) != 1 {
			t.Errorf("%v, %v are begun", begun, err)
		}
		cmd.Process.Signal(sig)
		if sig == syscall.SIGTERM {
			stdin.Write([]byte("# it looks up at the next line\n")) // an error: it was quicker
		}
		stdin.Close()
		cmd.Wait()
		if sig == syscall.SIGKILL {
			os.Remove(begun[0])
		} else if status := cmd.ProcessState.ExitCode(); status != exitSignal+int(sig) && status != exitTrouble {
			t.Errorf("status %d", status)
		}
		wantSame(t, p.dir, before)
	}
}
