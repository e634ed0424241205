package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/stream"
)

// A sending is a folder with an origin, two snapshots of it, and what they show.
type sending struct {
	dir      string
	old, new []byte
}

func (s sending) path(name string) string { return filepath.Join(s.dir, name) }

// newSending makes disk.img, a.cow and b.cow, and copy.img, which has what a.cow shows.
func newSending(t *testing.T, size int) sending {
	t.Helper()
	s := sending{dir: t.TempDir()}
	origin := blocktest.Pattern(size, 1)
	clear(origin[size/2 : size*5/8])
	writeFile(t, s.path("disk.img"), origin)
	r := rand.New(rand.NewPCG(3, 3))
	for i, name := range []string{"a", "b"} {
		mustRun(t, "create", s.path("disk.img"), s.path(name+".cow"))
		for range 5 {
			p := blocktest.Pattern(size/20, r.Uint64())
			if err := writeTo(s.path("disk.img"), s.path(name+".cow"), p, r.Int64N(int64(size-len(p)))/512*512); err != nil {
				t.Fatal(err)
			}
		}
		out := s.path(name + ".img")
		mustRun(t, "export", s.path("disk.img"), s.path(name+".cow"), out)
		if i == 0 {
			s.old = readFile(t, out)
		} else {
			s.new = readFile(t, out)
		}
	}
	writeFile(t, s.path("copy.img"), s.old)
	mustRun(t, "send", s.path("disk.img"), s.path("b.cow"), "--since", s.path("a.cow"), "--output", s.path("delta"))
	return s
}

func (s sending) wantCopy(t *testing.T, want []byte) {
	t.Helper()
	if !bytes.Equal(readFile(t, s.path("copy.img")), want) {
		t.Fatal("the copy has something else")
	}
}

// A copy of what the older snapshot shows becomes one of what the newer shows, and back again.
func TestReceive(t *testing.T) {
	s := newSending(t, 4<<20)
	mustRun(t, "receive", s.path("delta"), s.path("copy.img"), "--undo", s.path("undo.cow"), "--verify-first")
	s.wantCopy(t, s.new)
	mustRun(t, "check", s.path("undo.cow"), "--origin", s.path("copy.img"))
	var got offline.ReceiveResult
	if err := json.Unmarshal([]byte(mustRun(t, "receive", s.path("delta"), s.path("copy.img"), "--json")), &got); err != nil {
		t.Fatal(err)
	}
	if got.Written != 0 || got.Present != got.Data+got.Zero || got.Kind != stream.Delta || got.Size != 4<<20 {
		t.Errorf("again: %+v", got)
	}
	// The stores beside it are snapshots of another disk: a warning is all that merge can say of them.
	if o := dmsnap("merge", s.path("copy.img"), s.path("undo.cow")); o.status != exitDone {
		t.Fatal(o.stderr)
	}
	s.wantCopy(t, s.old)

	mustRun(t, "receive", s.path("delta"), "--origin", s.path("copy.img"), "--cow", s.path("over.cow"), "--chunk-size", "16KiB")
	s.wantCopy(t, s.old)
	mustRun(t, "check", s.path("over.cow"), "--origin", s.path("copy.img"))
	mustRun(t, "export", s.path("copy.img"), s.path("over.cow"), s.path("over.img"))
	if !bytes.Equal(readFile(t, s.path("over.img")), s.new) {
		t.Error("the new store shows something else")
	}

	mustRun(t, "send", s.path("disk.img"), "--output", s.path("whole"))
	mustRun(t, "receive", s.path("whole"), s.path("again.img"))
	if !bytes.Equal(readFile(t, s.path("again.img")), readFile(t, s.path("disk.img"))) {
		t.Error("the whole disk became another")
	}
	if a, b := blocksOf(t, s.path("again.img")), blocksOf(t, s.path("disk.img")); a > b {
		t.Errorf("the new image takes %d blocks, the disk %d", a, b)
	}
}

// blocksOf returns how many blocks of 512 bytes a file takes.
func blocksOf(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks
}

// What does not fit is refused, and nothing is left or changed.
func TestReceiveRefuses(t *testing.T) {
	s := newSending(t, 4<<20)
	mustRun(t, "send", s.path("disk.img"), "--output", s.path("whole"))
	cut := readFile(t, s.path("delta"))
	writeFile(t, s.path("cut"), cut[:len(cut)-1])
	writeFile(t, s.path("short.img"), s.old[:1<<20])
	for _, c := range []struct {
		args string
		says string
	}{
		{"receive delta disk.img", "neither the bytes that the stream replaces nor those that it brings"},
		{"receive delta disk.img --undo new", "neither the bytes"},
		{"receive delta --origin disk.img --cow new", "neither the bytes"},
		{"receive whole copy.img", "--force writes it over anything"},
		{"receive delta short.img", "1048576 bytes, the disk has 4194304"},
		{"receive delta new", "no such file"},
		{"receive disk.img copy.img", "it is no stream of dmsnap"},
		{"receive cut copy.img --verify-first", "ends here, before its last frame"},
		{"receive delta copy.img --undo copy.img", "same file"},
		{"receive delta copy.img --origin disk.img --cow new", "not both"},
		{"receive delta", "TARGET is required"},
		{"receive - copy.img --verify-first", "must be a file"},
		{"send disk.img --since a.cow", "ORIGIN COW are required"},
		{"send disk.img a.cow --output disk.img", "same file"},
		{"send disk.img disk.img", "disk.img"},
	} {
		t.Run(c.args, func(t *testing.T) {
			before := map[string][]byte{}
			for _, name := range []string{"disk.img", "copy.img", "short.img", "a.cow", "b.cow", "delta"} {
				before[name] = readFile(t, s.path(name))
			}
			words := strings.Fields(c.args)
			for i, w := range words[1:] {
				if !strings.HasPrefix(w, "-") {
					words[i+1] = s.path(w)
				}
			}
			o := dmsnap(words...)
			if o.status != exitTrouble || !strings.Contains(o.stderr, c.says) {
				t.Errorf("status %d, %s", o.status, o.stderr)
			}
			for name, content := range before {
				if !bytes.Equal(readFile(t, s.path(name)), content) {
					t.Errorf("%s was changed", name)
				}
			}
			if _, err := os.Stat(s.path("new")); err == nil {
				t.Error("a new file is left")
			}
		})
	}
	if o := dmsnap("receive", "--check", s.path("delta"), s.path("disk.img")); o.status != exitNo {
		t.Errorf("--check: status %d, %s", o.status, o.stderr)
	}
	mustRun(t, "receive", "--check", s.path("delta"), s.path("copy.img"))
}

// A receive that is killed at any moment is finished by the next one, also with the old bytes kept.
func TestReceiveKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	s := newSending(t, 32<<20)
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1)) // a moment is what this test is about
	began := time.Now()
	mustRun(t, "receive", s.path("delta"), s.path("copy.img"))
	took := time.Since(began)
	cut, rounds := 0, 6
	if os.Getenv("DMSNAP_DEEP") != "" {
		rounds = 300
	}
	for i := range rounds {
		writeFile(t, s.path("copy.img"), s.old)
		var undone []string
		for n := range 4 {
			args := []string{"receive", s.path("delta"), s.path("copy.img")}
			if i%2 == 0 {
				undone = append(undone, s.path(fmt.Sprintf("undo%d-%d", i, n)))
				args = append(args, "--undo", undone[n])
			}
			p := launch(t, args...)
			if n < 3 {
				time.Sleep(time.Duration(r.Int64N(int64(took))))
				p.Process.Signal([]syscall.Signal{syscall.SIGKILL, syscall.SIGTERM}[n%2])
			}
			if status := p.end(t); n == 3 && status != exitDone {
				t.Fatalf("round %d: left alone: status %d, %s", i, status, &p.stderr)
			} else if status != exitDone {
				cut++
			}
		}
		s.wantCopy(t, s.new)
		for n := len(undone) - 1; n >= 0; n-- { // the last first
			if _, err := os.Stat(undone[n]); err == nil {
				mustMerge(t, s.path("copy.img"), undone[n])
			}
		}
		if len(undone) > 0 {
			s.wantCopy(t, s.old)
		}
	}
	t.Logf("%d of %d were cut short", cut, 3*rounds)
	if cut == 0 {
		t.Error("none was cut short")
	}
}
