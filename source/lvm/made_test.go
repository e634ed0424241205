package lvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/store"
)

// Disks made here: label in sector 1, one metadata area, extents of a sector from sector 128 on.
const (
	madeArea  = 4096
	madeText  = 1024 // of the area
	madeSize  = 256 << 10
	madeStart = 128
	madeCount = madeSize/512 - madeStart
)

// id makes a UUID.
func id(n int) string { return hyphenate(fmt.Sprintf("%032d", n)) }

// putLabel writes a label into a sector.
func putLabel(disk []byte, sector int, id string, areas ...span) {
	s := disk[sector*512:][:512]
	clear(s)
	le := binary.LittleEndian
	copy(s, labelMagic)
	le.PutUint64(s[8:], uint64(sector))
	le.PutUint32(s[20:], 32)
	copy(s[24:], labelType)
	copy(s[32:], strings.ReplaceAll(id, "-", ""))
	le.PutUint64(s[64:], uint64(len(disk)))
	le.PutUint64(s[72:], madeStart*512)
	at := 72 + 32
	for _, a := range areas {
		le.PutUint64(s[at:], a.off)
		le.PutUint64(s[at+8:], a.size)
		at += 16
	}
	le.PutUint32(s[at+16:], 2)
	le.PutUint32(s[at+20:], 1)
	sumLabel(s)
}

func sumLabel(s []byte) { binary.LittleEndian.PutUint32(s[16:], checksum(s[20:512])) }

// putText writes a metadata area with a text at a byte of it; the text may go round the end.
func putText(disk []byte, a span, off uint64, text string) {
	le := binary.LittleEndian
	h := disk[a.off:][:512]
	clear(h)
	copy(h[4:], areaMagic)
	le.PutUint32(h[20:], 1)
	le.PutUint64(h[24:], a.off)
	le.PutUint64(h[32:], a.size)
	b := append([]byte(text), 0)
	le.PutUint64(h[40:], off)
	le.PutUint64(h[48:], uint64(len(b)))
	le.PutUint32(h[56:], checksum(b))
	sumArea(h)
	n := copy(disk[a.off+off:a.off+a.size], b)
	copy(disk[a.off+512:], b[n:])
}

func sumArea(h []byte) { binary.LittleEndian.PutUint32(h, checksum(h[4:512])) }

var madeSpan = span{madeArea, 60 << 10}

// made returns a disk of a physical volume with this UUID and text.
func made(t testing.TB, pv int, text string) Disk {
	return disk(t, fmt.Sprintf("disk%d", pv), madeBytes(pv, text))
}

func madeBytes(pv int, text string) []byte {
	content := blocktest.Pattern(madeSize, uint64(pv))
	clear(content[:madeStart*512])
	putLabel(content, 1, id(pv), madeSpan)
	putText(content, madeSpan, madeText, text)
	return content
}

// A textVolume is a volume of a made text: its segments and what else is in it.
type textVolume struct{ name, more, segments string }

// groupText makes a text. The physical volumes are pv1, pv2, … with these numbers as UUIDs.
func groupText(seqno int, pvs int, volumes ...textVolume) string {
	var b strings.Builder
	fmt.Fprintf(&b, "vg {\nid = %q\nseqno = %d\nformat = \"lvm2\"\nstatus = [\"RESIZEABLE\", \"READ\", \"WRITE\"]\nflags = []\nextent_size = 1\nphysical_volumes {\n", id(900), seqno)
	for i := 1; i <= pvs; i++ {
		fmt.Fprintf(&b, "pv%d {\nid = %q\ndevice = \"/dev/old%d\"\nstatus = [\"ALLOCATABLE\"]\nflags = []\npe_start = %d\npe_count = %d\n}\n", i, id(i), i, madeStart, madeCount)
	}
	b.WriteString("}\nlogical_volumes {\n")
	for i, v := range volumes {
		status := `"READ", "WRITE", "VISIBLE"`
		fmt.Fprintf(&b, "%s {\nid = %q\nstatus = [%s]\nflags = []\nsegment_count = %d\n%s\n%s}\n", v.name, id(100+i), status,
			strings.Count(v.segments, "start_extent"), v.more, v.segments)
	}
	b.WriteString("}\n}\ncontents = \"Text Format Volume Group\"\nversion = 1\n")
	return b.String()
}

// seg makes a segment.
func seg(start, count int, kind, more string) string {
	return fmt.Sprintf("segment%d {\nstart_extent = %d\nextent_count = %d\ntype = %q\n%s\n}\n", start+1, start, count, kind, more)
}

// linear makes a linear segment.
func linear(start, count int, pv string, extent int) string {
	return seg(start, count, "striped", fmt.Sprintf("stripe_count = 1\nstripes = [ %q, %d ]", pv, extent))
}

// open opens a layer of a volume of the only group.
func open(t testing.TB, set *Set, name string, layer Layer) (block.Device, error) {
	t.Helper()
	if len(set.Groups) != 1 {
		t.Fatalf("%d groups; %v", len(set.Groups), set.Warnings)
	}
	v, err := set.Groups[0].Volume(name)
	if err != nil {
		return nil, err
	}
	return v.Open(layer)
}

// refused fails the test unless a volume can't be opened, with a reason.
func refused(t testing.TB, set *Set, name string, layer Layer, reason string) {
	t.Helper()
	dev, err := open(t, set, name, layer)
	if err == nil || !strings.Contains(err.Error(), reason) {
		t.Errorf("%s %s: %v, error %v, want %q", name, layer, dev, err, reason)
	}
}

func mustOpen(t testing.TB, set *Set, name string, layer Layer) block.Device {
	t.Helper()
	dev, err := open(t, set, name, layer)
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

// holds compares the first bytes of a device with those of a made disk.
func holds(t testing.TB, dev block.Device, at int64, pv, extent int, n int64) {
	t.Helper()
	want := blocktest.Pattern(madeSize, uint64(pv))[(madeStart+extent)*512:][:n]
	got := make([]byte, n)
	if _, err := dev.ReadAt(got, at); err != nil || string(got) != string(want) {
		t.Errorf("bytes at %d are not those of extent %d of disk %d (%v)", at, extent, pv, err)
	}
}

func TestChecksum(t *testing.T) {
	if a, b := checksum(nil), checksum([]byte("123456789")); a != 0xF597A6CF || b != 0x4991CF02 {
		t.Errorf("%#x, %#x", a, b)
	}
}

func TestLabelPlaces(t *testing.T) {
	text := groupText(1, 1, textVolume{"a", "", linear(0, 10, "pv1", 3)})
	for sector := range 4 {
		content := madeBytes(1, text)
		clear(content[:2048])
		putLabel(content, sector, id(1), madeSpan)
		dev := mustOpen(t, scan(t, []Disk{disk(t, "disk", content)}), "a", Active)
		holds(t, dev, 0, 1, 3, 5120)
	}
	content := madeBytes(1, text)
	clear(content[:2048])
	copy(content[2048:], madeBytes(1, text)[512:1024])
	if set := scan(t, []Disk{disk(t, "disk", content)}); len(set.PVs) != 0 {
		t.Error("a label in sector 4 counts")
	}
}

// TestLabelLists: lists without an end are refused.
func TestLabelLists(t *testing.T) {
	text := groupText(1, 1)
	for name, from := range map[string]int{"data areas": 72, "metadata areas": 104} {
		content := madeBytes(1, text)
		for i := from; i < 512; i++ {
			content[512+i] = 1
		}
		sumLabel(content[512:1024])
		set := scan(t, []Disk{disk(t, "disk", content)})
		if len(set.PVs) != 0 || !strings.Contains(fmt.Sprint(set.Warnings), name) && len(set.Warnings) != 0 {
			t.Errorf("%s: %d physical volumes, %v", name, len(set.PVs), set.Warnings)
		}
	}
	for name, at := range map[string]uint32{"behind the sector": 500, "far": 1 << 31, "in the label": 8} {
		content := madeBytes(1, text)
		binary.LittleEndian.PutUint32(content[512+20:], at)
		sumLabel(content[512:1024])
		if set := scan(t, []Disk{disk(t, "disk", content)}); len(set.PVs) != 0 {
			t.Errorf("header %s: accepted", name)
		}
	}
	if l, err := decodeLabel(madeBytes(1, text)[512:1024], 1); err != nil || len(l.areas) != 1 || l.areas[0] != madeSpan || !l.inUse || l.version != 2 {
		t.Errorf("%+v, %v", l, err)
	}
}

// TestAreas: two areas, one of which is bad; none; bounds.
func TestAreas(t *testing.T) {
	le := binary.LittleEndian
	text := groupText(3, 1, textVolume{"a", "", linear(0, 10, "pv1", 0)})
	first, second := span{4096, 24 << 10}, span{32 << 10, 24 << 10}
	for name, damage := range map[string]func(h []byte){
		"checksum":      func(h []byte) { h[0]++ },
		"signature":     func(h []byte) { h[5]++; sumArea(h) },
		"version":       func(h []byte) { h[20]++; sumArea(h) },
		"start":         func(h []byte) { h[24]++; sumArea(h) },
		"size":          func(h []byte) { le.PutUint64(h[32:], 1<<40); sumArea(h) },
		"size 0":        func(h []byte) { le.PutUint64(h[32:], 0); sumArea(h) },
		"text checksum": func(h []byte) { h[56]++; sumArea(h) },
		"offset 511":    func(h []byte) { le.PutUint64(h[40:], 511); sumArea(h) },
		"offset size":   func(h []byte) { le.PutUint64(h[40:], first.size); sumArea(h) },
		"length 0":      func(h []byte) { le.PutUint64(h[48:], 0); sumArea(h) },
		"length size":   func(h []byte) { le.PutUint64(h[48:], first.size-511); sumArea(h) },
		"length 2^63":   func(h []byte) { le.PutUint64(h[48:], 1<<63); sumArea(h) },
	} {
		content := madeBytes(1, text)
		putLabel(content, 1, id(1), first, second)
		putText(content, first, 512, groupText(9, 1))
		putText(content, second, 512, text)
		damage(content[first.off:][:512])
		set := scan(t, []Disk{disk(t, "disk", content)})
		holds(t, mustOpen(t, set, "a", Active), 0, 1, 0, 5120)
		if len(set.Warnings) == 0 {
			t.Errorf("%s: no warning", name)
		}
	}
	content := madeBytes(1, text)
	putLabel(content, 1, id(1), span{1 << 40, 1 << 20}, span{madeSize - 512, 1024}, span{1, 1<<64 - 1})
	if set := scan(t, []Disk{disk(t, "disk", content)}); len(set.Groups) != 0 || len(set.PVs) != 1 || len(set.Warnings) != 4 {
		t.Errorf("areas outside: %d groups, %v", len(set.Groups), set.Warnings)
	}
	content = madeBytes(2, text)
	putLabel(content, 1, id(2)) // no area
	set := scan(t, []Disk{made(t, 1, groupText(3, 2, textVolume{"a", "", linear(0, 10, "pv2", 4)})), disk(t, "disk2", content)})
	holds(t, mustOpen(t, set, "a", Active), 0, 2, 4, 5120)
}

func TestTextRoundTheEnd(t *testing.T) {
	text := groupText(3, 1, textVolume{"a", "", linear(0, 10, "pv1", 0)})
	content := madeBytes(1, text)
	clear(content[madeArea:][:madeSpan.size])
	putText(content, madeSpan, madeSpan.size-512, text)
	holds(t, mustOpen(t, scan(t, []Disk{disk(t, "disk", content)}), "a", Active), 0, 1, 0, 5120)
}

// TestFreshPV: a physical volume without a group is listed.
func TestFreshPV(t *testing.T) {
	content := madeBytes(1, groupText(1, 1))
	h := content[madeArea:][:512]
	clear(h[40:64])
	sumArea(h)
	set := scan(t, []Disk{disk(t, "disk", content)})
	if len(set.PVs) != 1 || len(set.Groups) != 0 || set.PVs[0].Group != nil || set.PVs[0].ID != id(1) {
		t.Errorf("%+v", set)
	}
}

func TestTextRefused(t *testing.T) {
	for name, text := range map[string]string{
		"hex":              "a = 0x2",
		"23 digits":        "a = 12345678901234567890123",
		"plus":             "a = +2",
		"word":             "a = b",
		"key twice":        "a = 1 a = 2",
		"no brace":         "a { b = 1",
		"brace too many":   "a { b = 1 } }",
		"no value":         "a = ",
		"no equals sign":   "a 1",
		"NUL":              "a = 1\x00 b = 2",
		"NUL in string":    "a = \"x\x00\"",
		"list in list":     "a = [ [ 1 ] ]",
		"list without end": "a = [ 1, 2",
		"nested":           strings.Repeat("a {", 100_000),
		"brackets":         "a = " + strings.Repeat("[", 100_000),
		"endless string":   "a = \"" + strings.Repeat("x", 1<<20),
		"backslash at end": "a = \"x\\",
		"no name":          "= 1",
		"sign":             "a = \"b\" ! ",
	} {
		s, err := parse([]byte(text))
		var syntax *SyntaxError
		if !errors.As(err, &syntax) || syntax.Line != 1 || syntax.Byte > len(text) || len(err.Error()) > 300 {
			t.Errorf("%s: %v, %v", name, s, err)
		}
	}
	if _, err := parse([]byte("a = 1\nb {\nc = 0x2\n}")); err == nil || !strings.Contains(err.Error(), "line 3 (byte 14)") {
		t.Errorf("place: %v", err)
	}
	if testing.Short() {
		return // what follows has millions of entries
	}
	var many strings.Builder
	for i := range maxTokens {
		fmt.Fprintf(&many, "a%d=1\n", i)
	}
	if _, err := parse([]byte(many.String())); err == nil {
		t.Error("millions of entries are accepted")
	}
}

func TestTextAccepted(t *testing.T) {
	s, err := parse([]byte("# first\n9 { 2024-01 = 02 # note\r\n\t4k=-5 } a.b_c+d = \"x \\\" \\\\ # { [ \xc3\xa4 \xff\" l = [] m = [ 1, \"2\", ] n = [ 1 2 ] f = 1.5"))
	if err != nil {
		t.Fatal(err)
	}
	sub, _, err := s.sub("9")
	if err != nil || sub.values["2024-01"] != int64(2) || sub.values["4k"] != int64(-5) {
		t.Errorf("%v, %v", sub, err)
	}
	if v, _, err := s.text("a.b_c+d"); err != nil || v != "x \" \\ # { [ \xc3\xa4 \xff" {
		t.Errorf("%q, %v", v, err)
	}
	if fmt.Sprint(s.values["l"], s.values["m"], s.values["n"], s.values["f"]) != "[] [1 2] [1 2] 1.5" {
		t.Errorf("%v", s.values)
	}
}

// TestBackupFile: a file of vgcfgbackup has the same volumes.
func TestBackupFile(t *testing.T) {
	for _, c := range testCases(t) {
		if c.Name != "names" {
			continue
		}
		m, err := readMetadata([]byte(strings.Join(c.Backup["my-vg"], "\n")))
		if err != nil {
			t.Fatal(err)
		}
		set := scan(t, c.disks(t, []string{c.Images[0].Guest}))
		on := set.Groups[0].meta
		if m.name != "my-vg" || len(m.volumes) == 0 || len(m.volumes) != len(on.volumes) || m.id != on.id {
			t.Fatalf("%q: %d volumes, %d on disk", m.name, len(m.volumes), len(on.volumes))
		}
		for i, v := range m.volumes {
			if o := on.volumes[i]; v.name != o.name || v.id != o.id || v.extents != o.extents || (v.joins == nil) != (o.joins == nil) || len(v.segments) != len(o.segments) {
				t.Errorf("%q is not %q", v.name, o.name)
			}
		}
		return
	}
	t.Fatal("no case with a backup file")
}

// TestGroupsOfOneName: both are listed, and chosen by UUID.
func TestGroupsOfOneName(t *testing.T) {
	other := strings.ReplaceAll(strings.ReplaceAll(groupText(1, 1, textVolume{"b", "", linear(0, 5, "pv1", 0)}), id(900), id(901)), id(1), id(2))
	set := scan(t, []Disk{made(t, 1, groupText(1, 1, textVolume{"a", "", linear(0, 5, "pv1", 0)})), made(t, 2, other)})
	if len(set.Groups) != 2 {
		t.Fatalf("%d groups", len(set.Groups))
	}
	if _, err := set.Group("vg"); !errors.Is(err, ErrAmbiguous) || !strings.Contains(err.Error(), id(901)) {
		t.Errorf("by name: %v", err)
	}
	for _, name := range []string{id(901), strings.ReplaceAll(id(901), "-", "")} {
		g, err := set.Group(name)
		if err != nil || g.Volumes[0].Name != "b" || !g.Volumes[0].Readable {
			t.Errorf("by UUID: %v, %v", g, err)
		}
	}
	if _, err := set.Group("no"); !errors.Is(err, ErrNotFound) {
		t.Errorf("another: %v", err)
	}
}

// TestPVOfAnotherGroup: a physical volume whose own metadata is of another group is not used for an old text that lists it.
func TestPVOfAnotherGroup(t *testing.T) {
	old := groupText(7, 2, textVolume{"a", "", linear(0, 5, "pv1", 0)}, textVolume{"b", "", linear(0, 5, "pv2", 0)})
	now := strings.ReplaceAll(strings.ReplaceAll(groupText(1, 1, textVolume{"c", "", linear(0, 5, "pv1", 0)}), id(900), id(901)), id(1), id(2))
	set := scan(t, []Disk{made(t, 1, old), made(t, 2, now)})
	if len(set.Groups) != 2 {
		t.Fatalf("%d groups", len(set.Groups))
	}
	var names []string
	for _, g := range set.Groups {
		for _, v := range g.Volumes {
			if v.Readable {
				names = append(names, v.Name)
			}
		}
	}
	if strings.Join(names, " ") != "a c" {
		t.Errorf("readable: %v", names)
	}
}

// TestOverlap: volumes that share extents are refused, their neighbours are not.
func TestOverlap(t *testing.T) {
	set := scan(t, []Disk{made(t, 1, groupText(1, 1,
		textVolume{"a", "", linear(0, 10, "pv1", 0)}, textVolume{"b", "", linear(0, 5, "pv1", 9)},
		textVolume{"c", "", linear(0, 5, "pv1", 20)}, textVolume{"d", "", linear(0, 5, "pv1", 30) + linear(5, 5, "pv1", 34)}))})
	refused(t, set, "a", Active, `shares extents with volume "b"`)
	refused(t, set, "b", Active, `shares extents with volume "a"`)
	refused(t, set, "d", Active, "shares extents")
	holds(t, mustOpen(t, set, "c", Active), 0, 1, 20, 2560)
}

// TestOutside: no volume shows bytes outside of its physical volumes.
func TestOutside(t *testing.T) {
	text := groupText(1, 1,
		textVolume{"behind", "", linear(0, 10, "pv1", madeCount-9)}, textVolume{"far", "", linear(0, 1, "pv1", 1<<62)},
		textVolume{"last", "", linear(0, 8, "pv1", 100)}, textVolume{"nowhere", "", linear(0, 8, "pv7", 100)})
	set := scan(t, []Disk{made(t, 1, text)})
	refused(t, set, "behind", Active, "behind the end")
	refused(t, set, "far", Active, "")
	refused(t, set, "nowhere", Active, "neither a physical nor a logical volume")
	mustOpen(t, set, "last", Active)
	cut := madeBytes(1, text)[:(madeStart+107)*512]
	refused(t, scan(t, []Disk{disk(t, "cut", cut)}), "last", Active, "was it cut?")
	// A start that wraps around when it is counted in bytes.
	for _, start := range []string{"9223372036854775807", "18014398509481983"} {
		set = scan(t, []Disk{made(t, 1, strings.Replace(text, fmt.Sprintf("pe_start = %d", madeStart), "pe_start = "+start, 1))})
		refused(t, set, "last", Active, "")
	}
}

// TestReferences: cycles and fan-out cost little.
func TestReferences(t *testing.T) {
	begin := time.Now()
	cycle := []textVolume{{"a", "", linear(0, 5, "b", 0)}, {"b", "", linear(0, 5, "c", 0)}, {"c", "", linear(0, 5, "a", 0)}, {"d", "", linear(0, 5, "d", 0)}}
	set := scan(t, []Disk{made(t, 1, groupText(1, 1, cycle...))})
	for _, v := range cycle {
		refused(t, set, v.name, Active, "refers to itself")
	}
	var chain []textVolume
	for i := range 30 {
		chain = append(chain, textVolume{fmt.Sprintf("v%02d", i), "", linear(0, 5, fmt.Sprintf("v%02d", i+1), 0)})
	}
	chain = append(chain, textVolume{"v30", "", linear(0, 5, "pv1", 0)})
	set = scan(t, []Disk{made(t, 1, groupText(1, 1, chain...))})
	refused(t, set, "v00", Active, "more than 8 levels")
	mustOpen(t, set, "v30", Active)
	var fan []textVolume
	for level := range 6 {
		var segs strings.Builder
		for i := range 60 {
			segs.WriteString(linear(i*5, 5, fmt.Sprintf("f%d", level+1), 0))
		}
		fan = append(fan, textVolume{fmt.Sprintf("f%d", level), "", segs.String()})
	}
	fan = append(fan, textVolume{"f6", "", linear(0, 5, "pv1", 0)})
	set = scan(t, []Disk{made(t, 1, groupText(1, 1, fan...))})
	dev := mustOpen(t, set, "f0", Active)
	holds(t, dev, 0, 1, 0, 2560)
	if err := dev.Flush(); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("took %v", took)
	}
}

// superblock writes one of a raid1 leg at an extent of a made disk.
func superblock(content []byte, extent int, position uint32, events, failed, recovery uint64) {
	b := content[(madeStart+extent)*512:]
	le := binary.LittleEndian
	clear(b[:512])
	copy(b, raidMagic)
	le.PutUint32(b[8:], 2)
	le.PutUint32(b[12:], position)
	le.PutUint64(b[16:], events)
	le.PutUint64(b[24:], failed)
	le.PutUint64(b[32:], recovery)
}

// TestRaid1Rule: which leg is read, by the superblocks.
func TestRaid1Rule(t *testing.T) {
	all := ^uint64(0)
	text := groupText(1, 1,
		textVolume{"r", "", seg(0, 10, "raid1", `device_count = 2 raids = ["m0", "i0", "m1", "i1"]`)},
		textVolume{"m0", "", linear(0, 1, "pv1", 0)}, textVolume{"i0", "", linear(0, 10, "pv1", 10)},
		textVolume{"m1", "", linear(0, 1, "pv1", 1)}, textVolume{"i1", "", linear(0, 10, "pv1", 30)})
	type sb struct {
		position                 uint32
		events, failed, recovery uint64
	}
	for name, c := range map[string]struct {
		a, b sb
		leg  int // -1: refused
	}{
		"both":                  {sb{0, 5, 0, all}, sb{1, 5, 0, all}, 0},
		"first is old":          {sb{0, 5, 0, all}, sb{1, 6, 1, all}, 1},
		"first failed":          {sb{0, 6, 1, all}, sb{1, 6, 1, all}, 1},
		"first at other place":  {sb{1, 6, 0, all}, sb{1, 6, 0, all}, 1},
		"first being filled":    {sb{0, 6, 0, 9}, sb{1, 6, 0, all}, 1},
		"first filled":          {sb{0, 6, 0, 10}, sb{1, 6, 0, all}, 0},
		"old one knows nothing": {sb{0, 6, 0, all}, sb{1, 5, 1, all}, 0},
		"none":                  {sb{0, 6, 2, 3}, sb{1, 6, 0, all}, -1},
		"both failed":           {sb{0, 6, 3, all}, sb{1, 6, 0, all}, -1},
	} {
		content := madeBytes(1, text)
		superblock(content, 0, c.a.position, c.a.events, c.a.failed, c.a.recovery)
		superblock(content, 1, c.b.position, c.b.events, c.b.failed, c.b.recovery)
		set := scan(t, []Disk{disk(t, "disk", content)})
		if c.leg < 0 {
			refused(t, set, "r", Active, "without a good leg")
			continue
		}
		t.Run(name, func(t *testing.T) {
			dev := mustOpen(t, set, "r", Active)
			holds(t, dev, 0, 1, 10+20*c.leg, 5120)
			if _, err := dev.WriteAt(make([]byte, 512), 0); !errors.Is(err, block.ErrReadOnly) {
				t.Errorf("write to a raid1: %v", err)
			}
			if _, err := mustOpen(t, set, "i0", Active).WriteAt(make([]byte, 512), 0); !errors.Is(err, block.ErrReadOnly) {
				t.Errorf("write to a leg: %v", err)
			}
		})
	}
	content := madeBytes(1, text)
	clear(content[madeStart*512:][:1024])
	refused(t, scan(t, []Disk{disk(t, "disk", content)}), "r", Active, "no superblock")
}

// TestMirrorWithoutFirstLeg: it is not certain that the second one is whole.
func TestMirrorWithoutFirstLeg(t *testing.T) {
	text := groupText(1, 2,
		textVolume{"m", "", seg(0, 10, "mirror", `mirror_count = 2 mirrors = ["i0", 0, "i1", 0]`)},
		textVolume{"i0", "", linear(0, 10, "pv1", 10)}, textVolume{"i1", "", linear(0, 10, "pv2", 30)})
	set := scan(t, []Disk{made(t, 1, text), made(t, 2, text)})
	holds(t, mustOpen(t, set, "m", Active), 0, 1, 10, 5120)
	set = scan(t, []Disk{made(t, 2, text)})
	refused(t, set, "m", Active, "physical volume "+id(1)+`, last at "/dev/old1", is missing`)
	if g := set.Groups[0]; len(g.Missing) != 1 || g.Missing[0].ID != id(1) {
		t.Errorf("%+v", g.Missing)
	}
}

func TestUnsupportedTypes(t *testing.T) {
	kinds := []string{"thin", "thin-pool", "cache", "cache-pool+METADATA_FORMAT", "writecache", "vdo", "raid0", "raid5_ls", "raid10", "integrity", "error", "striped+NEW", "wormhole"}
	volumes := []textVolume{{"good", "", linear(0, 5, "pv1", 0)}}
	for i, kind := range kinds {
		volumes = append(volumes, textVolume{fmt.Sprintf("v%d", i), "", seg(0, 5, kind, "")})
	}
	set := scan(t, []Disk{made(t, 1, groupText(1, 1, volumes...))})
	mustOpen(t, set, "good", Active)
	for i, kind := range kinds {
		refused(t, set, fmt.Sprintf("v%d", i), Active, kind)
	}
}

// TestVDO: volumes on a VDO pool, as lvm2 describes them, are refused with their type, and so are snapshots of them; all others are
// readable, the pool's data volume too.
func TestVDO(t *testing.T) {
	set := scan(t, []Disk{made(t, 1, groupText(1, 1,
		textVolume{"lvol0", "", seg(0, 20, "vdo", `vdo_pool = "vpool0" vdo_offset = 0`)},
		textVolume{"vpool0", "", seg(0, 40, "vdo-pool", `data = "vpool0_vdata" header_size = 1024 virtual_extents = 20
use_compression = 1 use_deduplication = 1 use_metadata_hints = 1 minimum_io_size = 4096 block_map_cache_size_mb = 128`)},
		textVolume{"vpool0_vdata", "", linear(0, 40, "pv1", 0)},
		textVolume{"plain", "", linear(0, 5, "pv1", 40)},
		textVolume{"cow", "", linear(0, 8, "pv1", 50)},
		snapshotText("snapshot0", 20, `origin = "lvol0" cow_store = "cow"`),
	))})
	for name, kind := range map[string]string{"lvol0": `"vdo"`, "vpool0": `"vdo-pool"`, "cow": `"vdo"`} {
		refused(t, set, name, Active, kind)
	}
	holds(t, mustOpen(t, set, "plain", Active), 0, 1, 40, 5*512)
	holds(t, mustOpen(t, set, "vpool0_vdata", Active), 0, 1, 0, 40*512)
}

// TestSplitBrain: where each of two physical volumes was written without the other, no one is called outdated; each alone is read.
func TestSplitBrain(t *testing.T) {
	disks := []Disk{made(t, 1, groupText(7, 1, textVolume{"a", "", linear(0, 5, "pv1", 0)})),
		made(t, 2, strings.ReplaceAll(groupText(7, 1, textVolume{"b", "", linear(0, 5, "pv1", 0)}), id(1), id(2)))}
	set := scan(t, disks)
	g := set.Groups[0]
	if g.Err == nil || !strings.Contains(g.Err.Error(), "two metadata texts of sequence number 7") || len(g.Missing) != 0 {
		t.Errorf("%v, missing %v", g.Err, g.Missing)
	}
	for _, pv := range set.PVs {
		if pv.Outdated || pv.Group != g {
			t.Errorf("%+v", pv)
		}
	}
	if text := fmt.Sprint(set.Warnings, g.Warnings); strings.Contains(text, "outdated") {
		t.Error(text)
	}
	for i, name := range []string{"a", "b"} {
		holds(t, mustOpen(t, scan(t, disks[i:i+1]), name, Active), 0, i+1, 0, 5*512)
	}
}

// snapshotText makes the volume that joins origin and COW volume.
func snapshotText(name string, extents int, keys string) textVolume {
	return textVolume{name, "", seg(0, extents, "snapshot", "chunk_size = 8\n"+keys)}
}

// TestWrongLinksRefused: what a broken snapshot makes uncertain.
func TestWrongLinksRefused(t *testing.T) {
	base, cow := textVolume{"base", "", linear(0, 32, "pv1", 0)}, textVolume{"cow", "", linear(0, 64, "pv1", 40)}
	for name, c := range map[string]struct {
		snapshots []textVolume
		reason    string
	}{
		"no origin":          {[]textVolume{snapshotText("s0", 32, `origin = "no" cow_store = "cow"`)}, "does not exist"},
		"no COW":             {[]textVolume{snapshotText("s0", 32, `origin = "base" cow_store = "no"`)}, "does not exist"},
		"COW is origin":      {[]textVolume{snapshotText("s0", 32, `origin = "base" cow_store = "base"`)}, "is its origin and its COW volume"},
		"origin has no data": {[]textVolume{snapshotText("s0", 32, `origin = "s0" cow_store = "cow"`)}, "has no data"},
		"one COW for two":    {[]textVolume{snapshotText("s0", 32, `origin = "base" cow_store = "cow"`), snapshotText("s1", 32, `origin = "base" cow_store = "cow"`)}, "too"},
		"both stores":        {[]textVolume{snapshotText("s0", 32, `origin = "base" cow_store = "cow" merging_store = "cow"`)}, "one of cow_store"},
		"no store":           {[]textVolume{snapshotText("s0", 32, `origin = "base"`)}, "one of cow_store"},
		"of a snapshot":      {[]textVolume{snapshotText("s0", 32, `origin = "base" cow_store = "cow"`), snapshotText("s1", 32, `origin = "cow" cow_store = "base"`)}, "is the COW volume of a snapshot"},
		"two segments":       {[]textVolume{{"s0", "", seg(0, 5, "snapshot", `origin = "base" cow_store = "cow"`) + seg(5, 5, "snapshot", "")}}, "2 segments"},
		"origin is a value":  {[]textVolume{snapshotText("s0", 32, `origin = 5 cow_store = "cow"`)}, "origin is not a string"},
	} {
		set := scan(t, []Disk{made(t, 1, groupText(1, 1, append([]textVolume{base, cow}, c.snapshots...)...))})
		if g := set.Groups[0]; g.Err == nil || !strings.Contains(g.Err.Error(), c.reason) {
			t.Errorf("%s: %v", name, g.Err)
		}
		refused(t, set, "base", Active, c.reason)
	}
	set := scan(t, []Disk{made(t, 1, groupText(1, 1, base, cow, snapshotText("s0", 33, `origin = "base" cow_store = "cow"`)))})
	refused(t, set, "cow", Active, "33 extents long")
	mustOpen(t, set, "base", Active)
}

// TestWrites: what may be written, and where it goes.
func TestWrites(t *testing.T) {
	text := groupText(1, 1,
		textVolume{"plain", "", linear(0, 200, "pv1", 0)}, textVolume{"base", "", linear(0, 32, "pv1", 200)},
		textVolume{"cow", "", linear(0, 64, "pv1", 240)}, snapshotText("s0", 32, `origin = "base" cow_store = "cow"`))
	content := madeBytes(1, text)
	clear(content[(madeStart+240)*512:][:64*512])
	m := block.MemoryFrom(content)
	set := scan(t, []Disk{{"disk", m}})
	for _, c := range []struct {
		name     string
		layer    Layer
		extent   int64
		writable bool
	}{{"plain", Active, 0, true}, {"plain", Real, 0, true}, {"base", Active, 0, false}, {"base", Real, 200, true}, {"cow", Active, 0, false}, {"cow", COW, 240, true}} {
		dev := mustOpen(t, set, c.name, c.layer)
		mark := []byte(strings.Repeat("x", 512))
		_, err := dev.WriteAt(mark, 512)
		if !c.writable {
			if !errors.Is(err, block.ErrReadOnly) {
				t.Errorf("%s %s: %v", c.name, c.layer, err)
			}
			continue
		}
		if got := m.Bytes()[(madeStart+c.extent+1)*512:][:512]; err != nil || string(got) != string(mark) {
			t.Errorf("%s %s: not written (%v)", c.name, c.layer, err)
		}
	}
	refused(t, set, "plain", COW, "no COW volume")
	refused(t, set, "cow", Real, "no origin")
	refused(t, set, "plain", "other", "no layer")

	// A store made on the COW layer shows on the view.
	cow := mustOpen(t, set, "cow", COW)
	l, err := ondisk.NewLayout(8)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Create(cow, l, true); err != nil {
		t.Fatal(err)
	}
	view := mustOpen(t, scan(t, []Disk{{"disk", m}}), "cow", Active)
	if a, err := digest(view); err != nil || view.Size() != 32*512 {
		t.Errorf("%d bytes, %v", view.Size(), err)
	} else if b, _ := digest(mustOpen(t, set, "base", Real)); a != b {
		t.Error("an empty snapshot is not its origin")
	}
	for old, new := range map[string]string{
		`"RESIZEABLE",`: `"RESIZEABLE", "EXPORTED",`, "extent_size = 1": "extent_size = 1 system_id = \"x\"", `"READ", "WRITE", "VISIBLE"`: `"READ", "VISIBLE"`,
		fmt.Sprintf("pe_start = %d", madeStart): "pe_start = 10", // the first extents are in the metadata area
	} {
		set := scan(t, []Disk{made(t, 1, strings.Replace(text, old, new, 1))})
		if _, err := mustOpen(t, set, "plain", Active).WriteAt(make([]byte, 512), 0); !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("%s: written (%v)", new, err)
		}
	}
}

func TestSuite(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device {
		set := scan(t, []Disk{{"disk", block.MemoryFrom(madeBytes(1, groupText(1, 1, textVolume{"a", "", linear(0, 100, "pv1", 0) + linear(100, 60, "pv1", 150)})))}})
		return mustOpen(t, set, "a", Active)
	})
}

// TestSuiteReading runs the reading half of the suite on what can only be read: views, mirrors, volumes of exported groups.
func TestSuiteReading(t *testing.T) {
	for name, volumes := range map[string][]string{"gpt": {"later", "root"}, "mirrors": {"mc", "md", "mds", "r1", "r1s", "r1_rimage_0"},
		"virtual-origin": {"sparse", "sparse_vorigin"}, "merge-half": {"base"}, "exported": {"base", "snap"}, "striped": {"snap"}, "two-pvs": {"snap"}} {
		for _, c := range testCases(t) {
			if c.Name != name {
				continue
			}
			set := scan(t, c.disks(t, c.Expect[0].Images))
			for _, volume := range volumes {
				t.Run(name+"/"+volume, func(t *testing.T) {
					blocktest.RunReadOnly(t, func(t *testing.T) block.Device { return mustOpen(t, set, volume, Active) })
				})
			}
		}
	}
}

// TestSameDiskTwice: one disk that is given twice is one; two clones are refused.
func TestSameDiskTwice(t *testing.T) {
	text := groupText(1, 1, textVolume{"a", "", linear(0, 10, "pv1", 0)})
	d := made(t, 1, text)
	mustOpen(t, scan(t, []Disk{d, {"again", d.Dev}}), "a", Active)
	set := scan(t, []Disk{d, {"clone", made(t, 1, text).Dev}})
	refused(t, set, "a", Active, "is there more than once: disk1, clone")
}

// TestReadErrors: what a disk can't read is an error, not damage.
func TestReadErrors(t *testing.T) {
	bad := errors.New("unreadable sector")
	for n := range 4 {
		dev := blocktest.NewFaulty(made(t, 1, groupText(1, 1)).Dev, blocktest.FailFrom(n, bad))
		if set, err := Scan([]Disk{{"disk1", dev}}, 0); n > 0 && err == nil {
			t.Errorf("read %d fails: %+v", n, set)
		} else if err != nil && (!errors.Is(err, bad) || !strings.HasPrefix(err.Error(), "disk1: ")) {
			t.Errorf("read %d fails: %v", n, err)
		}
	}
}

// TestListing: names, brackets, sizes and origins are those of `lvs -a` while nothing was active.
func TestListing(t *testing.T) {
	for _, c := range testCases(t) {
		rows := c.States["off"].LVS
		last := c.Expect[len(c.Expect)-1]
		if len(rows) == 0 || last.Refuse != "" || c.Name == "returned-pv" || c.Name == "outdated-pv" || c.Name == "raid1-stale" {
			continue // their state is of other disks
		}
		t.Run(c.Name, func(t *testing.T) {
			set := scan(t, c.disks(t, last.Images))
			var got, want []string
			for _, g := range set.Groups {
				for _, v := range g.Volumes {
					name, origin, size := v.Name, v.Origin, v.Size
					if !v.Visible {
						name = "[" + name + "]"
					}
					if v.Type == "snapshot" {
						size = v.COWSize
						if strings.HasSuffix(origin, "_vorigin") {
							origin = "[" + origin + "]"
						}
					}
					got = append(got, fmt.Sprintf("%s/%s %d %s %s", g.Name, name, size, origin, string(map[bool]byte{true: 'r', false: 'w'}[v.ReadOnly])))
				}
			}
			for _, r := range rows {
				origin := r["origin"]
				if r["lv_attr"][0] != 's' && r["lv_attr"][0] != 'S' {
					origin = "" // of a thin or cached volume: not a thick snapshot's
				}
				want = append(want, fmt.Sprintf("%s/%s %s %s %c", r["vg_name"], r["lv_name"], r["lv_size"], origin, r["lv_attr"][1]))
			}
			key := func(s string) string { return strings.NewReplacer("[", "", "]", "").Replace(s) }
			sortBy(got, key)
			sortBy(want, key)
			if strings.Join(got, "\n") != strings.Join(want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}

// TestSectorsGuessed: an MBR that counts sectors of 4096 bytes is recognised by the label in its partition.
func TestSectorsGuessed(t *testing.T) {
	content := append(make([]byte, 40*4096), madeBytes(1, groupText(1, 1, textVolume{"a", "", linear(0, 10, "pv1", 3)}))...)
	le := binary.LittleEndian
	e := content[446:]
	e[4] = 0x83
	le.PutUint32(e[8:], 40)
	le.PutUint32(e[12:], madeSize/4096)
	content[510], content[511] = 0x55, 0xaa
	set := scan(t, []Disk{disk(t, "disk", content)})
	holds(t, mustOpen(t, set, "a", Active), 0, 1, 3, 5120)
	if pv := set.PVs[0]; pv.Place() != "disk#p1" || !strings.Contains(fmt.Sprint(set.Warnings), "sectors of 4096") {
		t.Errorf("%s, %v", pv.Place(), set.Warnings)
	}
}

// TestOutdatedPV: physical volumes that were removed or missing are named.
func TestOutdatedPV(t *testing.T) {
	for _, c := range testCases(t) {
		switch c.Name {
		case "outdated-pv":
			set := scan(t, c.disks(t, c.Expect[0].Images))
			outdated := 0
			for _, pv := range set.PVs {
				if pv.Outdated {
					outdated++
				}
			}
			if outdated != 1 || !strings.Contains(fmt.Sprint(set.Groups[0].Warnings), "is outdated") {
				t.Errorf("%d outdated, %v", outdated, set.Groups[0].Warnings)
			}
		case "returned-pv":
			set := scan(t, c.disks(t, c.Expect[0].Images))
			refused(t, set, "onb", Active, "is missing")
			if g := set.Groups[0]; len(g.Missing) != 1 || !strings.Contains(g.Missing[0].Reason, "changed while") {
				t.Errorf("%+v", g.Missing)
			}
		}
	}
}

// TestAttributes: groups that another host may use say so, and are not written.
func TestAttributes(t *testing.T) {
	for _, c := range testCases(t) {
		if c.Name != "exported" && c.Name != "foreign" {
			continue
		}
		set := scan(t, c.disks(t, c.Expect[0].Images))
		if g := set.Groups[0]; len(g.Attributes) != 1 || g.Attributes[0] != c.Name {
			t.Errorf("%s: %v", c.Name, g.Attributes)
		}
		if _, err := mustOpen(t, set, "base", Real).WriteAt(make([]byte, 512), 0); !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("%s: written (%v)", c.Name, err)
		}
	}
}

// TestNames: names that LVM does not allow are refused, and quoted.
func TestNames(t *testing.T) {
	for _, name := range []string{"a/b", "a\x1b[31m", "a b", "ä"} {
		set := scan(t, []Disk{made(t, 1, groupText(1, 1, textVolume{name, "", linear(0, 10, "pv1", 3)}))})
		if len(set.Groups) != 0 || strings.ContainsAny(fmt.Sprint(set.Warnings), "\x1b") {
			t.Errorf("%q: %d groups, %v", name, len(set.Groups), set.Warnings)
		}
	}
	for _, name := range []string{".", "..", "-a", strings.Repeat("a", 128)} {
		set := scan(t, []Disk{made(t, 1, groupText(1, 1, textVolume{name, "", linear(0, 10, "pv1", 3)}, textVolume{"good", "", linear(0, 1, "pv1", 20)}))})
		if len(set.Groups) != 1 || len(set.Groups[0].Volumes) != 1 {
			t.Errorf("%q: %+v", name, set)
		}
	}
}
