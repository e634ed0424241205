package main

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/server"
)

// A trap is something wrong with the files that a verb is given.
type trap struct {
	name string
	set  func(t *testing.T, p *pair) // spoils one of the two
	say  []string                    // what the error must say besides the path
	// origin: it is the origin that is spoilt, and its path that must be named.
	origin bool
	// only are the verbs that must refuse; empty: all that are given such a file.
	only []string
}

// patch changes bytes of the COW file.
func patch(off int64, b ...byte) func(*testing.T, *pair) {
	return func(t *testing.T, p *pair) {
		f, err := os.OpenFile(p.cow, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
}

var (
	readers = []string{"status", "export", "diff", "diff --verify", "list", "map", "map --origin", "merge", "merge -n", "serve", "serve --read-only"}
	pairs   = []string{"export", "diff", "diff --verify", "merge", "merge -n", "serve", "serve --read-only"}
)

var traps = []trap{
	{name: "wrong magic", set: patch(0, 'L', 'U', 'K', 'S'), say: []string{"byte 0x0", "magic is 0x534b554c"}, only: readers},
	{name: "no store", set: patch(0, 0, 0, 0, 0), say: []string{"no exception store", "dmsnap create"}, only: readers},
	{name: "wrong version", set: patch(8, 2), say: []string{"byte 0x8", "version 2"}, only: readers},
	{name: "chunk size 0", set: patch(12, 0), say: []string{"byte 0xc", "chunk size 0"}, only: readers},
	{name: "chunk size 7", set: patch(12, 7), say: []string{"byte 0xc", "chunk size 7"}, only: readers},
	{name: "chunk size too high", set: patch(12, 0, 0, 0, 0x80), say: []string{"byte 0xc", "too large"}, only: readers},
	{name: "truncated within the header", set: cut(100), say: []string{"100 bytes"}, only: readers},
	{name: "truncated within area 0", set: cut(6000), say: []string{"area 0"}, only: readers},
	{name: "truncated within the data", set: cut(5 * 4096), say: []string{"area 0 slot 3", "past the end"}, only: readers},
	{name: "exception in an area", set: patch(4096+8, 1), say: []string{"area 0 slot 0, byte 0x1000", "metadata"}, only: readers},
	{name: "chunk twice", set: patch(4096+16, 0), say: []string{"area 0 slot 1", "two exceptions"}, only: readers},
	{name: "invalid", set: func(t *testing.T, p *pair) { spoil(t, p.cow) }, say: []string{"invalid"}, only: []string{"export", "diff", "list", "map", "merge", "merge -n"}},
	{name: "COW is the origin", set: func(t *testing.T, p *pair) { p.cow = p.origin }, say: []string{"is the origin device"}, only: append([]string{"create"}, pairs...)},
	{name: "COW is a symbolic link to the origin", set: func(t *testing.T, p *pair) { link(t, p, os.Symlink) }, say: []string{"is the origin device"}, only: append([]string{"create"}, pairs...)},
	{name: "COW is a hard link of the origin", set: func(t *testing.T, p *pair) { link(t, p, os.Link) }, say: []string{"is the origin device"}, only: append([]string{"create"}, pairs...)},
	{name: "origin is no whole number of sectors", origin: true, set: func(t *testing.T, p *pair) { os.Truncate(p.origin, 1<<20-100) }, say: []string{"whole number"}, only: append([]string{"create", "map --origin"}, pairs...)},
}

func cut(size int64) func(*testing.T, *pair) {
	return func(t *testing.T, p *pair) {
		if err := os.Truncate(p.cow, size); err != nil {
			t.Fatal(err)
		}
	}
}

func link(t *testing.T, p *pair, make func(old, new string) error) {
	p.cow = filepath.Join(p.dir, "link.cow")
	if err := make(p.origin, p.cow); err != nil {
		t.Fatal(err)
	}
}

// command is how a verb is called with the pair.
func (p *pair) command(verb string) []string {
	words := strings.Fields(verb)
	switch words[0] {
	case "status", "list", "inspect":
		return append(words, p.cow)
	case "map":
		if len(words) > 1 {
			words = append(words, p.origin)
		}
		return append(words, p.cow)
	case "export":
		return append(words, p.origin, p.cow, filepath.Join(p.dir, "out.img"))
	case "serve":
		return append(words, p.origin, p.cow, "--socket", filepath.Join(p.dir, "nbd.sock"), "--control", filepath.Join(p.dir, "control.sock"))
	}
	return append(words, p.origin, p.cow)
}

// Whatever is wrong with what is in a file: status 2, one line that names the place, and nothing is touched.
func TestBadInput(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for _, trap := range traps {
		t.Run(trap.name, func(t *testing.T) {
			for _, verb := range trap.only {
				t.Run(verb, func(t *testing.T) {
					t.Parallel() // most of the time goes into waiting for the disk
					p := newPair(t)
					p.withStore(t)
					trap.set(t, &p)
					before := digestsOf(t, p.dir)
					place := p.cow
					if trap.origin {
						place = p.origin
					}
					dmsnap(p.command(verb)...).wantRefused(t, append(trap.say, place)...)
					if after := digestsOf(t, p.dir); before != after {
						t.Errorf("files were touched; before:\n%safter:\n%s", before, after)
					}
				})
			}
		})
	}
}

// digestsOf is digests as text, for files that may be unreadable, which then count by their size.
func digestsOf(t *testing.T, dir string) string {
	t.Helper()
	var b bytes.Buffer
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(filepath.Join(dir, e.Name()))
		b.WriteString(info.Mode().String() + " " + e.Name())
		if err == nil {
			b.WriteString(" " + digest(content))
		}
		b.WriteString("\n")
	}
	return b.String()
}

// Wrong usage: status 2 and one line, on every verb.
func TestBadUsage(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	fresh := filepath.Join(p.dir, "fresh.cow")
	before := digests(t, p.dir)
	for _, c := range []struct {
		args []string
		say  string
	}{
		{[]string{"frobnicate"}, `unknown command "frobnicate"`},
		{[]string{"--frobnicate"}, "unknown flag: --frobnicate"},
		{[]string{"create", p.origin}, "accepts 2 arg"},
		{[]string{"create", p.origin, fresh, "--chunk-size", "big"}, "not a size"},
		{[]string{"create", p.origin, fresh, "--chunk-size", "0"}, "power of two"},
		{[]string{"create", p.origin, fresh, "--chunk-size", "7"}, "512-byte sectors"},
		{[]string{"create", p.origin, fresh, "--chunk-size", "7s"}, "power of two"},
		{[]string{"create", p.origin, fresh, "--chunk-size", "2GiB"}, "too large"},
		{[]string{"create", p.origin, fresh, "--store", "X"}, "P, PO or N"},
		{[]string{"create", p.origin, fresh, "--store", "N"}, "nothing to create"},
		{[]string{"status"}, "COW is required"},
		{[]string{"status", p.cow, "--control", "x"}, "not both"},
		{[]string{"status", "--control", p.cow}, p.cow},
		{[]string{"status", "--control", fresh}, fresh},
		{[]string{"export", p.origin}, "accepts between 2 and 3 arg"},
		{[]string{"export", p.origin, p.cow}, "ORIGIN COW OUT are required"},
		{[]string{"diff", p.origin}, "ORIGIN and COW are required"},
		{[]string{"diff", p.origin, p.cow, p.cow, p.cow}, "between 1 and 3 arg"},
		{[]string{"diff", p.origin, p.cow, "--format", "xml"}, "text, ranges, json or bitmap"},
		{[]string{"diff", p.origin, p.cow, "--format", "text", "--json"}, "format json"},
		{[]string{"map", p.cow, "--color", "blue"}, "auto, always or never"},
		{[]string{"merge", p.origin}, "COW is required"},
		{[]string{"merge", p.origin, p.cow, "--wait"}, "require --control"},
		{[]string{"merge", "--control", fresh, "a", "b"}, "one NAME"},
		{[]string{"merge", "--control", fresh, "--dry-run"}, "offline"},
		{[]string{"merge", "--control", fresh, "--pause", "--resume"}, "pause resume"},
		{[]string{"merge", "--control", fresh, "a"}, fresh},
		{[]string{"snapshot", "a", fresh}, "--control PATH is required"},
		{[]string{"snapshot", "--control", fresh, "a"}, "accepts 2 arg"},
		{[]string{"snapshot", "--control", fresh, "a", fresh, "--chunk-size", "3k"}, "power of two"},
		{[]string{"snapshot", "--control", fresh, "a", fresh}, fresh},
		{[]string{"drop", "a"}, "--control PATH is required"},
		{[]string{"drop", "--control", fresh}, "accepts 1 arg"},
		{[]string{"drop", "--control", fresh, "a"}, fresh},
		{[]string{"serve"}, "at least 1 arg"},
		{[]string{"serve", p.origin, p.cow, "--sync", "never"}, "flush or always"},
		{[]string{"serve", p.origin, p.cow, "--store", "Q"}, "P, PO or N"},
		{[]string{"serve", p.origin, p.cow, "--socket", fresh, "--listen", ":0"}, "listen socket"},
		{[]string{"serve", p.origin, p.cow, "--read-only", "--create"}, "create read-only"},
		{[]string{"serve", p.origin, p.cow, "--chunk-size", "0"}, "power of two"},
		{[]string{"serve", p.origin, p.cow, "--store", "N"}, "overwrite"},
		{[]string{"serve", p.origin, p.cow, "--listen", "1.2.3.4.5:1"}, "1.2.3.4.5"},
		{[]string{"serve", p.origin, p.cow, "--socket", p.origin}, "not a socket"},
		{[]string{"serve", p.origin, p.cow, "again=" + p.cow}, "already in use"},
		{[]string{"serve", p.origin, p.cow, "disk=" + fresh}, `"disk" is taken`},
		{[]string{"serve", p.origin, "=" + p.cow}, "can't be the name"},
		{[]string{"serve", p.origin, "origin=" + p.cow, "--export-origin"}, "taken"},
		{[]string{"serve", p.origin, strings.Repeat("n", 5000) + "=" + p.cow}, "more than 4096 bytes"},
	} {
		t.Run(strings.ReplaceAll(strings.Join(c.args, " "), p.dir+"/", ""), func(t *testing.T) {
			dmsnap(c.args...).wantRefused(t, c.say)
			wantSame(t, p.dir, before)
		})
	}
	if o := dmsnap(); o.status != exitTrouble || !strings.Contains(o.stderr, "Usage:") || o.out != "" {
		t.Errorf("no verb: status %d, %q on stdout", o.status, o.out)
	}
}

// A serve that is refused, whatever for, leaves nothing: no socket, no COW file, no store on a file that was empty.
func TestRefusedServeLeavesNothing(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	busy, control := filepath.Join(p.dir, "busy"), filepath.Join(p.dir, "ctl")
	l, err := server.ListenUnix(busy)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file, empty, zeros := filepath.Join(p.dir, "file"), filepath.Join(p.dir, "empty"), filepath.Join(p.dir, "zeros")
	writeFile(t, file, []byte("precious"))
	writeFile(t, empty, nil)
	writeFile(t, zeros, make([]byte, 64<<10))
	long := filepath.Join(p.dir, strings.Repeat("d", 120))
	in := func(name string) string { return filepath.Join(p.dir, name) }
	before := digests(t, p.dir)
	for _, args := range [][]string{
		{p.origin, in("new"), "--socket", in("missing/s")},
		{p.origin, in("new"), "--socket", busy},
		{p.origin, in("new"), "--socket", file},
		{p.origin, in("new"), "--socket", long},
		{p.origin, in("new"), "--socket", in("s"), "--control", in("missing/c")},
		{p.origin, in("new"), "--socket", in("s"), "--control", busy},
		{p.origin, in("new"), "--socket", in("s"), "--control", in("s")},
		{p.origin, in("new"), "--socket", in("s"), "--control", long},
		{p.origin, in("new"), "--listen", "127.0.0.1:99999"},
		{p.origin, in("new"), "--listen", "127.0.0.1"},
		{p.origin, in("new"), "--listen", "no.such.host.invalid:1"},
		{p.origin, in("new"), "--socket", in("s"), "--control", control, "--tls-certificates", p.dir},
		{p.origin, in("new"), p.origin, "--socket", in("s")},             // the second COW is the origin
		{p.origin, in("new"), "b=" + file, "--socket", in("s")},          // or holds something else
		{p.origin, empty, "b=" + file, "--socket", in("s")},              // after a store was made on an empty file
		{p.origin, zeros, "b=" + file, "--socket", in("s")},              // or on zeros
		{p.origin, in("new"), "new=" + in("other"), "--socket", in("s")}, // two of one name
		{p.origin, in("new"), "b=" + in("new"), "--socket", in("s")},     // one file twice
		{p.origin, in("new"), "origin=" + in("other"), "--export-origin", "--socket", in("s")},
		{p.origin, in("new"), in("missing/b"), "--socket", in("s")},
		{p.origin, in("new"), "--store", "N", "b=" + p.cow, "--socket", in("s")},
	} {
		dmsnap(append([]string{"serve", "--create"}, args...)...).wantRefused(t)
		if after := digests(t, p.dir); !maps.Equal(before, after) {
			t.Fatalf("serve --create %q left %v, before there was %v", args, after, before)
		}
	}
	dmsnap("serve", file, "--socket", in("s"), "--raw").wantRefused(t)
	wantSame(t, p.dir, before)
}

// A server that can't start leaves no socket.
func TestServeThatFailsLeavesNoSocket(t *testing.T) {
	p := newPair(t)
	p.withStore(t)
	before := digests(t, p.dir)
	socket := filepath.Join(p.dir, "nbd.sock")
	dmsnap("serve", p.origin, p.cow, "--socket", socket, "--control", filepath.Join(p.dir, "missing", "ctl")).wantRefused(t, "missing")
	dmsnap("serve", p.origin, p.cow, "--socket", socket, "--control", socket).wantRefused(t, socket, "listens there already")
	wantSame(t, p.dir, before)
}
