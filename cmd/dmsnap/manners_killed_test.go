package main

import (
	"bytes"
	"crypto/sha256"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/ondisk"
)

// bigKit is a kit with so much in it that verbs take a while: 8 MiB of exceptions out of order. In BAD every
// fourth of the first 2000 slots names one and the same origin chunk, so that repair has chunks to move.
func bigKit(t *testing.T) *kit {
	t.Helper()
	const size, piece = 8 << 20, 64 << 10
	k := kitIn(t.TempDir())
	origin := make([]byte, size)
	for i := 0; i < size; i += 512 {
		origin[i] = byte(i>>9) | 1
	}
	writeFile(t, k.path["ORIGIN"], origin)
	mustRun(t, k.expand("create ORIGIN COW --cow-size 10MiB")...)
	var offs []int64
	for _, i := range rand.New(rand.NewPCG(5, 5)).Perm(size / piece) {
		offs = append(offs, int64(i*piece))
	}
	if err := writeTo(k.path["ORIGIN"], k.path["COW"], bytes.Repeat([]byte("changed,"), piece/8-10), offs...); err != nil {
		t.Fatal(err)
	}
	cow := readFile(t, k.path["COW"])
	writeFile(t, k.path["INVALID"], cow)
	writeFile(t, k.path["BAD"], cow)
	if err := patchFile(k.path["INVALID"], 4, 0); err != nil {
		t.Fatal(err)
	}
	for slot := int64(4); slot < 2000; slot += 4 {
		area, index := slot/256, slot%256
		if err := patchFile(k.path["BAD"], (1+area*257)*4096+index*16, cow[4096:4096+8]...); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, k.path["FIXED"], readFile(t, k.path["BAD"]))
	mustRun(t, k.expand("dump --data COW --output TEXT")...)
	mustRun(t, k.expand("dump --pack COW --output PACK")...)
	mustRun(t, k.expand("repair FIXED --in-place --undo UNDO")...)
	mustRun(t, k.expand("export ORIGIN COW OVERLAY --format qcow2 --backing ORIGIN")...)
	mustRun(t, k.expand("send ORIGIN COW --output STREAM")...)
	return k
}

// A killing is one life of a verb, cut short.
type killing struct {
	*kit
	calling
	before map[string][]byte // inputs that it changes
	after  map[string][]byte // these and the outputs, when it was left alone
}

// reset makes the folders what they were before the verb ran.
func (k *killing) reset(t *testing.T) {
	t.Helper()
	for name, content := range k.before {
		writeFile(t, k.path[name], content)
	}
	list, err := os.ReadDir(k.out)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		os.Remove(filepath.Join(k.out, e.Name()))
	}
}

// rest is what lies about besides outputs.
func (k *killing) rest(t *testing.T) (paths []string) {
	t.Helper()
	more := filepath.Dir(k.path["COW2"])
	for _, dir := range []string{k.in, more, k.out} {
		list, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list {
			path := filepath.Join(dir, e.Name())
			if path != more && !slices.Contains(slices.Collect(maps.Values(k.path)), path) {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// wantWholeOrNothing looks at the outputs, and has what was changed in place put right.
func (k *killing) wantWholeOrNothing(t *testing.T, when string) {
	t.Helper()
	for _, out := range k.outputs() {
		if b, err := os.ReadFile(k.path[out]); err == nil && !bytes.Equal(withoutID(b), withoutID(k.after[out])) {
			t.Errorf("%s: half of %s: %d bytes of %d", when, out, len(b), len(k.after[out]))
		}
	}
	if k.option("undo") && k.writes != "" && k.names([]string{"OUT"}) != nil { // OUT is an undo file
		if _, err := os.Stat(k.path["OUT"]); err == nil {
			mustRun(t, k.expand("repair "+k.writes+" --undo-apply OUT")...)
			os.Remove(k.path["OUT"])
		}
		if !bytes.Equal(readFile(t, k.path[k.writes]), k.before[k.writes]) {
			t.Errorf("%s: %s is not what it was", when, k.writes)
		}
	}
	for _, out := range k.outputs() {
		os.Remove(k.path[out])
	}
	if p := launch(t, k.expand(k.args)...); p.end(t) != exitDone {
		t.Errorf("%s: the next run: %s", when, &p.stderr)
	}
	for name, want := range k.after {
		if !bytes.Equal(withoutID(readFile(t, k.path[name])), withoutID(want)) {
			t.Errorf("%s: the next run made another %s", when, name)
		}
	}
}

var undoID = regexp.MustCompile(`"id":"[0-9a-f]*"`)

// withoutID is a file without the random id that an undo file and the store it is of share.
func withoutID(b []byte) []byte {
	if bytes.HasPrefix(b, []byte("dmsnap undo ")) {
		return undoID.ReplaceAll(b[:len(b)-sha256.Size], nil)
	}
	if len(b) >= ondisk.SectorSize {
		if _, ok := ondisk.DecodeChangeLabel(b); ok {
			b = bytes.Clone(b)
			clear(b[ondisk.ChangeLabelAt:][:ondisk.ChangeLabelBytes])
		}
	}
	return b
}

// A verb that is killed leaves its output whole or not at all, one that is interrupted no other files either;
// what it changes in place can be taken back, or is finished by the next run. DMSNAP_DEEP=1 kills each twenty
// times as often.
func TestMannersOfKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	big := bigKit(t)
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1)) // a moment is what this test is about
	runs, cut, each := 0, 0, 2
	if os.Getenv("DMSNAP_DEEP") != "" {
		each = 40
	}
	makes := func(c calling) bool {
		again := c.verb() == "merge" || c.verb() == "receive" && c.writes != "" // goes on when it is called again: other tests
		return !c.served && !c.fleet && !c.stays && !again && c.verb() != "grow" && c.status == exitDone && (withOutputs(c) || c.writes != "")
	}
	kill := func(t *testing.T, c calling) {
		k := &killing{kit: big, calling: c, before: map[string][]byte{}, after: map[string][]byte{}}
		for _, name := range strings.Fields(c.writes) {
			k.before[name] = readFile(t, k.path[name])
		}
		defer k.reset(t)
		k.reset(t)
		began := time.Now()
		if p := launch(t, k.expand(c.args)...); p.end(t) != exitDone {
			t.Fatalf("left alone: %s", &p.stderr)
		}
		took := time.Since(began)
		for _, name := range slices.Concat(c.outputs(), slices.Collect(maps.Keys(k.before))) {
			k.after[name] = readFile(t, k.path[name])
		}
		for i := range each {
			sig := []syscall.Signal{syscall.SIGKILL, syscall.SIGINT}[i%2]
			k.reset(t)
			p := launch(t, k.expand(c.args)...)
			delay := time.Duration(r.Int64N(int64(took)))
			time.Sleep(delay)
			p.Process.Signal(sig)
			status := p.end(t)
			runs++
			when := sig.String() + " after " + delay.String() + " of " + took.String()
			if status == exitSignal+int(sig) || status == -1 {
				cut++
			} else if status != exitDone {
				t.Errorf("%s: status %d, %s", when, status, &p.stderr)
			}
			// An interrupt that comes before anybody listens (-1) is before there are files too.
			if rest := k.rest(t); sig == syscall.SIGINT && len(rest) > 0 {
				t.Errorf("%s: %q are left", when, rest)
			}
			k.wantWholeOrNothing(t, when)
		}
	}
	for _, c := range callings {
		if makes(c) {
			t.Run(c.args, func(t *testing.T) { kill(t, c) })
		}
	}
	t.Logf("%d runs, %d cut short", runs, cut)
	if cut == 0 {
		t.Error("none was cut short")
	}
}
