package lvm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/store"
)

func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }

// A testCase is one of testdata/cases.json.
type testCase struct {
	Name   string
	Images []struct {
		File, Guest, SHA256 string
		Size                int64
		Sector              int
	}
	Expect []struct {
		Images []string
		Refuse string
		Note   string
		Views  []testView
	}
	States map[string]struct {
		LVS    []map[string]string
		Status json.RawMessage
	}
	Backup map[string][]string
}

type testView struct {
	VG, LV, Layer, SHA256, Error, State string
	Size                                int64
}

func testCases(t *testing.T) []testCase {
	t.Helper()
	var cases []testCase
	readJSON(t, "testdata/cases.json", &cases)
	return cases
}

func readJSON(t *testing.T, path string, to any) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, to); err != nil {
		t.Fatal(err)
	}
}

// A frozenDisk fails the test when it is written to.
type frozenDisk struct {
	*bytes.Reader
	t    testing.TB
	name string
}

func (d *frozenDisk) WriteAt(p []byte, off int64) (int, error) {
	d.t.Errorf("disk %s: %d bytes written at byte %d", d.name, len(p), off)
	return 0, block.ErrReadOnly
}

func (d *frozenDisk) Flush() error { return nil }

func (d *frozenDisk) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange("read", off, int64(len(p)), d.Size()); err != nil {
		return 0, err
	}
	if n, err := d.Reader.ReadAt(p, off); n < len(p) {
		return n, err
	}
	return len(p), nil
}

// disk returns a device that fails the test when it is written to.
func disk(t testing.TB, name string, content []byte) Disk {
	return Disk{name, &frozenDisk{bytes.NewReader(content), t, name}}
}

// disks returns the disks of a case that are given by their names in the guest.
func (c *testCase) disks(t testing.TB, guests []string) []Disk {
	t.Helper()
	var disks []Disk
	for _, guest := range guests {
		for _, i := range c.Images {
			if i.Guest == guest {
				disks = append(disks, disk(t, guest, testhost.Unpack(t, filepath.Join("testdata", c.Name, i.File))))
			}
		}
	}
	if len(disks) != len(guests) {
		t.Fatalf("case %s has no disks %v", c.Name, guests)
	}
	return disks
}

func scan(t testing.TB, disks []Disk) *Set {
	t.Helper()
	set, err := Scan(disks, 0)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// digest reads a whole device.
func digest(dev block.Device) (string, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < dev.Size(); off += int64(len(buf)) {
		buf = buf[:min(int64(len(buf)), dev.Size()-off)]
		if _, err := dev.ReadAt(buf, off); err != nil {
			return "", err
		}
		h.Write(buf)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// refusedTypes are the volumes of cases whose layout is not supported, though the kernel could read them.
var refusedTypes = map[string][]string{
	"thin-beside": {"pool", "thin1", "thin2", "thickofthin"},
	"unsupported": {"cached", "cs", "main", "r0", "r10", "r4", "r5", "r6"},
}

// TestEachViewOfEachCase opens what the kernel showed, with the disks in each of two orders, and compares the bytes.
func TestEachViewOfEachCase(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	for _, c := range testCases(t) {
		for i, run := range c.Expect {
			for _, reversed := range []bool{false, true} {
				guests := slices.Clone(run.Images)
				if reversed {
					if len(guests) == 1 {
						continue
					}
					slices.Reverse(guests)
				}
				t.Run(fmt.Sprintf("%s/%d/%s", c.Name, i, strings.Join(guests, "+")), func(t *testing.T) {
					set := scan(t, c.disks(t, guests))
					if run.Refuse != "" {
						if len(set.Groups) != 1 || set.Groups[0].Err == nil {
							t.Fatalf("%d groups, not refused: %s", len(set.Groups), run.Refuse)
						}
						for _, v := range set.Groups[0].Volumes {
							if dev, err := v.Open(Active); !errors.Is(err, ErrUnreadable) {
								t.Errorf("%s: %v, %v", v.Name, dev, err)
							}
						}
						return
					}
					for _, want := range run.Views {
						checkView(t, set, c.Name, want)
					}
				})
			}
		}
	}
}

func checkView(t *testing.T, set *Set, name string, want testView) {
	t.Helper()
	g, err := set.Group(want.VG)
	if err != nil {
		t.Fatal(err)
	}
	v, err := g.Volume(want.LV)
	if err != nil {
		t.Errorf("%s %s: %v", want.LV, want.Layer, err)
		return
	}
	dev, err := v.Open(Layer(want.Layer))
	unsupported := slices.Contains(refusedTypes[name], want.LV) && want.Layer != "cow"
	if want.Error != "" || unsupported {
		if !errors.Is(err, ErrUnreadable) {
			t.Errorf("%s %s: opened (%v), must be refused", want.LV, want.Layer, err)
		}
		if want.Layer == "" && (v.Readable || v.Reason == "") {
			t.Errorf("%s: readable %v, reason %q", want.LV, v.Readable, v.Reason)
		}
		return
	}
	if err != nil {
		t.Errorf("%s %s: %v", want.LV, want.Layer, err)
		return
	}
	if want.Layer == "" && (!v.Readable || v.Reason != "" || v.Size != want.Size) {
		t.Errorf("%s: readable %v, reason %q, %d bytes, want %d", want.LV, v.Readable, v.Reason, v.Size, want.Size)
	}
	if dev.Size() != want.Size {
		t.Errorf("%s %s: %d bytes, want %d", want.LV, want.Layer, dev.Size(), want.Size)
	}
	if got, err := digest(dev); err != nil || got != want.SHA256 {
		t.Errorf("%s %s: digest %.12s, want %.12s (%v)", want.LV, want.Layer, got, want.SHA256, err)
	}
}

// A probe is a change to the image of testdata/probes.
type probe struct {
	Name    string
	Patches [][2]any
	Cut     int64
	LVM     []string
}

type probes struct {
	Base   struct{ Text string }
	Probes []probe
}

func readProbes(t testing.TB) (base []byte, p probes) {
	t.Helper()
	text, err := os.ReadFile("testdata/probes/probes.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &p); err != nil {
		t.Fatal(err)
	}
	return testhost.Unpack(t, "testdata/probes/base.gz"), p
}

// apply returns the image with the changes of p.
func (p probe) apply(t testing.TB, base []byte) []byte {
	t.Helper()
	image := bytes.Clone(base)
	for _, patch := range p.Patches {
		off := int(patch[0].(float64))
		change, err := hex.DecodeString(patch[1].(string))
		if err != nil {
			t.Fatal(err)
		}
		copy(image[off:], change)
	}
	if p.Cut > 0 {
		image = image[:p.Cut]
	}
	return image
}

// probeDiffers are the probes for which we differ from lvm2 by intent (docs/spec/lvm2.md §9.1): the volumes that can be opened.
var probeDiffers = map[string]string{
	"unknown_key": "plainlv", "beyond": "base snap", "gap": "plainlv", "segcount": "plainlv", "segcount0": "plainlv",
	"negative": "plainlv", "lv_itself": "plainlv", "dup_key": "", "two_sections": "", "nested": "", "bare_status": "plainlv",
	"snap_chunk": "base plainlv snap", "mbr_table": "base plainlv snap",
}

// activated returns the volumes that lvm2 activated, by the device-mapper tables that it made.
func (p probe) activated() string {
	var names []string
	tables := false
	for _, line := range p.LVM {
		if line == "+ dmsetup table" {
			tables = true
			continue
		}
		name, _, ok := strings.Cut(line, ": ")
		name, isLV := strings.CutPrefix(name, "vg-")
		if !tables || !ok || !isLV || strings.HasSuffix(name, "-real") || strings.HasSuffix(name, "-cow") {
			continue
		}
		if strings.HasSuffix(line, ": ") {
			continue
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return strings.Join(slices.Compact(names), " ")
}

// opened returns the volumes of a set that can be opened.
func opened(set *Set) string {
	var names []string
	for _, g := range set.Groups {
		for _, v := range g.Volumes {
			if _, err := v.Open(Active); err == nil {
				names = append(names, v.Name)
			}
		}
	}
	return strings.Join(names, " ")
}

func TestProbes(t *testing.T) {
	base, p := readProbes(t)
	if len(p.Probes) != 68 {
		t.Fatalf("%d probes", len(p.Probes))
	}
	for _, pr := range p.Probes {
		t.Run(pr.Name, func(t *testing.T) {
			set := scan(t, []Disk{disk(t, "DISK", pr.apply(t, base))})
			want := pr.activated()
			got := opened(set)
			if d, ok := probeDiffers[pr.Name]; ok {
				want = d
			}
			if got != want {
				t.Errorf("opened %q, want %q; lvm2 %q", got, want, pr.activated())
				t.Log(set.Warnings)
				for _, g := range set.Groups {
					t.Log(g.Err, g.Warnings)
					for _, v := range g.Volumes {
						t.Log(v.Name, v.Reason)
					}
				}
			}
		})
	}
}

func sortBy(list []string, key func(string) string) {
	slices.SortFunc(list, func(a, b string) int { return strings.Compare(key(a), key(b)) })
}

// TestStatus: the numbers of each snapshot's store are those that the kernel gave.
func TestStatus(t *testing.T) {
	checked := 0
	for _, c := range testCases(t) {
		last := c.Expect[len(c.Expect)-1]
		if last.Refuse != "" || len(c.Expect) != 1 {
			continue
		}
		var status map[string][]string
		if err := json.Unmarshal(c.States["judge"].Status, &status); err != nil {
			continue // no state
		}
		set := scan(t, c.disks(t, last.Images))
		for _, want := range last.Views {
			lines := status[deviceName(want.VG, want.LV)]
			if want.Layer != "cow" || want.Error != "" || want.State != "judge" || len(lines) != 1 {
				continue
			}
			fields := strings.Fields(lines[0])
			if fields[2] != "snapshot" {
				continue
			}
			g, err := set.Group(want.VG)
			if err != nil {
				t.Fatal(err)
			}
			v, err := g.Volume(want.LV)
			if err != nil {
				t.Fatal(err)
			}
			dev, err := v.Open(COW)
			if err != nil {
				t.Errorf("%s: %v", want.LV, err)
				continue
			}
			st, err := store.OpenToRead(dev)
			if err != nil {
				t.Fatal(err)
			}
			got := st.Usage().String()
			if st.Err() != nil {
				got = "Invalid"
			}
			if text := strings.Join(fields[3:], " "); got != text {
				t.Errorf("%s %s: %q, want %q", c.Name, want.LV, got, text)
			}
			checked++
		}
	}
	if checked < 20 {
		t.Errorf("%d snapshots", checked)
	}
}

// deviceName is the device-mapper name of a volume.
func deviceName(vg, lv string) string {
	double := strings.NewReplacer("-", "--")
	return double.Replace(vg) + "-" + double.Replace(lv)
}
