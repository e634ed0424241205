package kernel_test

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/kernelcase"
	"github.com/dmsnap/dmsnap/nbd"
)

// A wholeDisk is the disk of a volume group, taken out of the guest while the group is not active, and put back.
type wholeDisk struct {
	*volumes
	dir, path string
}

const wholeDiskBytes = 64 << 20

// take writes the disk to a file of the host.
func (d *wholeDisk) take() {
	d.t.Helper()
	d.lvm("vgchange -an vg")
	if err := os.WriteFile(d.path, d.device(lvmDisk, 0, wholeDiskBytes), 0o600); err != nil {
		d.t.Fatal(err)
	}
}

// give puts the file back as the disk, and has LVM activate the group.
func (d *wholeDisk) give() {
	d.t.Helper()
	content, err := os.ReadFile(d.path)
	if err != nil {
		d.t.Fatal(err)
	}
	d.putDevice(lvmDisk, 0, content)
	d.on()
}

// dmsnap runs the program of the host, which must succeed.
func (d *wholeDisk) dmsnap(args ...string) string {
	d.t.Helper()
	out, err := exec.Command(filepath.Join(binaries, "dmsnap"), args...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("dmsnap %v: %v: %s", args, err, out)
	}
	return string(out)
}

// want compares what the kernel shows of each volume, and what LVM and e2fsck say.
func (d *wholeDisk) want(when string, digests map[string]string) {
	d.t.Helper()
	for volume, want := range digests {
		if got := d.digestOf("/dev/mapper/vg-" + volume); got != want {
			d.t.Errorf("%s: the kernel shows something else of %s", when, volume)
		}
		d.sh("e2fsck -fn /dev/mapper/vg-" + volume)
	}
	d.lvm("vgck vg")
	rows := strings.Fields(d.lvm("lvs --noheadings --separator , -o lv_name,origin,lv_snapshot_invalid vg"))
	if fmt.Sprint(rows) != "[base,,unknown other,base, snap,base,]" {
		d.t.Errorf("%s: lvs: %v", when, rows)
	}
}

// marked are the places of blocks of a file whose content is known.
func marked(content []byte) (offs []int64) {
	for off := 0; off+4096 <= len(content); off += 4096 {
		if bytes.Count(content[off:off+4096], []byte(mark)) > 300 {
			offs = append(offs, int64(off))
		}
	}
	return offs
}

const mark = "DMSNAPBLOCK"

// serve writes through a server to the origin and one of its snapshots, and returns what both hold then.
func (d *wholeDisk) serve() (base, snap []byte) {
	d.t.Helper()
	socket := filepath.Join(d.dir, "s")
	c := exec.Command(filepath.Join(binaries, "dmsnap"), "serve", d.path+"#vg/base", "--socket", socket)
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		d.t.Fatal(err)
	}
	defer c.Process.Kill()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.Contains(line, "nbd+unix:") {
		d.t.Fatalf("serve: %q, %v", line, err)
	}
	read := func(dev block.Device) []byte {
		p := make([]byte, dev.Size())
		if _, err := dev.ReadAt(p, 0); err != nil {
			d.t.Fatal(err)
		}
		return p
	}
	devs := map[string]*nbd.Client{}
	for i, name := range []string{"base", "snap"} {
		u := nbd.URI{Network: "unix", Address: socket, Export: name}
		dev, err := nbd.Dial(d.t.Context(), u.String())
		if err != nil {
			d.t.Fatal(err)
		}
		defer dev.Close()
		devs[name] = dev
		places := marked(read(dev))
		if len(places) < 100 {
			d.t.Fatalf("%s has %d blocks of the file", name, len(places))
		}
		for j, off := range places {
			if j%3 == i || j%7 == 0 {
				if _, err := dev.WriteAt(bytes.Repeat([]byte{'x' + byte(i)}, 4096), off); err != nil {
					d.t.Fatal(err)
				}
			}
		}
		if err := dev.Flush(); err != nil {
			d.t.Fatal(err)
		}
	}
	base, snap = read(devs["base"]), read(devs["snap"])
	c.Process.Signal(syscall.SIGTERM)
	if err := c.Wait(); err != nil {
		d.t.Errorf("serve ended with %v", err)
	}
	return base, snap
}

// TestLVMDisk has LVM make a group on a disk, with a file system on an origin and its two snapshots. dmsnap reads what the kernel
// wrote, serves it, writes to origin and snapshot, and merges the snapshot beside the other one, all inside the disk. After
// each LVM activates the group again.
func TestLVMDisk(t *testing.T) {
	v := newVolumes(t, "8m", "4m")
	dir, err := os.MkdirTemp("", "lvmdisk-") // short: there will be a socket in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &wholeDisk{v, dir, filepath.Join(dir, "vm.img")}
	d.lvm("lvremove -y vg/snap")
	d.sh("mkfs.ext4 -q -F -b 4096 -O ^has_journal /dev/mapper/vg-base && mkdir -p /run/m && mount -t ext4 /dev/mapper/vg-base /run/m && " +
		"yes " + mark + " | head -c 2097152 > /run/m/data && umount /run/m")
	for _, name := range []string{"snap", "other"} {
		d.lvm("lvcreate -y -s -n " + name + " -c 4k -L 4m vg/base")
	}
	for volume, file := range map[string]string{"base": "later", "snap": "own"} {
		d.sh("mount -t ext4 /dev/mapper/vg-" + volume + " /run/m && yes " + file + " | head -c 300000 > /run/m/" + file + " && umount /run/m")
	}
	digests := map[string]string{}
	for _, volume := range []string{"base", "snap", "other"} {
		digests[volume] = d.digestOf("/dev/mapper/vg-" + volume)
	}
	seqno := d.lvm("vgs --noheadings -o vg_seqno vg")

	d.take()
	for volume, want := range digests { // written by the kernel, read by dmsnap
		out := filepath.Join(dir, volume)
		d.dmsnap("export", d.path+"#vg/"+volume, out)
		content, err := os.ReadFile(out)
		if err != nil || kernelcase.Digest(content) != want {
			t.Errorf("dmsnap reads something else of %s than the kernel (%v)", volume, err)
		}
	}
	base, snap := d.serve()
	digests["base"], digests["snap"] = kernelcase.Digest(base), kernelcase.Digest(snap)
	d.give()
	d.want("served", digests)

	d.take()
	if out := d.dmsnap("merge", d.path+"#vg/snap"); !strings.Contains(out, "other: preserved") {
		t.Errorf("merge: %s", out)
	}
	for _, volume := range []string{"snap", "other"} {
		d.dmsnap("check", d.path+"#vg/"+volume)
	}
	digests["base"] = digests["snap"]
	d.give()
	d.want("merged", digests)
	if percent := strings.TrimSpace(d.lvm("lvs --noheadings -o snap_percent vg/snap")); percent != "0.00" {
		t.Errorf("the merged snapshot is %s percent full", percent)
	}
	if now := d.lvm("vgs --noheadings -o vg_seqno vg"); now != seqno {
		t.Errorf("the metadata was changed: sequence number %s, before %s", now, seqno)
	}
	// LVM goes on with all of it.
	d.sh("mount -t ext4 /dev/mapper/vg-base /run/m && rm /run/m/own && umount /run/m")
	if got := d.digestOf("/dev/mapper/vg-snap"); got != digests["snap"] {
		t.Error("the merged snapshot, empty, does not preserve what its origin was")
	}
	// LVM is asked for a merge that has to wait for the next activation; dmsnap does it, and LVM finds it done.
	d.sh("mount -t ext4 -o ro /dev/mapper/vg-base /run/m")
	if out := d.lvm("lvconvert --merge vg/other"); !strings.Contains(out, "next activation") {
		t.Errorf("lvconvert: %s", out)
	}
	d.sh("umount /run/m")
	d.take()
	d.dmsnap("merge", d.path+"#vg/other")
	d.give()
	d.lvm("lvchange --poll y vg/base")
	left := ""
	for range 20 { // LVM looks after merges every few seconds
		if left = strings.Join(strings.Fields(d.lvm("lvs --noheadings -o lv_name vg")), " "); left == "base snap" {
			break
		}
		d.sh("sleep 1")
	}
	if left != "base snap" {
		t.Errorf("volumes after the merge that LVM was asked for: %s", left)
	}
	for volume, want := range map[string]string{"base": digests["other"], "snap": digests["snap"]} {
		if got := d.digestOf("/dev/mapper/vg-" + volume); got != want {
			t.Errorf("%s after the merge that LVM was asked for: something else", volume)
		}
	}
	tally.add(func(c *counts) { c.operations += 40; c.exchanged += 6; c.rounds++ })
}
