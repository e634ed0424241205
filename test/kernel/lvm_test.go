package kernel_test

import (
	"fmt"
	"math"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// lvmConfig makes LVM work in a guest that has no udev, no daemons and one disk for it.
const lvmConfig = `devices { dir="/dev" scan=["/dev"] use_devicesfile=0 obtain_device_list_from_udev=0
 external_device_info_source="none" md_component_detection=0 global_filter=["a|^/dev/loop1$|","r|.*|"] }
global { use_lvmpolld=0 }
activation { udev_sync=0 udev_rules=0 monitoring=0 }
backup { backup=0 archive=0 }
`

// volumes is a volume group in a guest: origin base, snapshot snap.
type volumes struct {
	*kernel
	start map[string]int64 // bytes on the disk
	size  map[string]int64 // bytes
}

const lvmDisk = "/dev/loop1"

// newVolumes makes a volume group with a base of the given number of bytes, full of the stream of originSeed, and a
// snapshot with chunks of 4 KiB.
func newVolumes(t *testing.T, base, snap string) *volumes {
	if _, err := exec.LookPath("lvm"); err != nil {
		need(t)
		t.Skip("SKIPPED: no lvm here (Debian's package lvm2)")
	}
	v := &volumes{kernel: newKernelOf(t, boot(t))}
	v.sh("mkdir -p /run/lvm-etc && cat > /run/lvm-etc/lvm.conf <<'END'\n" + lvmConfig + "END\n" +
		"truncate -s 64M /run/pv && losetup " + lvmDisk + " /run/pv")
	v.lvm("pvcreate " + lvmDisk)
	v.lvm("vgcreate -s 64k vg " + lvmDisk)
	v.lvm("lvcreate -y -Wn -Zn -n base -L " + base + " vg")
	v.must(job.Op{Do: job.Write, Dev: "/dev/mapper/vg-base", Seed: originSeed, N: v.bytes("base")})
	v.lvm("lvcreate -y -s -n snap -c 4k -L " + snap + " vg/base")
	return v
}

func (v *volumes) lvm(line string) string {
	v.t.Helper()
	return v.sh("LVM_SYSTEM_DIR=/run/lvm-etc LVM_SUPPRESS_FD_WARNINGS=1 lvm " + line)
}

func (v *volumes) bytes(lv string) int64 {
	v.t.Helper()
	n, err := strconv.ParseInt(strings.TrimSpace(v.lvm("lvs --noheadings --units b --nosuffix -o lv_size vg/"+lv)), 10, 64)
	if err != nil {
		v.t.Fatal(err)
	}
	return n
}

// off deactivates the group and finds out where on the disk its volumes are.
func (v *volumes) off() {
	v.t.Helper()
	v.lvm("vgchange -an vg")
	v.start, v.size = map[string]int64{}, map[string]int64{}
	text := v.lvm("pvs --segments --noheadings --units b --nosuffix -o pvseg_start,pvseg_size,vg_extent_size,pe_start,lv_name " + lvmDisk)
	for line := range strings.Lines(text) {
		var first, count, extent, start int64
		var name string
		if n, _ := fmt.Sscan(line, &first, &count, &extent, &start, &name); n < 5 {
			continue // free space
		}
		name = strings.Trim(name, "[]")
		if at, ok := v.start[name]; ok && at+v.size[name] != start+first*extent {
			v.t.Fatalf("%s is in pieces:\n%s", name, text)
		} else if !ok {
			v.start[name] = start + first*extent
		}
		v.size[name] += count * extent
	}
}

func (v *volumes) on() { v.lvm("vgchange -ay vg") }

// take reads the volumes while the group is off.
func (v *volumes) take() (disk, cow *block.Memory) {
	v.t.Helper()
	read := func(lv string) *block.Memory {
		if v.size[lv] == 0 {
			v.t.Fatalf("no volume %s in %v", lv, v.start)
		}
		return block.MemoryFrom(v.device(lvmDisk, v.start[lv], v.size[lv]))
	}
	return read("base"), read("snap")
}

// give writes them back.
func (v *volumes) give(disk, cow *block.Memory) {
	v.t.Helper()
	v.putDevice(lvmDisk, v.start["base"], disk.Bytes())
	v.putDevice(lvmDisk, v.start["snap"], cow.Bytes())
}

// check wants LVM to say of the snapshot what dmsnap predicts: its percentage, as lvs counts it.
func (v *volumes) check(s *snapshot.Snapshot) {
	v.t.Helper()
	st := s.Status()
	want := 0.0
	if st.Allocated != st.Metadata {
		want = 100 * float64(st.Allocated) / float64(st.Total)
	}
	text := strings.TrimSpace(v.lvm("lvs --noheadings -o snap_percent vg/snap"))
	got, err := strconv.ParseFloat(text, 64)
	if err != nil || math.Abs(got-want) > 0.011 {
		v.t.Errorf("lvs says %q percent, dmsnap predicts %.2f (%s)", text, want, st.Usage)
	}
	if line := strings.TrimSpace(v.sh("dmsetup status vg-snap")); line != st.Line() {
		v.t.Errorf("status %q, dmsnap %q", line, st.Line())
	}
	if got, want := v.digestOf("/dev/mapper/vg-snap"), digestOf(s); got != want {
		v.t.Errorf("the snapshot's content differs")
	}
	tally.add(func(c *counts) { c.percentages++ })
}

func (v *volumes) digestOf(dev string) string {
	v.t.Helper()
	return v.must(job.Op{Do: job.Read, Dev: dev})[0].Out
}

// TestLVM has LVM make, show, extend and merge a snapshot over stores that dmsnap read, wrote and half
// merged in between.
func TestLVM(t *testing.T) {
	v := newVolumes(t, "6m", "3m")
	disk := block.MemoryFrom(streamBytes(originSeed, 0, v.bytes("base")))
	write := func(o *snapshot.Origin, s *snapshot.Snapshot, seed uint64) {
		t.Helper()
		for i := range int64(20) {
			off, n := (int64(seed)*40+i*57)%1000*4096/512*512, (1+i%5)*2048
			target, path := block.Device(s), "/dev/mapper/vg-snap"
			if i%3 == 0 {
				target, path = o, "/dev/mapper/vg-base"
			}
			if _, err := target.WriteAt(streamBytes(seed+uint64(i), off, n), off); err != nil {
				t.Fatal(err)
			}
			if v.start == nil { // the group is on: the kernel does the same
				v.must(job.Op{Do: job.Write, Dev: path, Off: off, N: n, Seed: seed + uint64(i)})
			}
		}
	}

	// LVM made the store; both write; lvs and the engine agree.
	o := snapshot.NewOrigin(disk)
	total := v.total()
	cow := block.NewMemory(total * 512)
	s, err := o.Attach(cow, snapshot.Options{ChunkSectors: 8})
	if err != nil {
		t.Fatal(err)
	}
	v.check(s)
	write(o, s, 100)
	v.check(s)

	// dmsnap takes LVM's store over, writes, and gives it back.
	s.Close()
	v.off()
	theirDisk, theirCOW := v.take()
	if kernelcase.Digest(theirDisk.Bytes()) != kernelcase.Digest(disk.Bytes()) {
		t.Errorf("origins differ")
	}
	o = snapshot.NewOrigin(theirDisk)
	if s, err = o.Attach(theirCOW, snapshot.Options{}); err != nil {
		t.Fatal(err)
	}
	write(o, s, 200)
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	v.give(theirDisk, theirCOW)
	v.start = nil
	v.on()
	v.check(s)

	// LVM extends it; both go on.
	v.lvm("lvextend -L +1m vg/snap")
	if err := theirCOW.Grow(v.total() * 512); err != nil {
		t.Fatal(err)
	}
	v.check(s)
	write(o, s, 300)
	v.check(s)
	want := digestOf(s)

	// dmsnap merges half of it and leaves the rest to lvconvert.
	s.Close()
	v.off()
	theirDisk, theirCOW = v.take()
	m, err := snapshot.NewOrigin(theirDisk).LoadMerge(theirCOW, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	for half := m.Status().Exceptions / 2; m.Status().Exceptions > half; {
		if _, err := m.Step(4); err != nil {
			t.Fatal(err)
		}
	}
	m.Close()
	v.give(theirDisk, theirCOW)
	v.on()
	if got := v.digestOf("/dev/mapper/vg-snap"); got != want {
		t.Error("half merged, the snapshot's content differs")
	}
	v.lvm("lvconvert --merge -i 1 vg/snap")
	if got := v.digestOf("/dev/mapper/vg-base"); got != want {
		t.Error("the merged origin has not the snapshot's content")
	}
	if left := strings.Fields(v.lvm("lvs --noheadings -o lv_name vg")); len(left) != 1 || left[0] != "base" {
		t.Errorf("volumes after the merge: %v", left)
	}
	tally.add(func(c *counts) { c.operations += 60; c.exchanged += 3; c.rounds++ })
}

// total is the size of the snapshot's COW volume in sectors as the kernel sees it.
func (v *volumes) total() int64 {
	v.t.Helper()
	var used, total, metadata int64
	line := strings.TrimSpace(v.sh("dmsetup status vg-snap"))
	if _, err := fmt.Sscanf(statusText(line), "%d/%d %d", &used, &total, &metadata); err != nil {
		v.t.Fatalf("status %q: %v", line, err)
	}
	return total
}
