package image

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// head is the beginning of a file with bytes at places.
func head(at ...any) []byte {
	b := make([]byte, headBytes)
	for i := 0; i < len(at); i += 2 {
		copy(b[at[i].(int):], at[i+1].(string))
	}
	return b
}

const pvLabel = "LABELONE\x01\x00\x00\x00\x00\x00\x00\x00crc.\x20\x00\x00\x00LVM2 001abcdef0123456789ABCDEF0123456789ab\x00\x00\x00\x40"

func TestKinds(t *testing.T) {
	for name, c := range map[string]struct {
		head []byte
		want string
	}{
		"a PV, as LVM makes them": {head(512, pvLabel), "lvm2-pv uuid=abcdef-0123-4567-89AB-CDEF-0123-456789 size="},
		"LABELONE in another":     {head(0, strings.Repeat("x", 9000), 1024, pvLabel), "unknown"},
		"LUKS":                    {head(0, "LUKS\xba\xbe\x00\x02", 168, "1234-abcd"), "luks version=2 uuid=1234-abcd"},
		"qcow2":                   {head(0, "QFI\xfb\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x08", 24, "\x00\x00\x00\x01\x00\x00\x00\x00", 512, "base.img"), "qcow2 version=3 size=4294967296 backing file=base.img"},
		"qcow2, hostile":          {head(0, "QFI\xfb"+strings.Repeat("\xff", 100)), "qcow2 version=4294967295 size=18446744073709551615"},
		"MBR":                     {head(446, "\x80\x01\x01\x00\x83", 510, "\x55\xaa"), "mbr partitions=1"},
		"a boot sector":           {head(0, strings.Repeat("\x90", 510)+"\x55\xaa"), "mbr"},
		"GPT before MBR":          {head(510, "\x55\xaaEFI PART"), "gpt"},
		"ext by chance":           {head(0, strings.Repeat("\xfe", 1080)+"\x53\xef"), "unknown"},
		"the end of a character":  {head(0, strings.Repeat("ä", 3000)+strings.Repeat("b", 90000)), "text"},
		"zeros":                   {head(), "zeros"},
		"a store":                 {head(0, "SnAp"), "store"},
		"a dump":                  {head(0, "dmsnap store 1\nsize 4096\n"), "dump"},
	} {
		found, err := Probe(block.MemoryFrom(c.head))
		if err != nil {
			t.Fatal(err)
		}
		got := found.Name
		for _, d := range found.Details {
			got += " " + d.Name + "=" + d.Text
			if d.IsSize {
				got += fmt.Sprint(d.Bytes)
			}
		}
		if got != c.want && !(strings.HasSuffix(c.want, "=") && strings.HasPrefix(got, c.want)) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	for _, sig := range signatures {
		if sig.Name == "" || sig.About == "" || len(sig.magic) < 2 {
			t.Errorf("signature %+v", sig)
		}
		dev := block.NewMemory(max(4<<20, sig.off+4096))
		if _, err := dev.WriteAt([]byte(sig.magic), sig.offset(dev.Size())); err != nil {
			t.Fatalf("%s: %v", sig.Name, err)
		}
		c, err := Probe(dev)
		if err != nil || c.Name != sig.Name && sig.details == nil {
			t.Errorf("bytes of %s are taken for %s, %v", sig.Name, c.Name, err)
		}
		var found *NotEmptyError
		if err := CheckEmpty(dev); !errors.As(err, &found) || found.Off > sig.offset(dev.Size())+int64(len(sig.magic)) || found.Off < sig.offset(dev.Size()) {
			t.Errorf("%s at %d: %v", sig.Name, sig.offset(dev.Size()), err)
		} else if sig.details == nil && !strings.Contains(err.Error(), sig.About) {
			t.Errorf("%s: the message %q does not say what was found", sig.Name, err)
		}
	}
}

// A single byte anywhere in the places that are looked at is found, and what has none of them is empty.
func TestCheckEmpty(t *testing.T) {
	const size = 80 << 20
	for _, off := range []int64{0, 511, 1080, 8192, endBytes - 1, 64 << 20, size - endBytes, size - 1} {
		dev := block.NewMemory(size)
		if err := CheckEmpty(dev); err != nil {
			t.Fatal(err)
		}
		if _, err := dev.WriteAt([]byte{1}, off); err != nil {
			t.Fatal(err)
		}
		var found *NotEmptyError
		if err := CheckEmpty(dev); !errors.As(err, &found) || found.Off != off || !strings.Contains(err.Error(), fmt.Sprintf("0x%x", off)) {
			t.Errorf("a byte at %d: %v", off, err)
		}
	}
	for _, size := range []int64{0, 1, 511, 4096, endBytes, endBytes + 1, 2*endBytes + 1} {
		dev := block.NewMemory(size)
		if err := CheckEmpty(dev); err != nil {
			t.Errorf("%d zeros: %v", size, err)
		}
		if size == 0 {
			continue
		}
		if _, err := dev.WriteAt([]byte{1}, size-1); err != nil {
			t.Fatal(err)
		}
		if err := CheckEmpty(dev); err == nil {
			t.Errorf("%d bytes, the last not zero, are called empty", size)
		}
	}
}

// An exception store is recognised by callers.
func TestCheckEmptyStore(t *testing.T) {
	dev := block.NewMemory(1 << 20)
	if _, err := store.Create(dev, ondisk.Layout{ChunkSectors: 8}, false); err != nil {
		t.Fatal(err)
	}
	if err := CheckEmpty(dev); !errors.Is(err, store.ErrExists) {
		t.Error(err)
	}
}

// What can't be read is not empty.
func TestCheckEmptyUnreadable(t *testing.T) {
	bad := errors.New("bad sector")
	for _, at := range []int64{0, endBytes, 79 << 20} {
		dev := failing{block.MemoryFrom(make([]byte, 80<<20)), at, bad}
		if err := CheckEmpty(dev); !errors.Is(err, bad) {
			t.Errorf("unreadable at %d: %v", at, err)
		}
	}
}

// failing has a byte that can't be read, and does not know its holes.
type failing struct {
	block.Device // without extents: all is read
	at           int64
	err          error
}

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off <= f.at && f.at < off+int64(len(p)) {
		return 0, f.err
	}
	return f.Device.ReadAt(p, off)
}

// Data in the middle of a large sparse file is found without reading the file; a hole of 16 TiB is not read.
func TestCheckEmptySparseFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	const size = 16<<40 - 4096
	f, err := block.Create(path, size)
	if err != nil {
		t.Skipf("SKIPPED: no file of 16 TiB here: %v", err)
	}
	defer f.Close()
	var log blocktest.Log
	dev := log.Record("disk", f)
	if err := CheckEmpty(dev); err != nil {
		t.Fatal(err)
	}
	if ops := log.Ops(); len(ops) > 0 {
		t.Errorf("holes were read: %s", log.String())
	}
	if _, err := f.WriteAt([]byte{1}, 7<<40); err != nil {
		t.Fatal(err)
	}
	var found *NotEmptyError
	if err := CheckEmpty(dev); !errors.As(err, &found) || found.Off != 7<<40 {
		t.Errorf("data in the middle: %v", err)
	}
}

// Neither a device that does not know its holes nor a file of many pieces is read as a whole.
func TestCheckEmptyReadsLittle(t *testing.T) {
	var log blocktest.Log
	dev := log.Record("disk", allData{1 << 50})
	if err := CheckEmpty(dev); err != nil {
		t.Fatal(err)
	}
	n := int64(0)
	for _, op := range log.Ops() {
		n += op.Len
	}
	if n > 2*endBytes+extentBytes+8192 {
		t.Errorf("%d bytes were read", n)
	}
}

// allData is a device of zeros that says nothing about holes.
type allData struct{ size int64 }

func (d allData) Size() int64                            { return d.size }
func (allData) Flush() error                             { return nil }
func (allData) WriteAt(p []byte, off int64) (int, error) { return 0, block.ErrReadOnly }
func (d allData) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	return len(p), block.CheckRange("read", off, int64(len(p)), d.size)
}

// made are commands that make something in FILE, a sparse file of 400 MiB.
var made = []struct {
	what string
	args []string
}{
	{"ext4", []string{"mke2fs", "-q", "-F", "-t", "ext4", "FILE"}},
	{"ext4", []string{"mke2fs", "-q", "-F", "-t", "ext2", "FILE"}},
	{"xfs", []string{"mkfs.xfs", "-q", "-f", "FILE"}},
	{"btrfs", []string{"mkfs.btrfs", "-q", "-f", "FILE"}},
	{"fat", []string{"mkfs.vfat", "FILE"}},
	{"swap", []string{"mkswap", "FILE"}},
	{"swap", []string{"mkswap", "-p", "65536", "FILE"}},
	{"gpt", []string{"parted", "-s", "FILE", "mklabel", "gpt"}},
	{"gpt", []string{"sgdisk", "-n", "1:2048:+10M", "FILE"}},
	{"mbr", []string{"parted", "-s", "FILE", "mklabel", "msdos", "mkpart", "primary", "1MiB", "10MiB"}},
	{"apple-partitions", []string{"parted", "-s", "FILE", "mklabel", "mac"}},
	{"lvm2-pv", []string{"pvcreate", "-q", "--config", "devices { filter=[\"a|.*|\"] scan=[\"/nowhere\"] use_devicesfile=0 }", "FILE"}},
	{"iso9660", []string{"genisoimage", "-quiet", "-o", "FILE", "/etc/hostname"}},

	{"luks", []string{"sh", "-c", "echo x | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 FILE -"}},
	{"f2fs", []string{"mkfs.f2fs", "-q", "FILE"}},
	{"squashfs", []string{"mksquashfs", "/etc/hostname", "FILE", "-quiet", "-noappend"}},
}

// What real programs make is recognised and never called empty; nor is what wipefs, blkid's counterpart, finds.
func TestRealPrograms(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for _, c := range made {
		t.Run(strings.Join(c.args[:min(5, len(c.args))], " "), func(t *testing.T) {
			if _, err := exec.LookPath(c.args[0]); err != nil {
				t.Skipf("SKIPPED: %v", err)
			}
			file := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(file, 400<<20); err != nil {
				t.Fatal(err)
			}
			args := make([]string, len(c.args))
			for i, a := range c.args {
				args[i] = strings.ReplaceAll(a, "FILE", file)
			}
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Skipf("SKIPPED: %v: %s", err, out)
			}
			dev, err := block.Open(file, block.Options{Lock: block.LockNone})
			if err != nil {
				t.Fatal(err)
			}
			defer dev.Close()
			if got, err := Probe(dev); err != nil || got.Name != c.what {
				t.Errorf("%s is taken for %s, %v", c.what, got.Name, err)
			}
			var found *NotEmptyError
			if err := CheckEmpty(dev); !errors.As(err, &found) || found.Content.Name != c.what {
				t.Errorf("%s: %v", c.what, err)
			}
			// With the first MiB wiped nothing is called empty either: what is left may be all that is needed.
			if c.what != "gpt" {
				return
			}
			if err := block.Zero(dev, 0, 1<<20, 0); err != nil {
				t.Fatal(err)
			}
			if got, err := Probe(dev); err != nil || got.Name != "gpt" {
				t.Errorf("a second GPT is taken for %s, %v", got.Name, err)
			}
			if err := CheckEmpty(dev); !errors.As(err, &found) {
				t.Errorf("a second GPT is not there: %v", err)
			}
		})
	}
}

// Containers are refused by name; disks and what is unknown pass.
func TestCheckRaw(t *testing.T) {
	for _, sig := range signatures {
		dev := block.NewMemory(1 << 20)
		if off := sig.offset(dev.Size()); off < 0 || off > dev.Size()-int64(len(sig.magic)) {
			continue
		} else if _, err := dev.WriteAt([]byte(sig.magic), off); err != nil {
			t.Fatal(err)
		}
		err := CheckRaw(dev)
		var notRaw *NotRawError
		if raw := sig.Role == RawDisk; raw && err != nil || !raw && (!errors.As(err, &notRaw) || !strings.Contains(err.Error(), sig.Name)) {
			t.Errorf("%s: %v", sig.Name, err)
		}
	}
	for _, content := range []string{"", "text", "\x01\x02", "\x00"} {
		if err := CheckRaw(block.MemoryFrom([]byte(content))); err != nil {
			t.Errorf("%q: %v", content, err)
		}
	}
}

// Whatever a file begins with: an answer, and no panic.
func FuzzProbe(f *testing.F) {
	for _, sig := range signatures {
		if sig.off >= 0 && sig.off < headBytes {
			f.Add(head(int(sig.off), sig.magic)[:min(headBytes, sig.off+4096)])
		}
	}
	f.Add([]byte(pvLabel))
	f.Add(blocktest.Pattern(4096, 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		dev := block.MemoryFrom(bytes.Clone(b))
		c, err := Probe(dev)
		if err != nil || c.Name == "" || c.About == "" {
			t.Fatalf("%+v, %v", c, err)
		}
		for _, d := range c.Details {
			if d.Name == "" || d.Text == "" && !d.IsSize {
				t.Errorf("detail %+v", d)
			}
		}
		if err := CheckEmpty(dev); (err == nil) != (len(bytes.Trim(b, "\x00")) == 0) {
			t.Errorf("%d bytes: %v", len(b), err)
		}
	})
}
