package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/internal/text"
)

// steps are the commands that an inspection proposes.
func steps(i inspect.Single) string {
	var all []string
	for _, s := range i.Next {
		all = append(all, s.Command)
	}
	return strings.Join(all, "\n")
}

func TestInspectAStore(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	before := digests(t, p.dir)
	i := mustJSON[inspect.Single](t, "inspect", p.cow)
	if i.Kind != "store" || i.Bytes != 260*4096 || i.InUse || i.Store == nil || !i.Store.Opens || i.Store.Figures.Exceptions != 5 ||
		i.Store.Header != (inspect.Header{Valid: 1, Version: 1, ChunkSectors: 8}) || len(i.Store.Problems) > 0 || i.Store.Origin != p.origin {
		t.Errorf("%+v, %+v", i, i.Store)
	}
	for _, w := range []string{"dmsnap merge " + p.origin + " " + p.cow, "dmsnap map " + p.cow} {
		if !strings.Contains(steps(i), w) {
			t.Errorf("%q is not among the steps\n%s", w, steps(i))
		}
	}
	text := mustRun(t, "inspect", p.cow)
	for _, w := range []string{"dm-snapshot exception store, 1.0 MiB\n", "valid 1, version 1, chunks of 8 sectors", "exceptions  5", "next", "dmsnap export"} {
		if !strings.Contains(text, w) {
			t.Errorf("%q is not in\n%s", w, text)
		}
	}
	held := openFile(t, p.cow, false) // as a server does
	if i := mustJSON[inspect.Single](t, "inspect", p.cow); !i.InUse || strings.Contains(steps(i), "merge") {
		t.Errorf("in use: %v, steps %s", i.InUse, steps(i))
	}
	held.Close()
	wantSame(t, p.dir, before)
}

func TestInspectABadStore(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	spoil(t, p.cow)
	i := mustJSON[inspect.Single](t, "inspect", p.cow)
	if !i.Store.Opens || i.Store.Figures.Valid || i.Store.Problems[check.MarkedInvalid] != 1 || !strings.HasPrefix(steps(i), "dmsnap rescue "+p.origin+" "+p.cow) {
		t.Errorf("an invalid store: %+v, steps %s", i.Store, steps(i))
	}
	if text := mustRun(t, "inspect", p.cow); !strings.Contains(text, "marked invalid") || !strings.Contains(text, "DS007") {
		t.Errorf("text %s", text)
	}

	p = newPair(t)
	p.withStore(t)
	patch(4096+16, 0)(t, &p) // origin chunk 0 twice
	i = mustJSON[inspect.Single](t, "inspect", p.cow)
	if i.Store.Opens || i.Store.Figures != nil || i.Store.Problems[check.DuplicateOrigin] != 1 || !strings.Contains(steps(i), "dmsnap repair "+p.cow) {
		t.Errorf("a damaged store: %+v, steps %s", i.Store, steps(i))
	}
	if text := mustRun(t, "inspect", p.cow); !strings.Contains(text, "store, damaged") || !strings.Contains(text, "DS015 error") {
		t.Errorf("text %s", text)
	}
	for _, set := range []func(*testing.T, *pair){cut(100), cut(16), cut(6000), patch(12, 7), patch(8, 9)} {
		p := newPair(t)
		p.withStore(t)
		set(t, &p)
		if i := mustJSON[inspect.Single](t, "inspect", p.cow); i.Kind != "store" || i.Store.Opens || len(i.Store.Problems) == 0 {
			t.Errorf("%+v, %+v", i, i.Store)
		}
	}
}

func TestInspectAnOrigin(t *testing.T) {
	p := newPair(t)
	if o := dmsnap("inspect", p.origin); o.status != exitNo || !strings.Contains(o.out, "dmsnap create "+p.origin) || o.stderr != "" {
		t.Errorf("noise: %+v", o)
	}
	put := func(at int, magic string) {
		f, err := os.OpenFile(p.origin, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte(magic), int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	put(512, "EFI PART")
	p.withStore(t)
	again := filepath.Join(p.dir, "disk.img.cow")
	p.withStoreAt(t, again)
	spoil(t, again)
	i := mustJSON[inspect.Single](t, "inspect", p.origin)
	if i.Kind != "gpt" || len(i.Beside) != 2 || i.Beside[1] != (inspect.Beside{Path: p.cow, State: "ok", Exceptions: 5, Fits: true}) || i.Beside[0] != (inspect.Beside{Path: again, State: "invalid", Fits: true}) {
		t.Errorf("%+v", i)
	}
	for _, w := range []string{"dmsnap diff " + p.origin + " " + p.cow, "dmsnap rescue " + p.origin + " " + again} {
		if !strings.Contains(steps(i), w) {
			t.Errorf("%q is not among the steps\n%s", w, steps(i))
		}
	}
	if text := mustRun(t, "inspect", p.origin); !strings.Contains(text, p.cow+": a store, ok, 5 exceptions") || !strings.Contains(text, "gpt, disk with a GPT partition table") {
		t.Errorf("text %s", text)
	}
	os.Remove(again)
	os.Truncate(p.origin, 1<<19)
	if i := mustJSON[inspect.Single](t, "inspect", p.origin); i.Beside[0].Fits || !strings.Contains(steps(i), "--origin "+p.origin) {
		t.Errorf("a disk that was cut: %+v", i)
	}
}

// What real programs make is known for what it is.
func TestKindsInterop(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	writeFile(t, at("plain"), []byte("some text\n"))
	for _, c := range []struct {
		args []string // FILE is a sparse file of 400 MiB, which is inspected
		kind string
		says string
	}{
		{[]string{"mke2fs", "-q", "-t", "ext4", "-L", "backup", "FILE"}, "ext4", "label=backup"},
		{[]string{"mke2fs", "-q", "-t", "ext2", "FILE"}, "ext4", "version=ext2"},
		{[]string{"mkfs.xfs", "-q", "-L", "backup", "FILE"}, "xfs", "size=400 MiB"},
		{[]string{"mkswap", "FILE"}, "swap", ""},
		{[]string{"qemu-img", "create", "-q", "-f", "qcow2", "FILE", "64M"}, "qcow2", "size=64 MiB"},
		{[]string{"qemu-img", "create", "-q", "-f", "qed", "FILE", "64M"}, "qed", ""},
		{[]string{"qemu-img", "create", "-q", "-f", "vdi", "FILE", "64M"}, "vdi", ""},
		{[]string{"qemu-img", "create", "-q", "-f", "vmdk", "FILE", "64M"}, "vmdk", ""},
		{[]string{"qemu-img", "create", "-q", "-f", "vhdx", "FILE", "64M"}, "vhdx", ""},
		{[]string{"qemu-img", "create", "-q", "-f", "vpc", "FILE", "64M"}, "vhd", ""},
		{[]string{"zstd", "-q", "-f", at("plain"), "-o", "FILE"}, "zstd", ""},
		{[]string{"sh", "-c", `gzip -c "$0" > "$1"`, at("plain"), "FILE"}, "gzip", ""},
		{[]string{"sh", "-c", `xz -c "$0" > "$1"`, at("plain"), "FILE"}, "xz", ""},
	} {
		name := strings.Join(c.args[:min(5, len(c.args))], " ")
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(c.args[0]); err != nil {
				t.Skipf("SKIPPED: %v", err)
			}
			file := at("file")
			writeFile(t, file, nil)
			if err := os.Truncate(file, 400<<20); err != nil {
				t.Fatal(err)
			}
			args := append([]string{}, c.args...)
			for i, a := range args {
				if a == "FILE" {
					args[i] = file
				}
			}
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Skipf("SKIPPED: %v: %s", err, out)
			}
			i := mustJSON[inspect.Single](t, "inspect", file)
			said := ""
			for _, d := range i.Details {
				said += d.Name + "=" + d.Value + " "
			}
			if i.Kind != c.kind || !strings.Contains(said, c.says) || len(i.Next) == 0 {
				t.Errorf("%s, %s, next %s; want %s, %s", i.Kind, said, steps(i), c.kind, c.says)
			}
		})
	}
}

func TestInspectOtherThings(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	for content, want := range map[string]string{"": "empty", "x": "text", "hello\n": "text", "\x00": "zeros", "\x01\x02": "unknown", "SnAp": "store"} {
		path := filepath.Join(p.dir, "thing")
		writeFile(t, path, []byte(content))
		o := dmsnap("inspect", "--json", path)
		wantStatus := exitDone
		if want == "unknown" {
			wantStatus = exitNo
		}
		if o.status != wantStatus || !strings.Contains(o.out, `"kind": "`+want+`"`) {
			t.Errorf("%q: status %d, %s", content, o.status, o.out)
		}
		dmsnap("inspect", path)
	}
	packed, plain := filepath.Join(p.dir, "packed"), filepath.Join(p.dir, "it's a dump")
	mustRun(t, "dump", "--pack", p.cow, "-o", packed)
	mustRun(t, "dump", p.cow, "-o", plain)
	for path, want := range map[string]string{packed: "packed-dump", plain: "dump"} {
		if i := mustJSON[inspect.Single](t, "inspect", path); i.Kind != want || steps(i) != "dmsnap restore "+text.ShellWords(path)+" NEWCOW" {
			t.Errorf("%+v, want %s", i, want)
		}
	}
}

// Every command that is proposed is one of a verb that there is, with the options it has.
func TestNextStepsExist(t *testing.T) {
	for do := inspect.ActionCreate; do < inspect.ActionConvert; do++ {
		if commands[do][0] == "" {
			t.Errorf("action %d has no command", do)
		}
	}
	facts := func(opens bool) *inspect.Store { return &inspect.Store{Opens: opens, Report: &check.Report{}} }
	var all []inspect.Step
	add := func(d inspect.Disk) { all = append(all, (&inspect.Inspection{Disk: &d}).Steps(nil)...) }
	add(inspect.Disk{Path: "a", Store: facts(true)})
	add(inspect.Disk{Path: "a", Store: facts(true), InUse: true})
	for _, code := range []check.Code{check.MarkedInvalid, check.DuplicateOrigin, check.OutOfOrder, check.NoEndMark, check.VoidSlots} {
		f := facts(false)
		f.Report.Found = map[check.Code]uint64{code: 1}
		add(inspect.Disk{Path: "a.cow", Store: f})
	}
	for _, k := range image.Kinds() {
		if k == image.Store {
			continue // it has facts, and steps of its own: above
		}
		for _, b := range [][]inspect.Beside{nil, {{State: "ok", Fits: true}, {State: "ok"}, {State: "invalid"}, {State: "damaged"}, {InUse: true}}} {
			add(inspect.Disk{Path: "a.b", Kind: k.Name, Content: image.Content{Kind: k}, Beside: b})
		}
	}
	for _, s := range all {
		command := commandOf(s)
		args := strings.Fields(command)
		if args[0] == "qemu-img" {
			continue
		}
		c, rest, err := newRoot().Find(args[1:])
		if err == nil {
			err = c.ParseFlags(rest)
		}
		if err == nil && c.Args != nil {
			err = c.Args(c, c.Flags().Args())
		}
		if err != nil || args[0] != "dmsnap" || !c.HasParent() {
			t.Errorf("%q: %v", command, err)
		}
	}
}
