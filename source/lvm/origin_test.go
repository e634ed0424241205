package lvm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/ondisk"
)

// openOrigin opens the origin of a volume of the only group.
func openOrigin(t *testing.T, set *Set, name string) *Origin {
	t.Helper()
	v, err := set.Groups[0].Volume(name)
	if err != nil {
		t.Fatal(err)
	}
	o, err := v.OpenOrigin()
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// text describes a snapshot of an origin.
func (s Snapshot) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %d", s.Name, s.Size)
	for word, is := range map[string]bool{"merging": s.Merging, "unused": s.Unused, "invalid": s.Invalid} {
		if is {
			b.WriteString(" " + word)
		}
	}
	if s.ReadOnly {
		b.WriteString(" read-only")
	}
	if s.Err != nil {
		fmt.Fprintf(&b, ": %v", s.Err)
	}
	return b.String()
}

// TestOriginsOfCases opens origins that a real lvm2 made, by their own names and by those of snapshots.
func TestOriginsOfCases(t *testing.T) {
	for name, want := range map[string]struct {
		volumes   []string
		origin    string
		readOnly  string // why it can't be written
		snapshots []string
	}{
		"gpt":            {[]string{"root", "before", "later"}, "root", "", []string{"before 6291456", "later 6291456"}},
		"merge-grown":    {[]string{"base", "old", "new"}, "base", "", []string{"old 3211264 merging", "new 3211264"}},
		"overflow":       {[]string{"base", "own", "good"}, "base", "", []string{"small 4194304 invalid", "own 4194304 invalid", "good 4194304"}},
		"virtual-origin": {[]string{"sparse"}, "sparse_vorigin", "can only be read", []string{"sparse 67108864"}},
		"names":          {[]string{"fixed", "fixed-s"}, "fixed", "can only be read", []string{"fixed-s 524288"}},
		"names ":         {[]string{"root-fs", "ro-snap"}, "root-fs", "", []string{"root-fs--4k 4194304", "a.b_c+d 4194304", "ro-snap 4194304 read-only", "big 4194304"}},
		"exported":       {[]string{"base"}, "base", "its group is exported", []string{"snap 1572864"}},
		"raid1-stale":    {[]string{"s"}, "r1", "can only be read", []string{"s 3145728"}},
	} {
		for _, c := range testCases(t) {
			if c.Name != strings.TrimSpace(name) {
				continue
			}
			set := scan(t, c.disks(t, c.Expect[0].Images))
			for _, volume := range want.volumes {
				o := openOrigin(t, set, volume)
				var got []string
				for _, s := range o.Snapshots {
					got = append(got, s.text())
				}
				err := o.CheckWritable()
				if o.Name != want.origin || (err == nil) != (want.readOnly == "") || err != nil && !strings.Contains(err.Error(), want.readOnly) || fmt.Sprint(got) != fmt.Sprint(want.snapshots) {
					t.Errorf("%s, %s: origin %s, to write %v, snapshots %q", name, volume, o.Name, err, got)
				}
			}
		}
	}
}

// TestOriginWhoseSnapshotsCannotBeKept: each snapshot is listed, also where nothing can be preserved in it.
func TestOriginWhoseSnapshotsCannotBeKept(t *testing.T) {
	base, cow := textVolume{"base", "", linear(0, 32, "pv1", 0)}, textVolume{"cow", "", linear(0, 64, "pv1", 40)}
	snap := snapshotText("s0", 32, `origin = "base" cow_store = "cow"`)
	for name, c := range map[string]struct {
		volumes []textVolume
		header  ondisk.Header // zero: none
		want    string
	}{
		"never used":      {[]textVolume{base, cow, snap}, ondisk.Header{}, "cow 16384 unused"},
		"no chunk size":   {[]textVolume{base, cow, {"s0", "", seg(0, 32, "snapshot", `chunk_size = 7 origin = "base" cow_store = "cow"`)}}, ondisk.Header{}, "chunk size"},
		"damaged header":  {[]textVolume{base, cow, snap}, ondisk.Header{Magic: ondisk.Magic, Valid: 1, Version: 9, ChunkSectors: 8}, "version"},
		"missing PV":      {[]textVolume{base, {"cow", "", linear(0, 64, "pv2", 40)}, snap}, ondisk.Header{}, "is missing"},
		"of a thin pool":  {[]textVolume{base, {"cow", "", seg(0, 64, "thin", "")}, snap}, ondisk.Header{}, "not supported"},
		"a name like ../": {[]textVolume{base, {"..", "", linear(0, 64, "pv1", 40)}, snapshotText("s0", 32, `origin = "base" cow_store = ".."`)}, ondisk.Header{}, "malformed name"},
		"longer":          {[]textVolume{base, cow, snapshotText("s0", 33, `origin = "base" cow_store = "cow"`)}, ondisk.Header{}, "33 extents long"},
	} {
		content := madeBytes(1, groupText(1, 2, c.volumes...))
		clear(content[(madeStart+40)*512:][:64*512])
		if c.header.Magic != 0 {
			c.header.Encode(content[(madeStart+40)*512:][:ondisk.HeaderSize])
		}
		set := scan(t, []Disk{disk(t, "disk1", content)})
		if len(set.Groups) == 0 {
			t.Errorf("%s: %q", name, set.Warnings)
			continue
		}
		o := openOrigin(t, set, "base")
		if len(o.Snapshots) != 1 || !strings.Contains(o.Snapshots[0].text(), c.want) {
			t.Errorf("%s: %+v", name, o.Snapshots)
		}
		if err := o.CheckWritable(); (err == nil) != (name == "never used") {
			t.Errorf("%s: to write: %v", name, err)
		}
	}
}

// TestCheckInactive looks for active groups in a sysfs that was made here.
func TestCheckInactive(t *testing.T) {
	set := scan(t, []Disk{made(t, 1, groupText(1, 1, textVolume{"base", "", linear(0, 32, "pv1", 0)}))})
	g := set.Groups[0]
	sysfs := t.TempDir()
	device := func(n int, uuid, name string) {
		dir := filepath.Join(sysfs, "block", fmt.Sprintf("dm-%d", n), "dm")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for file, text := range map[string]string{"uuid": uuid, "name": name} {
			if err := os.WriteFile(filepath.Join(dir, file), []byte(text+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	volume := strings.ReplaceAll(id(100), "-", "")
	device(0, "LVM-"+strings.ReplaceAll(id(901), "-", "")+volume, "other-base")
	device(1, "CRYPT-LUKS2-"+strings.ReplaceAll(g.ID, "-", ""), "crypt")
	device(2, "", "made by dmsetup")
	for _, root := range []string{sysfs, filepath.Join(sysfs, "none")} {
		if err := g.CheckInactive(root); err != nil {
			t.Errorf("%s: %v", root, err)
		}
	}
	device(3, "LVM-"+strings.ReplaceAll(g.ID, "-", "")+volume+"-real", "vg-base-real")
	if err := g.CheckInactive(sysfs); !errors.Is(err, ErrActive) || !strings.Contains(err.Error(), `"vg-base-real"`) {
		t.Errorf("an active group: %v", err)
	}
}
