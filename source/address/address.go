// Package address opens disks by addresses, which may name a part of a disk.
//
//	a, err := address.Parse("vm.img#vg0/root")
//	disk, err := address.OpenDisk(a, block.Options{}, "/sys") // disk.Dev is the volume, of a snapshot its origin
//
//	PATH                      a file or a block device
//	PATH#pN                   partition N, numbered as in Linux
//	PATH#VG/LV                a logical volume as it is when it is active; of a snapshot its content
//	PATH#VG/LV:real           an origin without its snapshots
//	PATH#VG/LV:cow            the COW volume of a snapshot
//	PATH#VGUUID/LV            where two groups have the same name
//
// The last # is the separator; if a file with the whole name exists, the address is that file.
//
// Guarantees: the whole file is locked. A device for a part of a disk never writes outside of it. Devices do not own the
// underlying file, except a Disk that OpenDisk opened.
package address

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/source/lvm"
	"github.com/dmsnap/dmsnap/source/partition"
)

// An Address is an address, parsed.
type Address struct {
	Path      string
	Partition int    // 0: none
	Group     string // name or UUID; empty: none
	Volume    string
	Layer     lvm.Layer
}

// Parse parses an address. A name of a file that exists is the address of that file whatever is in it.
func Parse(s string) (Address, error) {
	i := strings.LastIndexByte(s, '#')
	if i < 0 {
		return Address{Path: s}, nil
	}
	if _, err := os.Lstat(s); err == nil {
		return Address{Path: s}, nil
	}
	a, part := Address{Path: s[:i]}, s[i+1:]
	malformed := func(what string) (Address, error) {
		return Address{}, fmt.Errorf("address %q: %s", s, what)
	}
	if a.Path == "" {
		return malformed("no path in front of #")
	}
	if group, volume, is := strings.Cut(part, "/"); is {
		a.Group, a.Volume = group, volume
		if name, layer, is := strings.Cut(volume, ":"); is {
			a.Volume, a.Layer = name, lvm.Layer(layer)
			if a.Layer != lvm.Real && a.Layer != lvm.COW {
				return malformed(fmt.Sprintf("there is no layer %q: only real and cow", layer))
			}
		}
		if a.Group == "" || a.Volume == "" || strings.Contains(a.Volume, "/") {
			return malformed("VG/LV must follow #")
		}
		return a, nil
	}
	number, is := strings.CutPrefix(part, "p")
	n, err := strconv.ParseUint(number, 10, 16)
	if !is || err != nil || n == 0 || number[0] == '0' {
		return malformed("pN or VG/LV must follow #, and no file has this name")
	}
	a.Partition = int(n)
	return a, nil
}

// Plain reports whether a is the whole of a file or device.
func (a Address) Plain() bool { return a.Partition == 0 && a.Group == "" }

// String is the address as text.
func (a Address) String() string {
	switch {
	case a.Partition != 0:
		return fmt.Sprintf("%s#p%d", a.Path, a.Partition)
	case a.Group == "":
		return a.Path
	case a.Layer != lvm.Active:
		return fmt.Sprintf("%s#%s/%s:%s", a.Path, a.Group, a.Volume, a.Layer)
	}
	return fmt.Sprintf("%s#%s/%s", a.Path, a.Group, a.Volume)
}

// Beside returns the address of a layer of another volume of the group.
func (a Address) Beside(volume string, layer lvm.Layer) Address {
	a.Volume, a.Layer = volume, layer
	return a
}

// Store returns the address for a use that needs an exception store: of a snapshot volume, its COW volume.
func (a Address) Store() Address {
	if a.MayBeSnapshot() {
		a.Layer = lvm.COW
	}
	return a
}

// A Disk is what an address names, for serving and merging: of a volume with snapshots and of a snapshot the origin below,
// with all its snapshots. Its file is open and locked as a whole: it has one writer, whichever of its addresses is open.
type Disk struct {
	Address  Address
	File     *block.File
	Dev      block.Device // it follows File when that becomes writable, or read-only
	Volume   *lvm.Origin  // of a logical volume, or nil
	Snapshot string       // the snapshot that the address names; empty: none
}

// Close closes the file.
func (d *Disk) Close() error { return d.File.Close() }

// OpenDisk opens an address that may be written, with these options of its file. A volume whose group is active on this host is
// refused (lvm.ErrActive), and so is a COW volume. sysfs is where that file system is mounted. Further disks, whose owner is the caller, may hold
// physical volumes of the group. Errors name the address.
func OpenDisk(a Address, o block.Options, sysfs string, further ...lvm.Disk) (*Disk, error) {
	f, err := block.Open(a.Path, o)
	if err != nil {
		return nil, block.WithPath(a.Path, err)
	}
	var d *Disk
	if !a.Plain() {
		err = block.WithPath(a.String(), image.CheckRaw(f))
	}
	if err == nil {
		d, err = openDiskOn(a, f, sysfs, further)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	d.File = f
	return d, nil
}

// OpenDiskOn is OpenDisk on a disk that is open, the device at a.Path, or a [Spread]. The Disk has no File: the caller closes the disk after its
// last use.
func OpenDiskOn(a Address, disk block.Device, sysfs string) (*Disk, error) {
	var further []lvm.Disk
	if s, ok := disk.(Spread); ok {
		further = s.FurtherPVs()
	}
	return openDiskOn(a, disk, sysfs, further)
}

// A Spread is a disk that comes with further disks, which may hold physical volumes of its groups.
type Spread interface{ FurtherPVs() []lvm.Disk }

func openDiskOn(a Address, disk block.Device, sysfs string, further []lvm.Disk) (*Disk, error) {
	d := &Disk{Address: a, Dev: disk}
	if err := d.open(sysfs, further); err != nil {
		return nil, block.WithPath(a.String(), err)
	}
	return d, nil
}

// open replaces d.Dev, the whole disk, by what the address names.
func (d *Disk) open(sysfs string, further []lvm.Disk) (err error) {
	a := d.Address
	if a.Plain() {
		return nil
	}
	if a.Partition != 0 {
		d.Dev, err = open(a, d.Dev, nil)
		return err
	}
	v, err := volume(a, d.Dev, further)
	if err != nil {
		return err
	}
	if err := v.Group.CheckInactive(sysfs); err != nil {
		return err
	}
	if a.Layer == lvm.COW {
		return errors.New("a COW volume is no disk")
	}
	if d.Volume, err = v.OpenOrigin(); err != nil {
		return err
	}
	d.Dev = d.Volume.Dev
	if d.Volume.Volume != v {
		d.Snapshot = v.Name
	}
	return nil
}

// Open returns what a names on disk, the device at a.Path. Further disks may hold physical volumes of the group. An error
// names the address.
func Open(a Address, disk block.Device, further ...lvm.Disk) (block.Device, error) {
	dev, err := open(a, disk, further)
	return dev, block.WithPath(a.String(), err)
}

func open(a Address, disk block.Device, further []lvm.Disk) (block.Device, error) {
	if a.Partition != 0 {
		table, err := partition.Read(disk, 0)
		if err != nil {
			return nil, err
		}
		return table.Open(a.Partition)
	}
	if a.Group == "" {
		return disk, nil
	}
	v, err := volume(a, disk, further)
	if err != nil {
		return nil, err
	}
	return v.Open(a.Layer)
}

// CheckInactive returns an error that wraps lvm.ErrActive where a names a volume of a group that is active on this host. sysfs is
// where that file system is mounted; the disks are those of Open.
func CheckInactive(a Address, sysfs string, disk block.Device, further ...lvm.Disk) error {
	if a.Group == "" {
		return nil
	}
	v, err := volume(a, disk, further)
	if err == nil {
		err = v.Group.CheckInactive(sysfs)
	}
	return block.WithPath(a.String(), err)
}

// volume finds the volume that a names.
func volume(a Address, disk block.Device, further []lvm.Disk) (*lvm.Volume, error) {
	set, err := lvm.Scan(append([]lvm.Disk{{Name: a.Path, Dev: disk}}, further...), 0)
	if err != nil {
		return nil, err
	}
	group, err := set.Group(a.Group)
	if err != nil {
		return nil, err
	}
	return group.Volume(a.Volume)
}

// SnapshotParts is what a snapshot volume is made of, for reading.
type SnapshotParts struct {
	Origin block.Device // the part of its origin that it shows
	COW    block.Device
	Volume *lvm.Volume
}

// OpenSnapshotParts opens what the snapshot volume that a names is made of. Disks and errors are as for Open; a may be any address:
// lvm.ErrNoSnapshot.
func OpenSnapshotParts(a Address, disk block.Device, further ...lvm.Disk) (b SnapshotParts, err error) {
	err = lvm.ErrNoSnapshot
	if a.MayBeSnapshot() {
		if b.Volume, err = volume(a, disk, further); err == nil {
			b.Origin, b.COW, err = b.Volume.OpenSnapshotParts()
		}
	}
	return b, block.WithPath(a.String(), err)
}

// MayBeSnapshot reports whether a has the form of the address of a snapshot volume.
func (a Address) MayBeSnapshot() bool { return a.Group != "" && a.Layer == lvm.Active }
