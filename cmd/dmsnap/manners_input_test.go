package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
)

// withInputs is for callings that are given files.
func withInputs(c calling) bool { return len(c.inputs()) > 0 }

// eachInput is a subtest for each input of each calling, with a kit of its own.
func eachInput(t *testing.T, suits func(c calling, in string) bool, f func(t *testing.T, k *kit, c calling, in string)) {
	eachCalling(t, withInputs, func(t *testing.T, c calling) {
		for _, in := range c.inputs() {
			if suits == nil || suits(c, in) {
				t.Run(in, func(t *testing.T) { f(t, newKit(t), c, in) })
			}
		}
	})
}

// What is not there, no file, or not to be read is refused by name.
func TestMannersOfMissingInput(t *testing.T) {
	eachInput(t, nil, func(t *testing.T, k *kit, c calling, in string) {
		path := k.path[in]
		os.Remove(path)
		k.wantRefused(t, k.expand(c.args), path, "no such file or directory")
		os.Mkdir(path, 0o755)
		k.wantRefused(t, k.expand(c.args), path) // some say: not a regular file
		os.Remove(path)
		os.Symlink(path, path)
		k.wantRefused(t, k.expand(c.args), path, "too many levels of symbolic links")
		os.Remove(path)
		if in == "TEXT" || in == "PACK" || in == "STREAM" { // these may well come through a pipe
			return
		}
		if err := syscall.Mkfifo(path, 0o644); err != nil {
			t.Fatal(err)
		}
		k.wantRefused(t, k.expand(c.args), path) // and does not wait for a writer
		k.path[in] = "/dev/null"
		k.wantRefused(t, k.expand(c.args), "/dev/null")
	})
}

// A file that may not be read is refused, one that may not be written where it would have to be.
func TestMannersOfPermissions(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	eachCalling(t, withInputs, func(t *testing.T, c calling) {
		k := newKit(t)
		chmod := func(mode os.FileMode) {
			t.Helper()
			os.Chmod(k.out, 0o777)
			for _, in := range c.inputs() {
				m := mode
				if has(c.writes, in) {
					m = 0o666
				}
				if err := os.Chmod(k.path[in], m); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, in := range c.inputs() {
			modes := []os.FileMode{0}
			if has(c.writes, in) {
				modes = append(modes, 0o444)
			}
			for _, mode := range modes {
				chmod(0o444)
				if err := os.Chmod(k.path[in], mode); err != nil {
					t.Fatal(err)
				}
				before := k.state(t)
				k.callAs(t, k.expand(c.args)...).wantRefused(t, k.path[in], "permission denied")
				k.wantState(t, before)
			}
		}
		if c.stays {
			return
		}
		// What it only reads it need not be able to write, nor the folder where that is.
		chmod(0o444)
		if c.writes == "" {
			os.Chmod(k.in, 0o555)
			defer os.Chmod(k.in, 0o755)
		}
		before := k.state(t)
		o := k.callAs(t, k.expand(c.args)...)
		if warned := c.verb() == "merge" && strings.Contains(o.stderr, "no side file can be made beside"); !c.ended(o) && !(warned && o.status == c.status) {
			t.Errorf("read-only: status %d, %s", o.status, o.stderr)
		}
		after := k.state(t)
		for path, b := range before {
			for _, in := range c.inputs() {
				if path == k.path[in] && !has(c.writes, in) && after[path] != b {
					t.Errorf("%s: %q before, %q now", path, b, after[path])
				}
			}
		}
	})
}

// Bytes that are no store are described by inspect and check, and refused with the name of the file by all others; so
// is binary data in place of text.
func TestMannersOfBadContent(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	noise := blocktest.Pattern(65_536, 3)
	blamed := func(k *kit, c calling, in string) string {
		if in == "FIXED" { // nothing is wrong with a device, but that the undo file is not its own
			return k.path["UNDO"]
		}
		return k.path[in]
	}
	contents := map[string][]byte{
		"empty": {}, "tiny": []byte("SnAp"), "almost a sector": make([]byte, 511), "random": noise,
		"text": bytes.Repeat([]byte("dear all, "), 9999), "zeros": make([]byte, 60_000),
		"only a header": bytes.Clone(header()), "a header, then noise": append(header(), noise...),
	}
	eachInput(t, nil, func(t *testing.T, k *kit, c calling, in string) {
		for name, content := range contents {
			if in == "ORIGIN" && len(content)%512 == 0 {
				continue // any whole sectors are a disk, none too
			}
			writeFile(t, k.path[in], content)
			if !has(c.any, in) || in == "ORIGIN" {
				if strings.Contains(name, "header") && c.verb() == "rescue" || name == "a header, then noise" && c.verb() == "repair" {
					continue // that is their work
				}
				k.wantRefused(t, k.expand(c.args), blamed(k, c, in))
				continue
			}
			before := k.state(t)
			o := k.call(c.args)
			if o.status != exitDone && o.status != exitNo || o.stderr != "" {
				t.Errorf("%s: status %d, %s", name, o.status, o.stderr)
			}
			for _, out := range c.outputs() {
				os.Remove(k.path[out])
			}
			for path, b := range k.state(t) {
				if strings.HasPrefix(path, k.in+"/") && before[path] != b {
					t.Errorf("%s: %s: %q before, %q now", name, path, before[path], b)
				}
			}
		}
	})
}

// header is the first chunk of a sound store, with areas that are past the end of a short file.
func header() []byte {
	b := make([]byte, 4096)
	ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: ondisk.Version, ChunkSectors: 8}.Encode(b)
	return b
}

// A file with a writer is not changed, and is read only with --live-read, or by verbs that report how reliable the
// result is.
func TestMannersOfInputInUse(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	eachInput(t, nil, func(t *testing.T, k *kit, c calling, in string) {
		f := openFile(t, k.path[in], false)
		switch {
		case has(c.shares, in):
			if o := k.call(c.args); !c.ended(o) {
				t.Errorf("in use: status %d, %s", o.status, o.stderr)
			}
		case c.option("live-read") && !has(c.writes, in):
			k.wantRefused(t, k.expand(c.args), k.path[in], "in use", "--live-read")
			if o := k.call(c.args, "--live-read"); !c.ended(o) {
				t.Errorf("--live-read: status %d, %s", o.status, o.stderr)
			}
		default:
			k.wantRefused(t, k.expand(c.args), k.path[in], "in use")
		}
		f.Close()
	})
}

// Two may read at once; none may write what another reads.
func TestMannersOfInputBeingRead(t *testing.T) {
	eachInput(t, func(c calling, in string) bool { return !c.stays || has(c.writes, in) }, func(t *testing.T, k *kit, c calling, in string) {
		openFile(t, k.path[in], true)
		if has(c.writes, in) {
			k.wantRefused(t, k.expand(c.args), k.path[in], "in use")
			return
		}
		if o := k.call(c.args); !c.ended(o) {
			t.Errorf("status %d, %s", o.status, o.stderr)
		}
	})
}

// A server that is not there, or is something else, is refused by the path of its socket.
func TestMannersOfMissingServer(t *testing.T) {
	eachCalling(t, func(c calling) bool { return c.served || c.fleet }, func(t *testing.T, c calling) {
		k := newKit(t)
		k.wantRefused(t, k.expand(c.args), k.path["CONTROL"], "no such file")
		k.path["CONTROL"] = k.path["TEXT"]
		k.wantRefused(t, k.expand(c.args), k.path["TEXT"])
		k.path["CONTROL"] = filepath.Join(k.in)
		k.wantRefused(t, k.expand(c.args), k.in)
	})
}
