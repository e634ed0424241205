package vhost

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRegions: each thing that is wrong with a region of memory refuses it by its own rule, and the largest that are right do not.
func TestRegions(t *testing.T) {
	const end = 1<<64 - 1
	list := []region{{gpa: 0x10000, size: 0x1000, ua: 0x70000}}
	for what, test := range map[string]struct {
		r   region
		say string // "" for a right one
	}{
		"empty":                         {region{gpa: 0x20000, ua: 0x80000}, "not possible"},
		"guest addresses wrap":          {region{gpa: end - 0xfff, size: 0x2000, ua: 0x80000}, "not possible"},
		"addresses wrap":                {region{gpa: 0x20000, size: 0x2000, ua: end - 0xfff}, "not possible"},
		"guest addresses overlap":       {region{gpa: 0x10fff, size: 1, ua: 0x80000}, "overlap"},
		"guest addresses overlap below": {region{gpa: 0xffff, size: 2, ua: 0x80000}, "overlap"},
		"addresses overlap":             {region{gpa: 0x20000, size: 1, ua: 0x70fff}, "overlap"},
		"addresses overlap below":       {region{gpa: 0x20000, size: 2, ua: 0x6ffff}, "overlap"},
		"too large":                     {region{gpa: 0x20000, size: maxMapped + 1, ua: 0x80000}, "too much"},
		"too large with the others":     {region{gpa: 0x20000, size: maxMapped - 0xfff, ua: 0x80000}, "too much"},
		"behind the other":              {region{gpa: 0x11000, size: 1, ua: 0x71000}, ""},
		"before the other":              {region{gpa: 0xf000, size: 0x1000, ua: 0x6f000}, ""},
		"the largest":                   {region{gpa: 0x20000, size: maxMapped - 0x1000, ua: 0x80000}, ""},
	} {
		err := checkRegion(list, test.r)
		if test.say == "" && err != nil || test.say != "" && (err == nil || !strings.Contains(err.Error(), test.say)) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestMappings: what can't be mapped is refused, and nothing behind the part that was asked for is reached.
func TestMappings(t *testing.T) {
	file := func() int {
		fd, err := unix.MemfdCreate("memory", 0)
		if err == nil {
			err = unix.Ftruncate(fd, 3*4096)
		}
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	null, err := unix.Open(os.DevNull, unix.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if m, err := newMapping(null, 0, 4096); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a device: %v, %v", m, err)
	}
	for _, r := range [][2]uint64{{0, 0}, {0, 3*4096 + 1}, {4096, 2*4096 + 1}, {3*4096 + 1, 1}, {1 << 63, 4096}, {4096, 1<<64 - 4096}, {0, maxMapped + 1}} {
		if m, err := newMapping(file(), r[0], r[1]); err == nil || !strings.Contains(err.Error(), "of a file of 12288 bytes") {
			t.Errorf("%d bytes at offset %d: %v, %v", r[1], r[0], m, err)
		}
	}
	m, err := newMapping(file(), 100, 4096)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.bytes) != 4096 || cap(m.bytes) != 4096 {
		t.Errorf("%d bytes, room for %d", len(m.bytes), cap(m.bytes))
	}
	m.release()
}

// TestMemoryOfATable: parts of a ring and buffers lie in the regions, to the last byte and no further.
func TestMemoryOfATable(t *testing.T) {
	mem := []byte("0123456789abcdef")
	memory := func(p []byte) *mapping { return &mapping{whole: p, bytes: p} }
	const last = 1<<64 - 4 // of the addresses there are
	tab := &table{regions: []region{{gpa: 0x1000, size: 16, ua: 0x5000, mem: memory(mem)}, {gpa: 0x1010, size: 4, ua: last, mem: memory([]byte("WXYZ"))}}}
	for _, test := range []struct {
		ua, n uint64
		want  string
	}{
		{0x5000, 16, "0123456789abcdef"}, {0x5004, 4, "4567"}, {0x500f, 1, "f"},
		{0x5000, 17, ""}, {0x500f, 2, ""}, {0x5010, 1, ""}, {0x4fff, 1, ""}, {0x4fff, 16, ""}, {last, 4, "WXYZ"}, {last, 5, ""}, {last - 1, 2, ""}, {0x5001, 1<<64 - 1, ""},
	} {
		p, err := tab.ring(test.ua, test.n)
		if (err != nil) != (test.want == "") || string(p) != test.want || cap(p) != len(p) {
			t.Errorf("%d bytes of a ring at %#x: %q, %v", test.n, test.ua, p, err)
		}
	}
	for _, test := range []struct {
		list   segments
		off, n uint64
		want   string // "": it fails
	}{
		{segments{{0x1000, 16}}, 0, 16, "0123456789abcdef"},
		{segments{{0x100e, 6}}, 0, 6, "efWXYZ"}, // over two regions
		{segments{{0x1000, 2}, {0x1004, 2}}, 1, 3, "145"},
		{segments{{0x1000, 2}, {0x1004, 2}}, 2, 2, "45"},
		{segments{{0x1000, 2}, {0x1004, 2}}, 2, 3, ""},     // there is less
		{segments{{0x1012, 4}}, 0, 4, ""},                  // behind the last region
		{segments{{0x0fff, 2}}, 0, 2, ""},                  // before the first one
		{segments{{1<<64 - 8, 0x2000}}, 0x1008, 4, ""},     // wraps around to the memory
		{segments{{1<<64 - 8, 0x2000}}, 0, 0x1010, ""},     // the same, from its beginning on
		{segments{{0x1000, 1}, {0x5000, 1}}, 0, 2, ""},     // an address of the front-end
		{segments{{0x1000, 4}, {0x2000, 4}}, 0, 4, "0123"}, // what is not used may lie anywhere
	} {
		got := make([]byte, test.n)
		if ok := test.list.read(tab, test.off, got); ok != (test.want != "") || ok && string(got) != test.want {
			t.Errorf("%d bytes from %d of %v: %q, %v", test.n, test.off, test.list, got, ok)
		}
	}
	if !(segments{{0x100e, 6}}).write(tab, 1, []byte("abcd")) || !bytes.HasSuffix(mem, []byte("ea")) {
		t.Errorf("written: %q", mem)
	}
}
