package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/offline"
)

// TestQcow2Verbs exports a snapshot as an overlay and as a stand-alone image, and imports the overlay again: the same
// store. qemu reads the same.
func TestQcow2Verbs(t *testing.T) {
	p := newPair(t)
	view := p.withStore(t)
	before := digests(t, p.dir)
	dir := t.TempDir()
	overlay, alone, again := filepath.Join(dir, "o.qcow2"), filepath.Join(dir, "s.qcow2"), filepath.Join(dir, "again.cow")
	mustRun(t, "export", p.origin, p.cow, overlay, "--format", "qcow2", "--backing", p.origin)
	res := mustJSON[offline.ImportResult](t, "import", overlay, again, "--origin", p.origin)
	if res.Exceptions != 5 || res.ChunkSectors != 8 || res.Path != again {
		t.Errorf("%+v", res)
	}
	p.wantView(t, again, view)
	if was, is := mustRun(t, "list", p.cow), mustRun(t, "list", again); strings.ReplaceAll(was, p.cow, again) != is {
		t.Errorf("the store has %s, after the way back %s", was, is)
	}
	mustRun(t, "import", overlay, again, "--origin", p.origin, "--force", "--chunk-size", "16KiB")
	p.wantView(t, again, view)
	for _, args := range [][]string{nil, {"--compress"}, {"--compress=zstd", "--cluster-size", "4KiB"}, {"--backing", p.origin, "--cluster-size", "64KiB"}} {
		mustRun(t, append([]string{"export", p.origin, p.cow, alone, "--force", "--format", "qcow2"}, args...)...)
		if _, err := exec.LookPath("qemu-img"); err != nil {
			t.Log("SKIPPED: no qemu-img (Debian: apt-get install qemu-utils)")
			continue
		}
		raw := filepath.Join(dir, "raw")
		for _, c := range [][]string{{"check", "-q", alone}, {"convert", "-f", "qcow2", "-O", "raw", alone, raw}} {
			if out, err := exec.Command("qemu-img", c...).CombinedOutput(); err != nil {
				t.Fatalf("%q: %q: %v, %s", args, c, err, out)
			}
		}
		wantContent(t, raw, view)
	}
	wantSame(t, p.dir, before)
}

// TestQcow2Refused: what does not fit is refused, and nothing is made.
func TestQcow2Refused(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	short, overlay, alone := filepath.Join(dir, "short"), filepath.Join(dir, "o.qcow2"), filepath.Join(dir, "s.qcow2")
	writeFile(t, short, make([]byte, 1<<20))
	mustRun(t, "export", p.origin, p.cow, overlay, "--format", "qcow2", "--backing", p.origin)
	mustRun(t, "export", p.origin, p.cow, alone, "--format", "qcow2")
	nested := filepath.Join(dir, "nested.qcow2") // on a qcow2 image of the same disk
	mustRun(t, "export", p.origin, p.cow, nested, "--format", "qcow2", "--backing", "s.qcow2")
	for _, c := range []struct {
		args string
		want []string
	}{
		{"export ORIGIN COW OUT --format vmdk", []string{"raw or qcow2"}},
		{"export ORIGIN COW OUT --compress", []string{"require --format qcow2"}},
		{"export ORIGIN COW - --format qcow2", []string{"standard output"}},
		{"export ORIGIN COW OUT --format qcow2 --compress=lzma", []string{"deflate or zstd"}},
		{"export ORIGIN COW OUT --format qcow2 --cluster-size 3KiB", []string{"power of two"}},
		{"export ORIGIN COW OUT --format qcow2 --backing SHORT", []string{short, "1048576"}},
		{"export ORIGIN COW OUT --format qcow2 --backing absent", []string{"absent"}},
		{"export ORIGIN COW OUT --format qcow2 --backing COW", []string{p.cow}},
		{"export ORIGIN COW ALONE --format qcow2 --backing ALONE --force", []string{"same file"}},
		{"import OVERLAY OUT", []string{"--origin BASE is required"}},
		{"import OVERLAY OUT --origin SHORT", []string{overlay, "1048576"}},
		{"import ALONE OUT --origin ORIGIN", []string{alone, "not an overlay"}},
		{"import NESTED OUT --origin ORIGIN", []string{nested, "qcow2"}},
		{"import ORIGIN OUT --origin ORIGIN", []string{p.origin}},
		{"import COW OUT --origin ORIGIN", []string{p.cow, "not a qcow2 image"}},
		{"import OVERLAY OVERLAY --origin ORIGIN --force", []string{"same file"}},
		{"import OVERLAY OUT --origin ALONE", []string{alone}},
		{"import OVERLAY OUT --origin ORIGIN --chunk-size 5KiB", []string{"power of two"}},
	} {
		args := strings.Fields(c.args)
		for i, w := range args {
			if path, ok := map[string]string{"ORIGIN": p.origin, "COW": p.cow, "OUT": out, "SHORT": short, "OVERLAY": overlay, "ALONE": alone, "NESTED": nested}[w]; ok {
				args[i] = path
			}
		}
		dmsnap(args...).wantRefused(t, c.want...)
		if _, err := os.Stat(out); err == nil {
			t.Errorf("%s: made a file", c.args)
		}
	}
}
