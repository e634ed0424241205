package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/internal/testremote"
	"github.com/dmsnap/dmsnap/nbd"
)

// TestLayersPage runs the commands of docs/layers.md against a registry. A disk that is served is read and written to.
func TestLayersPage(t *testing.T) {
	dir := testhost.ShortDir(t)
	if err := os.Symlink(program(t), filepath.Join(dir, "dmsnap")); err != nil {
		t.Fatal(err)
	}
	content := append(blocktest.Pattern(4<<20, 1), make([]byte, 4<<20)...)
	writeFile(t, filepath.Join(dir, "debian.img"), content)
	registry := testremote.Start(t, testremote.NewRegistry())
	run := func(line string) {
		if out, err := shell(dir, line).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v, %s", line, err, out)
		}
	}
	use := func(line string) {
		defer serveExample(t, dir, line)()
		_, socket, _ := strings.Cut(line, "--socket ")
		socket, _, _ = strings.Cut(socket, " ")
		disk, err := nbd.Dial(t.Context(), "nbd+unix:///?socket="+filepath.Join(dir, socket))
		if err != nil {
			t.Fatal(err)
		}
		defer disk.Close()
		got := make([]byte, 100_000)
		if _, err := disk.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, content[1<<20:][:len(got)]) {
			t.Errorf("%s: other bytes are read, or %v", line, err)
		}
		writeAt(t, disk, []byte("changed"), 2<<20)
		if err := disk.Flush(); err != nil {
			t.Error(err)
		}
	}

	commands := 0
	for i, part := range strings.Split(string(readFile(t, "../../docs/layers.md")), "```") {
		block, is := strings.CutPrefix(part, "sh\n")
		if i%2 == 0 || !is {
			continue
		}
		for line := range strings.Lines(block) {
			line, _, _ = strings.Cut(line, "#")
			line = strings.ReplaceAll(strings.TrimSpace(line), "registry.example", registry)
			if strings.HasSuffix(line, "--prefetch boot") {
				run("dmsnap create oci://" + registry + "/golden/debian:13 vm2.cow")
			}
			switch {
			case line == "":
				continue
			case strings.HasPrefix(line, "dmsnap serve"):
				use(line)
			default:
				run(line)
			}
			commands++
		}
	}
	if commands < 8 {
		t.Errorf("%d commands", commands)
	}
	if boot := readFile(t, filepath.Join(dir, "boot")); len(boot) == 0 {
		t.Error("no range that was read is in the file of --prefetch-record")
	}
	copy(content[2<<20:], "changed")
	wantContent(t, filepath.Join(dir, "whole.img"), content)
	stores, err := filepath.Glob(filepath.Join(dir, "images", "*.cow"))
	if err != nil || len(stores) != 1 {
		t.Fatalf("the stores that were pulled: %v, %v", stores, err)
	}
	for _, path := range append(stores, filepath.Join(dir, "vm1.cow"), filepath.Join(dir, "vm2.cow")) {
		mustRun(t, "check", path)
	}
}
