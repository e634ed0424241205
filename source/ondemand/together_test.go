package ondemand_test

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/testremote"
	"github.com/dmsnap/dmsnap/source/ondemand"
	"github.com/dmsnap/dmsnap/source/remote"
)

// TestReadsTogether: short reads of what was read before are executed together, from memory alone; of what was not, none is.
func TestReadsTogether(t *testing.T) {
	g := push(t, 5)
	d := open(t, g.ref, ondemand.Options{})
	r := rand.New(rand.NewPCG(1, 2))
	together := func() (done, asked int) {
		requests, _ := d.Fetched()
		for range 50 {
			reads := make([]block.Read, 16)
			for i := range reads {
				n := 1 + r.IntN(4096)
				reads[i] = block.Read{P: make([]byte, n), Off: int64(r.IntN(len(g.content) - n))}
			}
			reads[3].Off = int64(len(g.content)) - 1 // outside, or of one byte
			k := block.ReadCached(d, reads)
			for _, x := range reads {
				if !x.Done {
					continue
				}
				if k--; !bytes.Equal(x.P, g.content[x.Off:][:len(x.P)]) {
					t.Fatalf("%d bytes at byte %d are others", len(x.P), x.Off)
				}
				done++
			}
			if k != 0 {
				t.Fatalf("%d more were done than are", k)
			}
			asked += len(reads)
		}
		if now, _ := d.Fetched(); now != requests {
			t.Errorf("%d requests", now-requests)
		}
		return done, asked
	}
	if done, _ := together(); done > 0 {
		t.Errorf("%d reads of what was never read", done)
	}
	if err := readSome(t, d, g.content, 500, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(make([]byte, len(g.content)), 0); err != nil {
		t.Fatal(err)
	}
	done, asked := together()
	t.Logf("%d of %d reads were executed together", done, asked)
	if done < asked/4 {
		switch n := block.ReadCached(fileOf(t, g.content), []block.Read{{P: make([]byte, 512)}, {P: make([]byte, 512), Off: 4096}}); n {
		case 0:
			t.Skip("SKIPPED: no reads can be executed together here")
		default:
			t.Errorf("%d of %d reads were executed together", done, asked)
		}
	}
}

// fileOf is a file with the content, which is in memory.
func fileOf(t *testing.T, content []byte) block.Device {
	t.Helper()
	f, err := block.Create(t.TempDir()+"/disk", int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	write(t, f, content, 0)
	return f
}

// TestErrorsNameTheDiskOnce: a read that fails, of the index or of data, names the disk, and once.
func TestErrorsNameTheDiskOnce(t *testing.T) {
	g := push(t, 6)
	dir := t.TempDir()
	for _, hung := range []bool{false, true} { // before the disk is opened, which is by the cache then
		if hung {
			g.faults.Set(testremote.Hang, 1)
		}
		d := open(t, g.ref, ondemand.Options{Cache: openCache(t, dir), Remote: remote.Options{Timeout: 300 * time.Millisecond}})
		g.faults.Set(testremote.Hang, 1)
		failed := 0
		for off := int64(0); off < int64(len(g.content)) && failed < 3; off += 1 << 20 {
			if _, err := d.ReadAt(make([]byte, 512), off); err != nil {
				if failed++; strings.Count(err.Error(), g.ref) != 1 {
					t.Error(err)
				}
			}
		}
		if failed == 0 {
			t.Error("no read failed")
		}
		g.faults.Set("", 0)
	}
}
