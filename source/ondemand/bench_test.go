package ondemand_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testremote"
	"github.com/dmsnap/dmsnap/publish"
	"github.com/dmsnap/dmsnap/source/ondemand"
	"github.com/dmsnap/dmsnap/source/remote"
)

// benchDisk is a disk that compresses to a half, in a registry and in a file.
func benchDisk(b *testing.B) (ref string, local *block.File) {
	b.Helper()
	const size = 256 << 20
	path := filepath.Join(b.TempDir(), "disk.img")
	content := make([]byte, 0, size)
	for i := 0; len(content) < size; i++ {
		content = append(content, blocktest.Pattern(2048, uint64(i))...)
		content = append(content, bytes.Repeat([]byte{byte(i)}, 2048)...)
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		b.Fatal(err)
	}
	local, err := block.Open(path, block.Options{ReadOnly: true})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { local.Close() })
	ref = "oci://" + testremote.Start(b, testremote.NewRegistry()) + "/bench/disk"
	repo, err := remote.Open(ref, remote.Options{})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := publish.Push(context.Background(), repo, local, nil, publish.Options{Temp: b.TempDir()}); err != nil {
		b.Fatal(err)
	}
	return ref, local
}

// reportCPU reports the CPU time of an operation, which depends less on what else the machine does.
func reportCPU(b *testing.B) func() {
	used := func() int64 {
		var u syscall.Rusage
		syscall.Getrusage(syscall.RUSAGE_SELF, &u)
		return u.Utime.Nano() + u.Stime.Nano()
	}
	before := used()
	return func() { b.ReportMetric(float64(used()-before)/float64(b.N), "cpu-ns/op") }
}

// BenchmarkRead reads 4 KiB at random and 1 MiB in order, from a local file and from a warm cache, and everything in order from an
// empty one.
func BenchmarkRead(b *testing.B) {
	ref, local := benchDisk(b)
	warm := open(b, ref, ondemand.Options{})
	whole := make([]byte, 1<<20)
	inOrder := func(b *testing.B, dev block.Device) {
		defer reportCPU(b)()
		b.SetBytes(dev.Size())
		for range b.N {
			for off := int64(0); off < dev.Size(); off += int64(len(whole)) {
				if _, err := dev.ReadAt(whole, off); err != nil {
					b.Fatal(err)
				}
			}
		}
	}
	random := func(b *testing.B, dev block.Device) {
		defer reportCPU(b)()
		r, p := rand.New(rand.NewPCG(1, 2)), make([]byte, 4096)
		b.SetBytes(4096)
		for range b.N {
			if _, err := dev.ReadAt(p, r.Int64N(dev.Size()/4096)*4096); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("cold/order", func(b *testing.B) {
		b.SetBytes(local.Size())
		for range b.N {
			b.StopTimer()
			cold := open(b, ref, ondemand.Options{})
			b.StartTimer()
			for off := int64(0); off < cold.Size(); off += int64(len(whole)) {
				if _, err := cold.ReadAt(whole, off); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	for off := int64(0); off < warm.Size(); off += int64(len(whole)) { // everything is verified then
		if _, err := warm.ReadAt(whole, off); err != nil {
			b.Fatal(err)
		}
	}
	for name, dev := range map[string]block.Device{"local": local, "warm": warm} {
		b.Run(name+"/order", func(b *testing.B) { inOrder(b, dev) })
		b.Run(name+"/random", func(b *testing.B) { random(b, dev) })
	}
}
