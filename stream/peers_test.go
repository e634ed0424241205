package stream_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A peerLab is a folder with the same change of a disk in several forms: disk.img with disk.cow, and new.img; overlay.qcow2 over
// disk.img; copy.img, which is disk.img again. DMSNAP_BENCH_MIB is the size of the disk, DMSNAP_BENCH_BINARY a dmsnap that was built before.
type peerLab struct {
	b       *testing.B
	dir     string
	ranges  []block.Range // that changed
	changed int64
}

const peerRun = 64 << 10

func newPeerLab(b *testing.B) *peerLab {
	b.Helper()
	l := &peerLab{b: b, dir: b.TempDir()}
	mib := 256
	if v, err := strconv.Atoi(os.Getenv("DMSNAP_BENCH_MIB")); err == nil {
		mib = v
	}
	size := int64(mib) << 20
	if bin := os.Getenv("DMSNAP_BENCH_BINARY"); bin != "" {
		l.must("cp", bin, l.path("dmsnap"))
	} else {
		l.must("go", "build", "-o", l.path("dmsnap"), "github.com/dmsnap/dmsnap/cmd/dmsnap")
	}
	l.makeDisk(size)
	l.must("cp", "--sparse=always", l.path("disk.img"), l.path("copy.img"))
	l.must("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", l.path("disk.img"), l.path("overlay.qcow2"))
	if _, err := cowfile.Create(l.path("disk.img"), l.path("disk.cow"), cowfile.Options{}); err != nil {
		b.Fatal(err)
	}
	origin, cow := l.open("disk.img", true), l.open("disk.cow", false)
	snap, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		b.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 1))
	for off := int64(0); off+10*peerRun <= size; off += 10 * peerRun { // a tenth
		at := off + r.Int64N(9)*peerRun
		l.ranges = append(l.ranges, block.Range{Off: at, Length: peerRun})
		l.changed += peerRun
		if _, err := snap.WriteAt(blocktest.Pattern(peerRun, uint64(at)), at); err != nil {
			b.Fatal(err)
		}
	}
	if err := snap.Close(); err != nil {
		b.Fatal(err)
	}
	if rep, err := check.Run(b.Context(), cow, check.Options{Origin: origin}); err != nil || !rep.Clean() {
		b.Fatal(rep, err)
	}
	cow.Close()
	origin.Close()
	l.must(l.path("dmsnap"), "export", l.path("disk.img"), l.path("disk.cow"), l.path("new.img"))
	l.must("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-B", l.path("disk.img"), "-F", "raw", l.path("new.img"), l.path("overlay.qcow2"))
	return l
}

// makeDisk makes a disk of bytes that do not compress.
func (l *peerLab) makeDisk(size int64) {
	f, err := os.Create(l.path("disk.img"))
	if err != nil {
		l.b.Fatal(err)
	}
	defer f.Close()
	source := rand.NewChaCha8([32]byte{1})
	if _, err := io.CopyN(f, source, size); err != nil {
		l.b.Fatal(err)
	}
}

func (l *peerLab) path(name string) string { return filepath.Join(l.dir, name) }

func (l *peerLab) open(name string, readOnly bool) *block.File {
	l.b.Helper()
	dev, err := block.Open(l.path(name), block.Options{ReadOnly: readOnly})
	if err != nil {
		l.b.Fatal(err)
	}
	return dev
}

// must runs a program, and returns its peak memory in bytes.
func (l *peerLab) must(name string, args ...string) int64 {
	l.b.Helper()
	c := exec.Command(name, args...)
	var said bytes.Buffer
	c.Stderr = &said
	if err := c.Run(); err != nil {
		l.b.Fatalf("%s %q: %v\n%s", name, args, err, &said)
	}
	return int64(c.ProcessState.SysUsage().(*syscall.Rusage).Maxrss) << 10
}

// reset makes copy.img what disk.img is.
func (l *peerLab) reset() {
	disk, target := l.open("disk.img", true), l.open("copy.img", false)
	defer disk.Close()
	defer target.Close()
	b := make([]byte, peerRun)
	for _, r := range l.ranges {
		if _, err := disk.ReadAt(b, r.Off); err != nil {
			l.b.Fatal(err)
		}
		if _, err := target.WriteAt(b, r.Off); err != nil {
			l.b.Fatal(err)
		}
	}
	if err := target.Flush(); err != nil {
		l.b.Fatal(err)
	}
}

// cold drops files from the page cache.
func (l *peerLab) cold(names ...string) {
	for _, name := range names {
		dev := l.open(name, false)
		if err := errors.Join(dev.Flush(), dev.DropCache(0, dev.Size()), dev.Close()); err != nil {
			l.b.Fatal(err)
		}
	}
}

// read reads what changed, of each of the files, so many runs at once.
func (l *peerLab) read(atOnce int, names ...string) {
	var readers sync.WaitGroup
	for _, name := range names {
		dev := l.open(name, true)
		defer dev.Close()
		for first := range atOnce {
			readers.Go(func() {
				p := make([]byte, peerRun)
				for i := first; i < len(l.ranges); i += atOnce {
					if _, err := dev.ReadAt(p, l.ranges[i].Off); err != nil {
						l.b.Error(err)
						return
					}
				}
			})
		}
		if atOnce == 1 {
			readers.Wait()
		}
	}
	readers.Wait()
}

// replace does what no receiver can do without: it reads the old bytes and the stream, and writes the new ones durably.
func (l *peerLab) replace(delta string) {
	from, to := l.open(delta, true), l.open("copy.img", false)
	defer from.Close()
	defer to.Close()
	p := make([]byte, peerRun)
	for i, r := range l.ranges {
		_, oldErr := to.ReadAt(p, r.Off)
		_, newErr := from.ReadAt(p, int64(i)*peerRun)
		_, err := to.WriteAt(p, r.Off)
		if err := errors.Join(oldErr, newErr, err); err != nil {
			l.b.Fatal(err)
		}
	}
	if err := to.Flush(); err != nil {
		l.b.Fatal(err)
	}
}

// BenchmarkPeers moves a tenth of a disk, in runs of 64 KiB, to a copy of it, by dmsnap and by others: from the page cache, and
// from the disk. What is written is durable at the end. MB/s is of what changed.
func BenchmarkPeers(b *testing.B) {
	for _, tool := range []string{"qemu-img", "rsync", "zstd", "go"} {
		if _, err := exec.LookPath(tool); err != nil {
			b.Skip("SKIPPED: ", err)
		}
	}
	l := newPeerLab(b)
	bin, disk, cow, copied, delta := l.path("dmsnap"), l.path("disk.img"), l.path("disk.cow"), l.path("copy.img"), l.path("delta")
	run := func(name string, prepare func(), f func() int64, afterwards ...func()) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(l.changed)
			peak := int64(0)
			for b.Loop() {
				b.StopTimer()
				prepare()
				b.StartTimer()
				peak = max(peak, f())
			}
			for _, f := range afterwards {
				f()
			}
			b.ReportMetric(float64(peak)/(1<<20), "MiB-peak")
		})
	}
	floor := func(f func()) func() int64 { return func() int64 { f(); return 0 } }
	program := func(name string, args ...string) func() int64 { return func() int64 { return l.must(name, args...) } }
	pipe := func(args string) func() int64 {
		return program("sh", "-c", bin+" send "+disk+" "+cow+" "+args+" | cat >/dev/null")
	}

	for _, from := range []struct {
		name    string
		prepare func()
	}{
		{"send from the cache/", func() { l.read(1, "new.img", "disk.img") }},
		{"send from the disk/", func() { l.cold("new.img", "disk.img", "disk.cow") }},
	} {
		run(from.name+"floor: read the old and the new", from.prepare, floor(func() { l.read(1, "new.img", "disk.img") }))
		run(from.name+"floor: read 16 runs of each at once", from.prepare, floor(func() { l.read(16, "new.img", "disk.img") }))
		run(from.name+"plain to a pipe", from.prepare, pipe("--no-compress"))
		run(from.name+"zstd to a pipe", from.prepare, pipe(""))
		run(from.name+"plain, durable", from.prepare, program(bin, "send", disk, cow, "--no-compress", "--force", "-o", delta))
		run(from.name+"qemu-img convert of an overlay", from.prepare,
			program("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-B", disk, "-F", "raw", l.path("overlay.qcow2"), l.path("out.qcow2")))
		run(from.name+"zstd of the whole", from.prepare, program("zstd", "-q", "-1", "-T0", "-f", l.path("new.img"), "-o", "/dev/null"))
	}
	l.must(bin, "send", disk, cow, "--no-compress", "--force", "-o", delta)
	same := func() { l.must("cmp", l.path("new.img"), copied) }
	for _, from := range []struct {
		name    string
		prepare func()
	}{
		{"receive in the cache/", l.reset},
		{"receive from the disk/", func() { l.reset(); l.cold("copy.img", "new.img", "delta") }},
	} {
		run(from.name+"floor: read the old, write the new, flush", from.prepare, floor(func() { l.replace("delta") }))
		run(from.name+"plain", from.prepare, program(bin, "receive", delta, copied), same)
		run(from.name+"rsync --inplace", from.prepare, program("rsync", "--inplace", "--no-whole-file", "--fsync", l.path("new.img"), copied), same)
		l.must("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", copied, l.path("overlay.qcow2"))
		run(from.name+"qemu-img commit of an overlay", from.prepare, program("qemu-img", "commit", "-q", "-d", "-f", "qcow2", l.path("overlay.qcow2")), same)
		l.must("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", disk, l.path("overlay.qcow2"))
	}
	info, err := os.Stat(delta)
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("the stream has %d bytes for %d that changed, %.2f %% more", info.Size(), l.changed, 100*float64(info.Size()-l.changed)/float64(l.changed))
}
