package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/bench/load"
	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/layer"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/remote"
	"github.com/dmsnap/dmsnap/store"
)

// goldenBytes is the size of the ext4 image that the rows of a registry use.
const goldenBytes = 2 << 30

// A registry is Debian's docker-registry, in a process of its own, with a proxy before it that counts.
type registry struct {
	*server
	address  string // of the registry
	proxy    *httptest.Server
	requests atomic.Int64
	bytes    atomic.Int64 // of bodies
}

// golden returns the reference of an ext4 image of programs in a registry. It is made once in a run; --golden names one that is there.
func (l *lab) golden(ctx context.Context) (ref string, err error) {
	if l.goldenRef != "" {
		return l.goldenRef, nil
	}
	path, tree := l.path("golden.img"), l.path("tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return "", err
	}
	// The first 1.7 GiB of what is installed here, in the order of names.
	script := `cd /usr && find bin lib share -xdev -type f -printf '%s\t%p\0' | sort -z -t"$(printf '\t')" -k2 |
		awk -v RS='\0' -v ORS='\0' -F'\t' '{sum += $1} sum > 1.7 * 1024 ^ 3 {exit} {print $2}' | tar --null --no-recursion -T - -cf - | tar -xf - -C ` + tree
	if err := errors.Join(command(ctx, "sh", "-c", script),
		command(ctx, "mke2fs", "-q", "-t", "ext4", "-d", tree, path, fmt.Sprint(goldenBytes>>10))); err != nil {
		return "", err
	}
	if err := os.RemoveAll(tree); err != nil {
		return "", err
	}
	r, err := l.registry(ctx)
	if err != nil {
		return "", err
	}
	ref = "oci://" + r.address + "/golden/disk:1"
	if err := command(ctx, l.binary, "push", path, ref); err != nil {
		return "", err
	}
	l.goldenRef = ref
	return ref, os.Remove(path)
}

// registry starts the registry, once in a run.
func (l *lab) registry(ctx context.Context) (*registry, error) {
	if l.reg != nil {
		return l.reg, nil
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &registry{address: free.Addr().String()}
	free.Close()
	config := fmt.Sprintf("version: 0.1\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %s}\nlog: {level: error}\n", l.path("registry"), r.address)
	if err := os.WriteFile(l.path("registry.yml"), []byte(config), 0o644); err != nil {
		return nil, err
	}
	ready := func(string) error { return dial(r.address) }
	r.server, err = l.startAt(ctx, l.path("none.sock"), ready, func(string) []string { return []string{"docker-registry", "serve", l.path("registry.yml")} })
	l.reg = r
	return r, err
}

func dial(address string) error {
	c, err := net.Dial("tcp", address)
	if err == nil {
		c.Close()
	}
	return err
}

// counted returns a reference to the same disk through a proxy that counts requests and bytes, and what ends the proxy.
func counted(ref string, r *registry) (string, func()) {
	host, rest, _ := strings.Cut(strings.TrimPrefix(ref, "oci://"), "/")
	forward := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: host})
	r.proxy = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		r.requests.Add(1)
		forward.ServeHTTP(&countingWriter{w, &r.bytes}, q)
	}))
	return "oci://" + strings.TrimPrefix(r.proxy.URL, "http://") + "/" + rest, r.proxy.Close
}

type countingWriter struct {
	http.ResponseWriter
	bytes *atomic.Int64
}

func (w *countingWriter) Write(p []byte) (int, error) {
	w.bytes.Add(int64(len(p)))
	return w.ResponseWriter.Write(p)
}

// fork serves n new forks of a disk, with a cache of its own that was emptied unless warm. ready is when the first one is.
func (l *lab) fork(ctx context.Context, ref string, n int, warm bool, ready func(socket string) error, more ...string) (*server, error) {
	cache := l.path("cache")
	if !warm {
		if err := os.RemoveAll(cache); err != nil {
			return nil, err
		}
	}
	return l.startAt(ctx, l.path("s.sock"), ready, func(socket string) []string {
		argv := []string{l.binary, "serve", ref}
		for i := range n {
			path := l.path(fmt.Sprintf("fork%d.cow", i))
			os.Remove(path)
			argv = append(argv, path)
		}
		return append(append(argv, "--create", "--cache-dir", cache, "--socket", socket), more...)
	})
}

// read returns a check that reads the first block of an export.
func read(ctx context.Context, export string) func(socket string) error {
	return func(socket string) error {
		_, err := load.NBD(ctx, socket, export, load.Job{Block: 4096, Depth: 1, Size: 4096, Count: 1})
		return err
	}
}

// remoteRows are about disks in a registry on this machine.
func remoteRows() []row {
	only := []string{ours}
	return []row{
		{name: "registry: start of the process to a writable fork whose first block is read", unit: "ms", less: true, columns: only,
			bars: []bar{{text: "≤ 60 ms", limit: 60}}, run: remoteStart},
		{name: "registry: mount read-write, ls, unmount (FUSE and loop, as root)", unit: "KiB fetched", less: true, columns: only,
			bars: []bar{{text: "≤ 64 KiB", limit: 64}, {text: "≤ 20 requests", figure: "requests", limit: 20}}, run: remoteList},
		{name: "registry: everything cold, in order, 1 MiB, depth 4", unit: "MiB/s of the disk's data", columns: only,
			bars: []bar{{text: "≥ 0.7 × curl | zstd -d", figure: "of_zstd", limit: 0.7, more: true}, {text: "≥ 0.7 × curl of the blob", figure: "of_curl", limit: 0.7, more: true}}, run: remoteCold},
		{name: "registry: warm cache, 4 KiB random read, depth 16", unit: "× a local raw base", columns: only,
			bars: []bar{{text: "≥ 0.95", limit: 0.95}}, run: remoteWarm(load.Job{Block: 4096, Depth: 16, Random: true})},
		{name: "registry: warm cache, in order, 1 MiB, depth 4", unit: "× a local raw base", columns: only,
			bars: []bar{{text: "≥ 0.95", limit: 0.95}}, run: remoteWarm(load.Job{Block: 1 << 20, Depth: 4})},
		{name: "registry: push of a delta of 1 % of 16 GiB in chunks of 64 KiB", unit: "s", less: true, columns: only,
			bars: []bar{{text: "≤ 1.2 × zstd -3 -T0 of it", figure: "of_zstd", limit: 1.2}}, run: remotePush},
		{name: "registry: 100 forks of one disk, 32 MiB read by each", unit: "fetches a unit", less: true, columns: only,
			bars: []bar{{text: "≤ 1", limit: 1}, {text: "one copy in the cache", figure: "copies", limit: 1.01}}, run: remoteForks},
	}
}

func remoteStart(ctx context.Context, l *lab, _ contender, _ int) (sample, error) {
	ref, err := l.golden(ctx)
	if err != nil {
		return sample{}, err
	}
	var took []float64
	for range 9 {
		s, err := l.fork(ctx, ref, 1, false, read(ctx, "fork0"))
		if err != nil {
			return sample{}, err
		}
		took = append(took, float64(s.ready.Microseconds())/1000)
		if err := s.stop(); err != nil {
			return sample{}, err
		}
	}
	return sample{Value: median(took)}, nil
}

// remoteList counts what the proxy passes on until the file system is unmounted.
func remoteList(ctx context.Context, l *lab, _ contender, _ int) (sample, error) {
	ref, err := l.golden(ctx)
	if err != nil {
		return sample{}, err
	}
	var r registry
	through, end := counted(ref, &r)
	defer end()
	files, tree := l.path("f"), l.path("m")
	if err := errors.Join(os.MkdirAll(files, 0o700), os.MkdirAll(tree, 0o700)); err != nil {
		return sample{}, err
	}
	s, err := l.fork(ctx, through, 1, false, read(ctx, "fork0"), "--fuse", files)
	if err != nil {
		return sample{}, err
	}
	err = errors.Join(command(ctx, "sh", "-c", fmt.Sprintf("mount -o loop %s/fork0 %s && ls %s; umount %[2]s", files, tree, tree)), s.stop())
	return sample{Value: float64(r.bytes.Load()) / 1024, More: map[string]float64{"requests": float64(r.requests.Load())}}, err
}

// blobOf returns the URL of the data of a disk's base, and the length of its content.
func blobOf(ctx context.Context, ref string) (address string, size int64, err error) {
	repo, err := remote.Open(ref, remote.Options{})
	if err != nil {
		return "", 0, err
	}
	text, err := repo.Description(ctx)
	if err != nil {
		return "", 0, err
	}
	d, err := layer.ParseDescription(text)
	if err != nil {
		return "", 0, err
	}
	host, path, _ := strings.Cut(strings.TrimPrefix(ref, "oci://"), "/")
	path, _, _ = strings.Cut(path, ":")
	return fmt.Sprintf("http://%s/v2/%s/blobs/%s", host, path, d.Layers[0].Data.Digest), d.Size, nil
}

// timed runs a shell command and returns how many seconds it took.
func timed(ctx context.Context, script string) (float64, error) {
	began := time.Now()
	err := command(ctx, "sh", "-c", script)
	return time.Since(began).Seconds(), err
}

// remoteCold reads the whole disk. What it is compared with is what of the blob, and of its content, curl and zstd have in a second.
func remoteCold(ctx context.Context, l *lab, _ contender, _ int) (v sample, err error) {
	ref, err := l.golden(ctx)
	if err != nil {
		return v, err
	}
	address, size, err := blobOf(ctx, ref)
	if err != nil {
		return v, err
	}
	plain, err := timed(ctx, "curl -sf -o /dev/null "+address)
	if err != nil {
		return v, err
	}
	out, err := exec.CommandContext(ctx, "sh", "-c", "curl -sf "+address+" | wc -c").Output()
	if err != nil {
		return v, err
	}
	var packed float64
	fmt.Sscan(string(out), &packed)
	began := time.Now()
	out, err = exec.CommandContext(ctx, "sh", "-c", "curl -sf "+address+" | zstd -dqc | wc -c").Output()
	unpacked := time.Since(began).Seconds()
	if err != nil {
		return v, err
	}
	var content float64
	fmt.Sscan(string(out), &content)
	s, err := l.fork(ctx, ref, 1, false, read(ctx, "fork0"))
	if err != nil {
		return v, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	got, err := load.NBD(ctx, s.socket, "fork0", load.Job{Block: 1 << 20, Depth: 4, Size: size >> 20 << 20, Count: size >> 20})
	if err != nil {
		return v, err
	}
	cpu, err := cpuTime(s.cmd.Process.Pid)
	took := got.Elapsed.Seconds()
	return sample{Value: content / took / (1 << 20), More: map[string]float64{"of_zstd": unpacked / took,
		"of_curl": (content / took) / (packed / plain), "seconds": took, "curl_seconds": plain, "zstd_seconds": unpacked, "cpu_seconds": cpu.Seconds()}}, err
}

// remoteWarm reads a fork of a disk that is in the cache as a whole, and one of a local file with the same content.
func remoteWarm(j load.Job) func(ctx context.Context, l *lab, c contender, round int) (sample, error) {
	return func(ctx context.Context, l *lab, _ contender, round int) (sample, error) {
		ref, err := l.golden(ctx)
		if err != nil {
			return sample{}, err
		}
		j := j
		j.Size, j.Seed, j.Time = 1<<30, uint64(round), time.Duration(l.seconds*float64(time.Second))
		local := l.path("local.img")
		if _, err := os.Stat(local); err != nil {
			if err := command(ctx, l.binary, "export", ref, local, "--cache-dir", l.path("cache")); err != nil {
				return sample{}, err
			}
		}
		if err := warm(local); err != nil {
			return sample{}, err
		}
		rates, costs := map[string]float64{}, map[string]float64{}
		for i := range 4 { // by turns: other, own, own, other
			name := local
			if i == 1 || i == 2 {
				name = ref
			}
			s, err := l.fork(ctx, name, 1, true, read(ctx, "fork0"))
			if err != nil {
				return sample{}, err
			}
			// Everything is read once, and verified. Then the files of both are in the same state; see target.readAgain.
			_, err = load.NBD(ctx, s.socket, "fork0", load.Job{Block: 1 << 20, Depth: 4, Size: j.Size, Count: j.Size >> 20})
			if err == nil {
				err = readAgain(append(filesIn(l.path("cache")), local))
			}
			var cost sample
			if err == nil {
				t := target{server: s}
				err = t.costs(&cost, func() (int64, error) {
					got, err := load.NBD(ctx, s.socket, "fork0", j)
					rates[name] += got.Rate()
					return got.Requests, err
				})
			}
			if err := errors.Join(err, s.stop()); err != nil {
				return sample{}, err
			}
			costs[name] += cost.More[cpuFigure] / 2
		}
		return sample{Value: rates[ref] / rates[local], More: map[string]float64{"rate": rates[ref] / 2, "local_rate": rates[local] / 2,
			cpuFigure: costs[ref], "local_" + cpuFigure: costs[local]}}, nil
	}
}

// filesIn are the files in a folder and those in it.
func filesIn(folder string) (files []string) {
	filepath.WalkDir(folder, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			files = append(files, path)
		}
		return nil
	})
	return files
}

// remotePush pushes a store with 2,621 chunks of 64 KiB of programs over a disk of 16 GiB that is in the registry: 4 KiB in each of
// its 262,144 units, so that its index is as large as that of a full disk.
func remotePush(ctx context.Context, l *lab, _ contender, round int) (v sample, err error) {
	r, err := l.registry(ctx)
	if err != nil {
		return v, err
	}
	const size, chunk, chunks = 16 << 30, 64 << 10, 2621
	ref, delta := "oci://"+r.address+"/big/disk", l.path("delta")
	if _, err := os.Stat(delta); err != nil {
		base := l.path("big.img")
		f, err := os.Create(base)
		if err != nil {
			return v, err
		}
		defer f.Close()
		block := make([]byte, 4096)
		for off := int64(0); off < size; off += chunk {
			fill := rand.NewChaCha8([32]byte{byte(off >> 16), byte(off >> 24), byte(off >> 32)})
			fill.Read(block)
			if _, err := f.WriteAt(block, off); err != nil {
				return v, err
			}
		}
		script := fmt.Sprintf("find /usr/bin /usr/lib -xdev -type f -size +64k | sort | xargs cat 2>/dev/null | head -c %d > %s", chunk*chunks, delta)
		if err := errors.Join(f.Close(), command(ctx, l.binary, "push", base, ref+":1"), command(ctx, "sh", "-c", script), os.Remove(base)); err != nil {
			return v, err
		}
	}
	cow := l.path("fork0.cow")
	os.Remove(cow)
	if err := errors.Join(command(ctx, l.binary, "create", ref+":1", cow, "--chunk-size", "64k", "--cache-dir", l.path("cache")),
		fillDelta(cow, delta, size/chunk)); err != nil {
		return v, err
	}
	packed, err := timed(ctx, "zstd -3 -T0 -qc "+delta+" > "+l.path("delta.zst"))
	if err != nil {
		return v, err
	}
	took, err := timed(ctx, strings.Join([]string{l.binary, "push", ref + ":1", cow, fmt.Sprintf("%s:%d", ref, 2+round), "--cache-dir", l.path("cache")}, " "))
	return sample{Value: took, More: map[string]float64{"of_zstd": took / packed, "zstd_seconds": packed}}, err
}

// fillDelta stores the content of a file in chunks that are spread over a disk.
func fillDelta(cow, content string, chunks uint64) error {
	dev, err := block.Open(cow, block.Options{})
	if err != nil {
		return err
	}
	defer dev.Close()
	f, err := os.Open(content)
	if err != nil {
		return err
	}
	defer f.Close()
	s, err := store.Open(dev)
	if err != nil {
		return err
	}
	fill, b := store.NewFiller(s, 1<<20), make([]byte, s.Layout().ChunkBytes())
	for i := uint64(0); ; i++ {
		if _, err := io.ReadFull(f, b); err != nil { // the end
			return errors.Join(fill.Flush(), s.Sync())
		}
		err := fill.Add(ondisk.OriginChunk(i*97%chunks), 1, func(p []byte, _ int64) error {
			copy(p, b)
			return nil
		})
		if err != nil {
			return err
		}
	}
}

// remoteForks serves 100 forks, reads the same from all at once, and counts requests and what the cache has.
func remoteForks(ctx context.Context, l *lab, _ contender, _ int) (v sample, err error) {
	ref, err := l.golden(ctx)
	if err != nil {
		return v, err
	}
	var r registry
	through, end := counted(ref, &r)
	defer end()
	const n, size = 100, 32 << 20
	s, err := l.fork(ctx, through, n, false, read(ctx, "fork0"))
	if err != nil {
		return v, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	failed := make(chan error, n)
	for i := range n {
		go func() {
			_, err := load.NBD(ctx, s.socket, fmt.Sprintf("fork%d", i), load.Job{Block: 64 << 10, Depth: 2, Size: size, Count: size >> 16, Random: true, Seed: uint64(i)})
			failed <- err
		}()
	}
	for range n {
		err = errors.Join(err, <-failed)
	}
	var kept int64
	files, _ := filepath.Glob(l.path("cache/v1/data-*/*"))
	for _, f := range files {
		if info, statErr := os.Stat(f); statErr == nil && filepath.Base(f) != "name" {
			out, _ := exec.Command("du", "--block-size=1", f).Output()
			var b int64
			fmt.Sscan(string(out), &b)
			kept += min(b, info.Size())
		}
	}
	return sample{Value: float64(r.requests.Load()) / (size >> 16), More: map[string]float64{"requests": float64(r.requests.Load()), "copies": float64(kept) / (size + 1<<20)}}, err
}
