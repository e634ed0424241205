package nbd_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/nbd"
)

// tool returns a function that runs a program and returns what it printed; without the program the test is
// reported as SKIPPED.
func tool(t *testing.T, name, debianPackage string) func(args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("SKIPPED: no %s here (Debian's package %s)", name, debianPackage)
	}
	return func(args ...string) string {
		t.Helper()
		out, err := exec.Command(path, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
}

// striped is 8 MiB: noise in the first and third quarter, holes else.
func striped() *block.Memory {
	mem := block.NewMemory(8 << 20)
	mem.WriteAt(blocktest.Pattern(2<<20, 1), 0)
	mem.WriteAt(blocktest.Pattern(2<<20, 2), 4<<20)
	return mem
}

func TestInteropNbdinfo(t *testing.T) {
	nbdinfo := tool(t, "nbdinfo", "libnbd-bin")
	odd := func(off, n int64) ([]block.Extent, error) {
		return []block.Extent{{Length: min(n, 1<<20-off%(1<<20)), Flags: block.ExtentFlags(off >> 20 % 2)}}, nil
	}
	s, uri := serve(t, nbd.Options{},
		nbd.Export{Name: "a disk/ä?", Description: "for people", Device: striped(), CanTrim: true, MultiConn: true, PreferredBlock: 65536,
			Contexts: map[string]nbd.ContextFunc{"x:odd": odd}},
		nbd.Export{Name: "ro", Device: block.NewMemory(512), ReadOnly: true})
	s.SetDefault("ro")
	type export struct {
		Name        string   `json:"export-name"`
		Description string   `json:"description"`
		Size        int64    `json:"export-size"`
		Contexts    []string `json:"contexts"`
		ReadOnly    bool     `json:"is_read_only"`
		Cache       bool     `json:"can_cache"`
		DF          bool     `json:"can_df"`
		FastZero    bool     `json:"can_fast_zero"`
		Flush       bool     `json:"can_flush"`
		FUA         bool     `json:"can_fua"`
		Multi       bool     `json:"can_multi_conn"`
		Trim        bool     `json:"can_trim"`
		Zero        bool     `json:"can_zero"`
		Min         int64    `json:"block_size_minimum"`
		Preferred   int64    `json:"block_size_preferred"`
		Max         int64    `json:"block_size_maximum"`
	}
	var got struct {
		Protocol   string   `json:"protocol"`
		Structured bool     `json:"structured"`
		Exports    []export `json:"exports"`
	}
	out := nbdinfo("--list", "--json", uri(""))
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got.Protocol != "newstyle-fixed" || !got.Structured || len(got.Exports) != 2 {
		t.Fatalf("%s", out)
	}
	disk := got.Exports[0]
	if c := strings.Join(disk.Contexts, " "); c != "base:allocation x:odd" {
		t.Errorf("contexts %q", c)
	}
	disk.Contexts = nil
	if want := (export{Name: "a disk/ä?", Description: "for people", Size: 8 << 20, Cache: true, DF: true, FastZero: true, Flush: true, FUA: true,
		Multi: true, Trim: true, Zero: true, Min: 1, Preferred: 65536, Max: 32 << 20}); !equal(disk, want) {
		t.Errorf("got  %+v\nwant %+v", disk, want)
	}
	if ro := got.Exports[1]; !ro.ReadOnly || ro.Zero || ro.Trim || ro.Size != 512 {
		t.Errorf("%+v", ro)
	}
	if size := strings.TrimSpace(nbdinfo("--size", uri(""))); size != "512" {
		t.Errorf("the default export has %s bytes", size)
	}
	type extent struct{ Offset, Length, Type int64 }
	var list []extent
	if err := json.Unmarshal([]byte(nbdinfo("--map", "--json", uri("a disk/ä?"))), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 4 || list[1] != (extent{2 << 20, 2 << 20, 3}) || list[2] != (extent{4 << 20, 2 << 20, 0}) {
		t.Errorf("map %+v", list)
	}
	list = nil
	if err := json.Unmarshal([]byte(nbdinfo("--map=x:odd", "--json", uri("a disk/ä?"))), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 8 || list[3] != (extent{3 << 20, 1 << 20, 1}) {
		t.Errorf("map of x:odd %+v", list)
	}
}

// equal compares two values as JSON has them.
func equal(a, b any) bool {
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b)
	return bytes.Equal(x, y)
}

func TestInteropNbdcopy(t *testing.T) {
	nbdcopy := tool(t, "nbdcopy", "libnbd-bin")
	from, to := striped(), block.NewMemory(8<<20)
	_, uri := serve(t, nbd.Options{}, nbd.Export{Name: "from", Device: from, ReadOnly: true, MultiConn: true}, nbd.Export{Name: "to", Device: to, CanTrim: true, MultiConn: true})
	file := filepath.Join(t.TempDir(), "image")
	nbdcopy(uri("from"), file)
	b, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(b, from.Bytes()) {
		t.Fatalf("to a file: %v", err)
	}
	nbdcopy("--flush", file, uri("to"))
	if !bytes.Equal(to.Bytes(), from.Bytes()) {
		t.Fatal("from a file")
	}
	to.ZeroAt(0, 8<<20, 0)
	nbdcopy("--flush", "--connections=4", "--requests=64", uri("from"), uri("to"))
	if !bytes.Equal(to.Bytes(), from.Bytes()) {
		t.Fatal("from server to server")
	}
	if to.Allocated() != from.Allocated() {
		t.Errorf("the copy takes %d bytes, the original %d: holes were filled", to.Allocated(), from.Allocated())
	}
}

func TestInteropQemu(t *testing.T) {
	qemuIO, qemuImg := tool(t, "qemu-io", "qemu-utils"), tool(t, "qemu-img", "qemu-utils")
	mem := striped()
	var log blocktest.Log
	s, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: log.Record("", mem), CanTrim: true, MultiConn: true})
	want := mem.Bytes()
	fill := func(off, n int, x byte) { copy(want[off:], bytes.Repeat([]byte{x}, n)) }
	qemuIO("-f", "raw", "-c", "write -P 7 5000 70000", "-c", "write -f -P 8 1M 3M", "-c", "write -z 4M 64k", "-c", "write -z -u 5M 64k",
		"-c", "discard 6M 64k", "-c", "flush", uri("x"))
	fill(5000, 70000, 7)
	fill(1<<20, 3<<20, 8)
	fill(4<<20, 64<<10, 0)
	fill(5<<20, 64<<10, 0)
	if !bytes.Equal(mem.Bytes(), want) {
		t.Error("what qemu-io wrote is not there")
	}
	if ops := log.String(); !strings.Contains(ops, "WD 2048+") || !strings.Contains(ops, "keep") || !strings.Contains(ops, "D 12288+128") || !strings.Contains(ops, "F\n") {
		t.Errorf("FUA, zeroes without a hole, discard or flush did not reach the device:\n%s", ops)
	}
	file := filepath.Join(t.TempDir(), "image")
	qemuImg("convert", "-f", "raw", "-O", "raw", uri("x"), file)
	b, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(b, want) {
		t.Errorf("qemu-img convert: %v", err)
	}
	qemuImg("compare", "-f", "raw", "-F", "raw", file, uri("x"))
	var extents []struct {
		Start, Length int64
		Zero, Data    bool
	}
	if err := json.Unmarshal([]byte(qemuImg("map", "-f", "raw", "--output=json", uri("x"))), &extents); err != nil {
		t.Fatal(err)
	}
	at := int64(0)
	for _, x := range extents {
		if x.Start != at || x.Zero && len(bytes.Trim(want[at:at+x.Length], "\x00")) > 0 {
			t.Errorf("map: %+v at %d", x, at)
		}
		at += x.Length
	}
	if at != 8<<20 || len(extents) < 4 {
		t.Errorf("map: %+v", extents)
	}
	if err := s.Add(nbd.Export{Name: "back", Device: block.NewMemory(8 << 20), CanTrim: true, MultiConn: true}); err != nil {
		t.Fatal(err)
	}
	qemuImg("convert", "-n", "-f", "raw", "-O", "raw", file, uri("back"))
	qemuImg("compare", "-f", "raw", "-F", "raw", uri("back"), uri("x"))
}

func TestInteropFio(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	fio := tool(t, "fio", "fio")
	if !strings.Contains(fio("--enghelp"), "\tnbd\n") {
		t.Skip("SKIPPED: this fio has no nbd engine")
	}
	s, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: block.NewMemory(32 << 20), CanTrim: true, MultiConn: true})
	fio("--name=x", "--directory="+t.TempDir(), "--ioengine=nbd", "--uri="+uri("x"), "--rw=randwrite", "--bsrange=512-256k", "--bs_unaligned", "--blockalign=512",
		"--iodepth=32", "--size=32m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fsync=64", "--randseed=7")
	if c, _ := s.Counters("x"); c.Errors != 0 || c.Writes == 0 || c.Reads == 0 {
		t.Errorf("%+v", c)
	}
}

// everyCommand is a script for libnbd: each command, with its flags, and the errors.
const everyCommand = `
import errno, nbd, sys
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.set_strict_mode(0)  # we send what libnbd would refuse
h.connect_uri(sys.argv[1])
size = h.get_size()
assert size == 8 << 20, size
data = bytes(range(256)) * 16
h.pwrite(data, 4096)
h.pwrite(data, 12288, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 4096) == data and h.pread(4096, 12288) == data
assert h.pread_structured(4096, 4096, lambda *a: 0, nbd.CMD_FLAG_DF) == data
kinds = []
h.pread_structured(8 << 20, 0, lambda buf, off, status, err: kinds.append(status) and 0)
assert nbd.READ_HOLE in kinds and nbd.READ_DATA in kinds, kinds
h.zero(4096, 4096)
h.zero(100, 12288, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(4096, 65536, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(4096, 4096) == bytes(4096) and h.pread(4096, 12288) == bytes(100) + data[100:]
h.trim(65536, 0, nbd.CMD_FLAG_FUA)
h.cache(4096, 0)
h.flush()
seen = []
def extent(context, off, entries, err):
    seen.append((context, off, list(entries)))
h.block_status(size, 0, extent)
assert seen and seen[0][0] == "base:allocation" and sum(seen[0][2][::2]) == size, seen
seen.clear()
h.block_status(size, 0, extent, nbd.CMD_FLAG_REQ_ONE)
assert len(seen) == 1 and len(seen[0][2]) == 2, seen
def fails(want, call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errnum == want, (e.errnum, want)
        return
    assert False, "no error"
fails(errno.EINVAL, h.pread, 512, size)
fails(errno.ENOSPC, h.pwrite, data, size - 1)
fails(errno.EINVAL, h.trim, 512, size)
fails(errno.ENOSPC, h.zero, 512, size)
fails(errno.EINVAL, h.cache, 512, size)
fails(errno.EINVAL, h.block_status, 512, size, extent)
fails(errno.EINVAL, h.flush, nbd.CMD_FLAG_DF)
fails(errno.EINVAL, h.pread, 0, 0)
h.flush()
h.shutdown()
`

func TestInteropLibnbd(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	path := ""
	for _, p := range []string{"python3", "/usr/bin/python3"} { // Debian's has Debian's modules
		if exec.Command(p, "-c", "import nbd; nbd.NBD").Run() == nil {
			path = p
		}
	}
	if path == "" {
		t.Skip("SKIPPED: no libnbd for Python here (Debian's package python3-libnbd)")
	}
	python := tool(t, path, "python3")
	mem := striped()
	s, uri := serve(t, nbd.Options{}, nbd.Export{Name: "x", Device: mem, CanTrim: true})
	python("-c", everyCommand, uri("x"))
	if c, _ := s.Counters("x"); c.Errors != 8 {
		t.Errorf("%+v, want 8 errors", c)
	}
}
