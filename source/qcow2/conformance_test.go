package qcow2

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// readDisk returns the whole disk of an image.
func readDisk(t *testing.T, b []byte, o Options) ([]byte, error) {
	t.Helper()
	i, err := Open(memory(t, b), o)
	if err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte{0xee}, int(i.Size()))
	_, err = i.ReadAt(p, 0)
	return p, err
}

// TestSubclusters: extended L2 entries with all mixes of data, zeros and nothing, over a backing file; damaged ones; compressed ones.
func TestSubclusters(t *testing.T) {
	for _, bits := range []int{14, 16, 21} {
		cs := 1 << bits
		sub := cs / subclusters
		backing := memory(t, bytes.Repeat([]byte{9}, cs))
		data := bytes.Repeat([]byte{7}, cs)
		const host = 3
		for name, c := range map[string]struct {
			entry, state uint64
			data         []byte
			want         func(s int) byte // of a subcluster
			says         string
		}{
			"alternating": {uint64(host * cs), 0xaaaaaaaa<<32 | 0x55555555, data, func(s int) byte { return []byte{7, 0}[s%2] }, ""},
			"thirds": {uint64(host * cs), 0x24924924<<32 | 0x49249249, data, func(s int) byte {
				return []byte{7, 9, 0}[s%3]
			}, ""},
			"no bit, an offset":            {uint64(host * cs), 0, data, func(int) byte { return 9 }, ""},
			"the first bit is no flag":     {uint64(host*cs) | zeroFlag, 0xffffffff, data, func(int) byte { return 7 }, ""},
			"zeros without an offset":      {0, 0xffffffff << 32, data, func(int) byte { return 0 }, ""},
			"both bits":                    {uint64(host * cs), 1<<32 | 1, data, nil, "data and is zeros"},
			"data without an offset":       {0, 1 << 5, data, nil, "no offset"},
			"compressed, whatever is said": {compressedFlag | 15<<(70-bits) | uint64(host*cs), 1<<32 | 1, deflated(t, data), func(int) byte { return 7 }, ""},
		} {
			b := tiny(3, bits, uint64(cs), incompatExtendedL2, []uint64{c.entry, c.state}, c.data)
			edit{8, 8, 200}.apply(b)
			edit{16, 4, 1}.apply(b)
			b[200] = 'b'
			copy(b[104:], "\xe2\x79\x2a\xca\x00\x00\x00\x03raw\x00\x00\x00\x00\x00")
			p, err := readDisk(t, b, Options{Backing: func(string, string) (block.Device, error) { return backing, nil }})
			var damage *ondisk.CorruptError
			if c.says != "" {
				if !errors.As(err, &damage) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("clusters of %d, %s: %v", cs, name, err)
				}
				continue
			}
			if err != nil {
				t.Errorf("clusters of %d, %s: %v", cs, name, err)
				continue
			}
			for s := range subclusters {
				if !bytes.Equal(p[s*sub:][:sub], bytes.Repeat([]byte{c.want(s)}, sub)) {
					t.Errorf("clusters of %d, %s: subcluster %d begins with %d, want %d", cs, name, s, p[s*sub], c.want(s))
				}
			}
		}
	}
}

// TestSmallDescriptors: descriptors of compressed clusters of 512 bytes have bits that must be 0.
func TestSmallDescriptors(t *testing.T) {
	content := bytes.Repeat([]byte{7}, 512)
	for bit := 55; bit <= 61; bit++ {
		_, err := readDisk(t, tiny(3, 9, 512, 0, []uint64{compressedFlag | 1<<bit | 3<<9}, deflated(t, content)), Options{})
		switch {
		case bit == 61 && err != nil: // a further sector
			t.Errorf("bit %d: %v", bit, err)
		case bit < 61 && (err == nil || bit > 55 && !strings.Contains(err.Error(), "reserved bits")):
			t.Errorf("bit %d: %v", bit, err)
		}
	}
}

// TestTablesAtTheEnd: what the end of the file cuts off reads as zeros, in tables and in clusters; what begins behind it is an error.
func TestTablesAtTheEnd(t *testing.T) {
	const cs = 4096
	full := tiny(3, 12, 2*cs, 0, []uint64{3 * cs, 0}, bytes.Repeat([]byte{7}, cs))
	for _, c := range []struct {
		name   string
		length int
		want   func(i int) byte
		says   string
	}{
		{"whole", 4 * cs, func(i int) byte { return []byte{7, 0}[i/cs] }, ""},
		{"a cluster is cut", 3*cs + 100, func(i int) byte { return map[bool]byte{true: 7}[i < 100] }, ""},
		{"a cluster is gone", 3 * cs, nil, "truncated"},
		{"an L2 table is gone", 2 * cs, nil, "truncated"},
		{"the L1 table is cut behind its entry", cs + 8, nil, "truncated"},
		{"the L1 table is cut within its entry", cs + 4, func(int) byte { return 0 }, ""},
	} {
		p, err := readDisk(t, full[:c.length], Options{})
		if c.says != "" {
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		for i, b := range p {
			if err != nil || b != c.want(i) {
				t.Errorf("%s: %v, byte %d is %d", c.name, err, i, b)
				break
			}
		}
	}
}

// TestDataFile: an external data file is read where the caller supplies it, at the offsets of the disk and at no others.
func TestDataFile(t *testing.T) {
	const cs = 4096
	content := bytes.Repeat([]byte{7}, 3*cs)
	supply := Options{Data: func(string) (block.Device, error) { return memory(t, content), nil }}
	for name, c := range map[string]struct {
		entries []uint64
		want    []byte // of each cluster
		says    string
	}{
		"good":             {[]uint64{copiedFlag, copiedFlag | cs, copiedFlag | 2*cs | zeroFlag}, []byte{7, 7, 0}, ""},
		"nothing at 0":     {[]uint64{0, copiedFlag | cs, 0}, []byte{0, 7, 0}, ""},
		"another offset":   {[]uint64{0, copiedFlag | 2*cs, 0}, nil, "differs"},
		"compressed":       {[]uint64{compressedFlag | 3*cs, 0, 0}, nil, "compressed"},
		"behind its end":   {[]uint64{0, 0, 0, copiedFlag | 3*cs}, nil, "truncated"},
		"not of a cluster": {[]uint64{0, copiedFlag | cs + 512, 0}, nil, "multiple"},
	} {
		b := tiny(3, 12, uint64(len(c.entries)*cs), incompatDataFile, c.entries, nil)
		if _, err := Open(memory(t, b), Options{}); err == nil || !strings.Contains(err.Error(), "external data file") {
			t.Errorf("%s, not supplied: %v", name, err)
		}
		p, err := readDisk(t, b, supply)
		if c.says != "" {
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		for i, want := range c.want {
			if err != nil || !bytes.Equal(p[i*cs:][:cs], bytes.Repeat([]byte{want}, cs)) {
				t.Errorf("%s: %v, cluster %d begins with %d", name, err, i, p[i*cs])
			}
		}
	}
}
