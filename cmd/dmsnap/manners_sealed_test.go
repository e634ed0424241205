package main

import (
	"os"
	"testing"

	"github.com/dmsnap/dmsnap/ondisk"
)

// sealFile labels the store in a file as a sealed layer.
func sealFile(t *testing.T, path string) {
	t.Helper()
	sector := make([]byte, ondisk.SectorSize)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(sector, 0); err != nil {
		t.Fatal(err)
	}
	ondisk.SealedLabel{}.Encode(sector)
	if _, err := f.WriteAt(sector, 0); err != nil {
		t.Fatal(err)
	}
}

// A sealed layer is read as any store, and is written by no verb.
func TestMannersOfSealedLayers(t *testing.T) {
	eachInput(t, func(c calling, in string) bool { return has("COW COW2 BAD INVALID FIXED", in) }, func(t *testing.T, k *kit, c calling, in string) {
		sealFile(t, k.path[in])
		if has(c.writes, in) {
			k.wantRefused(t, k.expand(c.args), k.path[in], "sealed layer")
			return
		}
		if c.stays {
			return
		}
		if o := k.call(c.args); o.status != c.status {
			t.Errorf("status %d, %s", o.status, o.stderr)
		}
	})
}

// An output does not replace a sealed layer, also with --force.
func TestMannersOfSealedOutput(t *testing.T) {
	eachCalling(t, func(c calling) bool { return withOutputs(c) && c.option("force") }, func(t *testing.T, c calling) {
		for _, out := range c.outputs() {
			k := newKit(t)
			k.serve(t, c)
			b, err := os.ReadFile(k.path["COW"])
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, k.path[out], b)
			sealFile(t, k.path[out])
			k.wantRefused(t, k.expand(c.args, "--force"), k.path[out], "sealed layer")
			k.end()
		}
	})
}
