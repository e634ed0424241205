package partition

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }

// A row is an entry of a table under construction: sectors.
type row struct {
	kind         byte // MBR
	number       int  // GPT
	start, count uint64
	name         string
}

var linuxLVM = []byte{0x79, 0xD3, 0xD6, 0xE6, 0x07, 0xF5, 0xC2, 0x44, 0xA2, 0x3C, 0x23, 0x8F, 0x2A, 0x3D, 0xF9, 0x28}

// putMBR writes a sector with a boot signature and entries.
func putMBR(disk []byte, off int, rows ...row) {
	s := disk[off:][:512]
	for i, r := range rows {
		e := s[446+16*i:]
		e[4] = r.kind
		binary.LittleEndian.PutUint32(e[8:], uint32(r.start))
		binary.LittleEndian.PutUint32(e[12:], uint32(r.count))
	}
	s[510], s[511] = 0x55, 0xaa
}

// putGPT writes both copies of a GPT of n entries.
func putGPT(disk []byte, s, n int, rows ...row) {
	le := binary.LittleEndian
	putMBR(disk, 0, row{kind: 0xee, start: 1, count: uint64(len(disk)/s - 1)})
	array := make([]byte, n*128)
	for _, r := range rows {
		e := array[(r.number-1)*128:]
		copy(e, linuxLVM)
		e[16] = byte(r.number)
		le.PutUint64(e[32:], r.start)
		le.PutUint64(e[40:], r.start+r.count-1)
		for i, u := range utf16.Encode([]rune(r.name)) {
			le.PutUint16(e[56+2*i:], u)
		}
	}
	sectors := len(disk) / s
	space := (len(array) + s - 1) / s
	for _, c := range []struct{ at, other, array int }{{1, sectors - 1, 2}, {sectors - 1, 1, sectors - 1 - space}} {
		copy(disk[c.array*s:], array)
		h := disk[c.at*s:][:s]
		copy(h, gptMagic)
		le.PutUint32(h[8:], 0x10000)
		le.PutUint32(h[12:], 92)
		le.PutUint64(h[24:], uint64(c.at))
		le.PutUint64(h[32:], uint64(c.other))
		le.PutUint64(h[40:], uint64(2+space))
		le.PutUint64(h[48:], uint64(sectors-2-space))
		le.PutUint64(h[72:], uint64(c.array))
		le.PutUint32(h[80:], uint32(n))
		le.PutUint32(h[84:], 128)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(array))
		sumGPT(h)
	}
}

// sumGPT makes the checksum of a header good.
func sumGPT(h []byte) {
	clear(h[16:20])
	binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
}

func read(t *testing.T, disk []byte, sector int) *Table {
	t.Helper()
	table, err := Read(block.MemoryFrom(disk), sector)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// want compares numbers, starts and sizes in sectors.
func want(t *testing.T, table *Table, rows ...row) {
	t.Helper()
	if len(table.Partitions) != len(rows) {
		t.Fatalf("partitions %+v, want %d (%v)", table.Partitions, len(rows), table.Warnings)
	}
	s := int64(table.SectorSize)
	for i, p := range table.Partitions {
		r := rows[i]
		if p.Number != r.number || p.Start != int64(r.start)*s || p.Size != int64(r.count)*s || p.Name != r.name {
			t.Errorf("partition %+v, want %+v", p, r)
		}
	}
}

func warned(t *testing.T, table *Table, what string) {
	t.Helper()
	if !strings.Contains(strings.Join(table.Warnings, "\n"), what) {
		t.Errorf("warnings %q, want one with %q", table.Warnings, what)
	}
}

func TestGPT(t *testing.T) {
	for _, s := range []int{512, 4096} {
		disk := make([]byte, 256*s)
		rows := []row{{number: 3, start: 100, count: 10, name: "späte"}, {number: 5, start: 60, count: 30}, {number: 9, start: 120, count: 1}}
		putGPT(disk, s, 56, rows...)
		table := read(t, disk, 0)
		if table.Scheme != GPT || table.SectorSize != s || len(table.Warnings) != 0 {
			t.Errorf("%+v", table)
		}
		want(t, table, rows...)
		if p := table.Partitions[0]; p.Type != "E6D6D379-F507-44C2-A23C-238F2A3DF928" || !strings.HasPrefix(p.ID, "00000003-") {
			t.Errorf("%+v", p)
		}
	}
}

func TestGPTDamaged(t *testing.T) {
	const s = 512
	one := row{number: 1, start: 50, count: 10}
	for name, damage := range map[string]func(primary []byte){
		"checksum":  func(h []byte) { h[40]++ },
		"signature": func(h []byte) { clear(h[:8]) },
		"place":     func(h []byte) { h[24]++; sumGPT(h) },
		"size":      func(h []byte) { binary.LittleEndian.PutUint32(h[12:], 1<<30); sumGPT(h) },
		"entries":   func(h []byte) { binary.LittleEndian.PutUint32(h[80:], 1<<31); sumGPT(h) },
		"entry":     func(h []byte) { binary.LittleEndian.PutUint32(h[84:], 129); sumGPT(h) },
		"array":     func(h []byte) { binary.LittleEndian.PutUint64(h[72:], 1<<62); sumGPT(h) },
		"array sum": func(h []byte) { h[88]++; sumGPT(h) },
	} {
		t.Run(name, func(t *testing.T) {
			disk := make([]byte, 256*s)
			putGPT(disk, s, 56, one)
			damage(disk[s : 2*s])
			table := read(t, disk, 0)
			want(t, table, one)
			warned(t, table, "the backup at sector 255 is used")
			clear(disk[255*s:])
			table = read(t, disk, 0)
			want(t, table)
			warned(t, table, "no copy of the GPT is sound")
		})
	}
	t.Run("4096", func(t *testing.T) { // nothing at the beginning gives the sector size
		disk := make([]byte, 64*4096)
		putGPT(disk, 4096, 56, row{number: 1, start: 10, count: 10})
		clear(disk[4096:8192])
		want(t, read(t, disk, 0), row{number: 1, start: 10, count: 10})
	})
}

func TestGPTEntriesOutside(t *testing.T) {
	disk := make([]byte, 256*512)
	good := row{number: 4, start: 50, count: 10}
	putGPT(disk, 512, 56, row{number: 1, start: 3, count: 10}, row{number: 2, start: 200, count: 1 << 40}, row{number: 3, start: 70, count: 0}, good)
	table := read(t, disk, 0)
	want(t, table, good)
	warned(t, table, "partition 2, sectors 200 to")
}

func TestLogical(t *testing.T) {
	disk := make([]byte, 1000*512)
	putMBR(disk, 0, row{kind: 0x83, start: 7, count: 20}, row{}, row{kind: 0x0f, start: 101, count: 500}, row{kind: 0x8e, start: 700, count: 100})
	putMBR(disk, 101*512, row{kind: 0x83, start: 3, count: 40}, row{kind: 0x05, start: 99, count: 100})  // link from the extended one: 200
	putMBR(disk, 200*512, row{kind: 0x05, start: 211, count: 100}, row{kind: 0x8e, start: 5, count: 70}) // the link first
	putMBR(disk, 312*512, row{kind: 0x83, start: 9, count: 33})
	table := read(t, disk, 0)
	want(t, table, row{number: 1, start: 7, count: 20}, row{number: 3, start: 101, count: 500}, row{number: 4, start: 700, count: 100},
		row{number: 5, start: 104, count: 40}, row{number: 6, start: 205, count: 70}, row{number: 7, start: 321, count: 33})
	if len(table.Warnings) != 0 || table.Scheme != MBR || table.Partitions[3].Type != "0x83" {
		t.Errorf("%+v", table)
	}
	if _, err := table.Open(3); err == nil {
		t.Error("the extended partition was opened")
	}
	if _, err := table.Open(2); err == nil || !strings.Contains(err.Error(), "1, 3, 4, 5, 6, 7") {
		t.Errorf("no partition 2: %v", err)
	}
}

func TestLogicalLoop(t *testing.T) {
	disk := make([]byte, 1000*512)
	putMBR(disk, 0, row{kind: 0x05, start: 100, count: 500})
	putMBR(disk, 100*512, row{kind: 0x83, start: 3, count: 40}, row{kind: 0x05, start: 100, count: 100})
	putMBR(disk, 200*512, row{kind: 0x83, start: 3, count: 40}, row{kind: 0x05, start: 0, count: 100})
	table := read(t, disk, 0)
	if len(table.Partitions) != 3 {
		t.Errorf("%+v", table.Partitions)
	}
	warned(t, table, "leads back to sector 100")

	disk = make([]byte, 2000*512)
	putMBR(disk, 0, row{kind: 0x05, start: 1, count: 1900})
	for i := 1; i < 1900; i++ {
		putMBR(disk, i*512, row{kind: 0x83, start: 1, count: 1}, row{kind: 0x05, start: uint64(i), count: 1})
	}
	table = read(t, disk, 0)
	if n := len(table.Partitions); n != 1+maxLogical {
		t.Errorf("%d partitions", n)
	}
	warned(t, table, "more than 128 logical partitions")

	putMBR(disk, 1*512, row{kind: 0x83, start: 1, count: 1}, row{kind: 0x05, start: 1 << 31, count: 1})
	warned(t, read(t, disk, 0), "behind the end of the disk")
	clear(disk[512:1024])
	warned(t, read(t, disk, 0), "has no table")
}

func TestNoTable(t *testing.T) {
	boot := make([]byte, 512*10)
	putMBR(boot, 0)
	code := make([]byte, 512*10)
	putMBR(code, 0, row{kind: 0x83, start: 1, count: 1})
	code[446] = 0x31
	for name, disk := range map[string][]byte{"zeros": make([]byte, 5120), "short": make([]byte, 100), "empty entries": boot, "boot code": code} {
		if table, err := Read(block.MemoryFrom(disk), 0); !errors.Is(err, ErrNoTable) {
			t.Errorf("%s: %+v, %v", name, table, err)
		}
	}
	if _, err := Read(block.NewMemory(5120), 1024); err == nil || errors.Is(err, ErrNoTable) {
		t.Errorf("sectors of 1024 bytes: %v", err)
	}
}

func TestCut(t *testing.T) {
	disk := make([]byte, 100*512+300)
	putMBR(disk, 0, row{kind: 0x83, start: 10, count: 200}, row{kind: 0x83, start: 100, count: 10}, row{kind: 0x83, start: 50, count: 5})
	table := read(t, disk, 0)
	want(t, table, row{number: 1, start: 10, count: 90}, row{number: 3, start: 50, count: 5})
	warned(t, table, "partition 1 ends behind the end of the disk: cut from 200 to 90 sectors")
	warned(t, table, "partition 2 begins at sector 100")
	warned(t, table, "partitions 1 and 3 overlap")
}

func TestSectorsOf4096(t *testing.T) {
	disk := make([]byte, 100*4096)
	putMBR(disk, 0, row{kind: 0x83, start: 10, count: 20})
	table := read(t, disk, 4096)
	if p := table.Partitions[0]; p.Start != 40960 || p.Size != 81920 {
		t.Errorf("%+v", p)
	}
}

// TestOpen: a partition is a device within the disk.
func TestOpen(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device {
		disk := make([]byte, 400*512)
		putMBR(disk, 0, row{kind: 0x83, start: 33, count: 300})
		before := append([]byte(nil), disk...)
		m := block.MemoryFrom(disk)
		t.Cleanup(func() {
			if after := m.Bytes(); string(after[:33*512]) != string(before[:33*512]) || string(after[333*512:]) != string(before[333*512:]) {
				t.Error("bytes outside of the partition were changed")
			}
		})
		table, err := Read(m, 0)
		if err != nil {
			t.Fatal(err)
		}
		dev, err := table.Open(1)
		if err != nil {
			t.Fatal(err)
		}
		return dev
	})
}

// TestAgainstSgdisk reads a table that sgdisk wrote.
func TestAgainstSgdisk(t *testing.T) {
	sgdisk, err := exec.LookPath("sgdisk")
	if err != nil {
		if sgdisk, err = exec.LookPath("/usr/sbin/sgdisk"); err != nil {
			t.Skip("sgdisk (Debian package gdisk) is not installed")
		}
	}
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(sgdisk, "-a1", "-n2:2048:4095", "-n7:100:199", "-c7:boot disk", "-t2:8e00", path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	disk, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	table := read(t, disk, 0)
	want(t, table, row{number: 2, start: 2048, count: 2048}, row{number: 7, start: 100, count: 100, name: "boot disk"})
	if table.Partitions[0].Type != "E6D6D379-F507-44C2-A23C-238F2A3DF928" || len(table.Warnings) != 0 {
		t.Errorf("%+v", table)
	}
}

// FuzzRead reads hostile tables: the beginning and the end of a disk. Checksums are made good, since anybody can compute them.
func FuzzRead(f *testing.F) {
	const size = 64 << 10
	for _, s := range []int{512, 4096} {
		gpt := make([]byte, size)
		putGPT(gpt, s, 4, row{number: 1, start: 10, count: 2}, row{number: 3, start: 12, count: 2})
		f.Add(gpt[:3*s], gpt[size-2*s:])
		f.Add(gpt[:512], gpt[size-2*s:])
	}
	mbr := make([]byte, size)
	putMBR(mbr, 0, row{kind: 0x83, start: 1, count: 1}, row{kind: 5, start: 2, count: 100})
	putMBR(mbr, 1024, row{kind: 0x83, start: 1, count: 1}, row{kind: 5, start: 0, count: 100})
	f.Add(mbr[:2048], mbr[:0])
	f.Fuzz(func(t *testing.T, head, tail []byte) {
		disk := make([]byte, size)
		copy(disk[max(0, size-len(tail)):], tail)
		copy(disk, head)
		for _, s := range []uint64{512, 4096} {
			sumCopy(disk, s, 1)
			sumCopy(disk, s, size/s-1)
		}
		for _, sector := range []int{0, 512, 4096} {
			table, err := Read(block.MemoryFrom(disk), sector)
			if err != nil {
				continue
			}
			for _, p := range table.Partitions {
				if p.Size <= 0 || p.Start < 0 || p.Start > size-p.Size {
					t.Errorf("%+v is not inside the disk", p)
				}
				dev, err := table.Open(p.Number)
				if (err == nil) == p.Extended || err == nil && dev.Size() != p.Size {
					t.Errorf("%+v opened: %v", p, err)
				}
			}
		}
	})
}

// sumCopy makes the checksums of a copy of a GPT good.
func sumCopy(disk []byte, s, sector uint64) {
	h := disk[sector*s:][:s]
	if string(h[:8]) != gptMagic {
		return
	}
	le, size := binary.LittleEndian, uint64(len(disk))
	if at, n := le.Uint64(h[72:]), uint64(le.Uint32(h[80:]))*uint64(le.Uint32(h[84:])); at < size/s && n <= size && at*s+n <= size {
		le.PutUint32(h[88:], crc32.ChecksumIEEE(disk[at*s:][:n]))
	}
	sumGPT(h)
}
