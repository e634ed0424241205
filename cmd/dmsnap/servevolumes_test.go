package main

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
)

// TestServeVolumes serves a logical volume with its snapshots to clients, which write to the origin and to a snapshot.
func TestServeVolumes(t *testing.T) {
	dir := testhost.ShortDir(t)
	disk := filepath.Join(dir, "vm.img")
	writeLVMImage(t, disk)
	r := start(t, pair{dir: dir, origin: disk + "#vg0/root"}, serveOptions{})
	var names []string
	st := mustJSON[api.Status](t, "status", "--control", r.control)
	for _, s := range st.Snapshots {
		names = append(names, s.Name)
	}
	if strings.Join(names, " ") != "before later" || st.Origin.Name != "root" || st.Origin.URI != r.uri("root") {
		t.Errorf("%v, %+v", names, st.Origin)
	}
	wrote := bytes.Repeat([]byte("written by a client "), 1000)
	was := readAll(t, r.dev("later"))
	for name, off := range map[string]int64{"root": 1 << 20, "before": 0} {
		c, err := nbd.Dial(t.Context(), r.uri(name))
		if err != nil {
			t.Fatal(err)
		}
		writeAt(t, c, wrote, off)
		if err := c.Flush(); err != nil {
			t.Error(err)
		}
		c.Close()
	}
	if !bytes.Equal(readAll(t, r.dev("later")), was) {
		t.Error("a snapshot was changed by writes to others")
	}
	for _, args := range [][]string{{"drop", "--control", r.control, "later"}, {"grow", "--control", r.control, "later", "1G"}} {
		if o := dmsnap(args...); o.status != exitTrouble || !strings.Contains(o.stderr, "a volume of the origin's group") {
			t.Errorf("%v: %d, %s", args, o.status, o.stderr)
		}
	}
	r.stop()
	for volume, off := range map[string]int{"root": 1 << 20, "before": 0} {
		out := filepath.Join(dir, volume)
		mustRun(t, "export", disk+"#vg0/"+volume, out)
		if got := readFile(t, out); !bytes.Equal(got[off:off+len(wrote)], wrote) {
			t.Errorf("%s does not have what a client wrote", volume)
		}
	}
	mustRun(t, "export", disk+"#vg0/later", filepath.Join(dir, "later"))
	if !bytes.Equal(readFile(t, filepath.Join(dir, "later")), was) {
		t.Error("a snapshot is another one after the server has ended")
	}
}

// TestServeVolumesRefused: what can't be served leaves no file behind and the disk as it is.
func TestServeVolumesRefused(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	dir := testhost.ShortDir(t)
	disk := filepath.Join(dir, "vm.img")
	writeLVMImage(t, disk)
	before := readFile(t, disk)
	socket := "--socket=" + filepath.Join(dir, "s")
	for want, args := range map[string][]string{
		"--socket or --listen is required": {disk + "#vg0/root"},
		"COW is required":                  {disk + "#p1", socket},
		"a fixed size":                     {disk + "#vg0/root", socket, "--grow=1M"},
		"no disk":                          {disk + "#vg0/later:cow", disk + ".cow", socket},
		"not found":                        {disk + "#vg0/none", socket},
		"origin device":                    {disk + "#p1", "a=" + disk, "--create", "--force", socket},
	} {
		if o := dmsnap(append([]string{"serve"}, args...)...); o.status != exitTrouble || !strings.Contains(o.stderr, want) {
			t.Errorf("%v: %d, %s; want %q", args, o.status, o.stderr, want)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) != 1 {
		t.Errorf("files are left: %v", left)
	}
	if !bytes.Equal(readFile(t, disk), before) {
		t.Error("the disk was changed")
	}
}
