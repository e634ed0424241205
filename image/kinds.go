package image

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/dmsnap/dmsnap/ondisk"
)

// A signature is a kind and the bytes that identify it.
type signature struct {
	Kind
	off   int64 // from the beginning; negative: from the end
	magic string
	// details reads properties from the first headBytes of the device, of which only the magic is certain; missing
	// fields are zeros. False: the content is not of this kind.
	details func(head []byte) (list []Detail, is bool)
	// align, where not 0, rounds the end down to a multiple before a negative off is added.
	align int64
}

// offset returns where the magic is on a device of size bytes. It is negative where that is before the beginning.
func (s signature) offset(size int64) int64 {
	switch {
	case s.off >= 0:
		return s.off
	case s.align > 0:
		return size - size%s.align + s.off
	}
	return size + s.off
}

// signatures are searched for in this order: the most specific first. A partition table may be in a sector in front of
// an LVM label, a boot sector in front of a file system. Signatures at the end may be left from an earlier use.
var signatures = concat([]signature{
	{Kind{"dump", "text of dmsnap dump", Own}, 0, "dmsnap store 1\n", nil, 0},
	{Kind{"packed-dump", "packed text of dmsnap dump", Own}, 0, "dmsnap packed store 1\n", nil, 0},
	{Kind{"undo", "undo file of dmsnap repair", Own}, 0, "dmsnap undo 1\n", nil, 0},

	{Kind{"qcow2", "disk image of qemu", Container}, 0, "QFI\xfb", qcow2, 0},
	{Kind{"qed", "disk image of qemu", Container}, 0, "QED\x00", nil, 0},
	{Kind{"vmdk", "disk image of VMware", Container}, 0, "KDMV", nil, 0},
	{Kind{"vmdk", "disk image of VMware ESX", Container}, 0, "COWD", nil, 0},
	{Kind{"vmdk", "description of a disk image of VMware", Container}, 0, "# Disk DescriptorFile", nil, 0},
	{Kind{"vhdx", "disk image of Hyper-V", Container}, 0, "vhdxfile", nil, 0},
	{Kind{"vhd", "disk image of Virtual PC", Container}, 0, "conectix", nil, 0},
	{Kind{"vhd", "disk image of Virtual PC", Container}, -512, "conectix", nil, 0},
	{Kind{"vdi", "disk image of VirtualBox", Container}, 64, "\x7f\x10\xda\xbe", nil, 0},
	{Kind{"parallels", "disk image of Parallels", Container}, 0, "WithoutFreeSpace", nil, 0},
	{Kind{"parallels", "disk image of Parallels", Container}, 0, "WithouFreSpacExt", nil, 0},
	{Kind{"dmg", "disk image of macOS", Container}, -512, "koly", nil, 0},
	{Kind{"android-sparse", "sparse disk image of Android", Container}, 0, "\x3a\xff\x26\xed", nil, 0},
	{Kind{"ewf", "disk image of EnCase", Container}, 0, "EVF\x09\x0d\x0a\xff\x00", nil, 0},

	{Kind{"luks", "encrypted disk", RawDisk}, 0, "LUKS\xba\xbe", luks, 0},
	{Kind{"bitlocker", "encrypted disk", RawDisk}, 3, "-FVE-FS-", nil, 0},
	{Kind{"lvm2-pv", "physical volume of LVM", RawDisk}, 0, "LABELONE", physicalVolume, 0},
	{Kind{"lvm2-pv", "physical volume of LVM", RawDisk}, 512, "LABELONE", physicalVolume, 0},
	{Kind{"lvm2-pv", "physical volume of LVM", RawDisk}, 1024, "LABELONE", physicalVolume, 0},
	{Kind{"lvm2-pv", "physical volume of LVM", RawDisk}, 1536, "LABELONE", physicalVolume, 0},
	{Kind{"gpt", "disk with a GPT partition table", RawDisk}, 512, "EFI PART", nil, 0},
	{Kind{"gpt", "disk of 4 KiB sectors with a GPT partition table", RawDisk}, 4096, "EFI PART", nil, 0},
	{Kind{"linux-raid", "member of a Linux RAID", RawDisk}, 0, raidMagic, nil, 0},
	{Kind{"linux-raid", "member of a Linux RAID", RawDisk}, 4096, raidMagic, nil, 0},
	{Kind{"bcache", "cached disk or cache of bcache", RawDisk}, 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", nil, 0},
	{Kind{"stratis", "disk of a Stratis pool", RawDisk}, 512 + 4, "!Stra0tis\x86\xff\x02^\x41rh", nil, 0},
	{Kind{"vdo", "disk of a VDO volume", RawDisk}, 0, "dmvdo001", nil, 0},
	{Kind{"bluestore", "disk of a Ceph OSD", RawDisk}, 0, "bluestore block device", nil, 0},
	{Kind{"oracle-asm", "disk of Oracle ASM", RawDisk}, 32, "ORCLDISK", nil, 0},

	{Kind{"ext4", "file system", RawDisk}, 1080, "\x53\xef", ext, 0},
	{Kind{"xfs", "file system", RawDisk}, 0, "XFSB", xfs, 0},
	{Kind{"btrfs", "file system", RawDisk}, 65536 + 64, "_BHRfS_M", nil, 0},
	{Kind{"bcachefs", "file system", RawDisk}, 4096 + 24, "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", nil, 0},
	{Kind{"f2fs", "file system", RawDisk}, 1024, "\x10\x20\xf5\xf2", nil, 0},
	{Kind{"erofs", "file system, read-only", RawDisk}, 1024, "\xe2\xe1\xf5\xe0", nil, 0},
	{Kind{"iso9660", "file system of optical discs", RawDisk}, 32769, "CD001", nil, 0},
	{Kind{"udf", "file system of optical discs", RawDisk}, 32769, "BEA01", nil, 0},
	{Kind{"squashfs", "file system, read-only", RawDisk}, 0, "hsqs", nil, 0},
	{Kind{"cramfs", "file system, read-only", RawDisk}, 0, "\x45\x3d\xcd\x28", nil, 0},
	{Kind{"romfs", "file system, read-only", RawDisk}, 0, "-rom1fs-", nil, 0},
	{Kind{"ntfs", "file system", RawDisk}, 3, "NTFS    ", nil, 0},
	{Kind{"refs", "file system", RawDisk}, 3, "ReFS\x00\x00\x00\x00", nil, 0},
	{Kind{"exfat", "file system", RawDisk}, 3, "EXFAT   ", nil, 0},
	{Kind{"fat", "file system", RawDisk}, 82, "FAT32   ", nil, 0},
	{Kind{"fat", "file system", RawDisk}, 54, "FAT", nil, 0},
	{Kind{"apfs", "file system", RawDisk}, 32, "NXSB", nil, 0},
	{Kind{"hfsplus", "file system", RawDisk}, 1024, "H+\x00\x04", nil, 0},
	{Kind{"hfsplus", "file system", RawDisk}, 1024, "HX\x00\x05", nil, 0},
	{Kind{"jfs", "file system", RawDisk}, 32768, "JFS1", nil, 0},
	{Kind{"reiserfs", "file system", RawDisk}, 65536 + 52, "ReIsEr", nil, 0},
	{Kind{"reiserfs", "file system", RawDisk}, 8192 + 52, "ReIsEr", nil, 0},
	{Kind{"gfs2", "file system of a cluster", RawDisk}, 65536, "\x01\x16\x19\x70", nil, 0},
	{Kind{"ocfs2", "file system of a cluster", RawDisk}, 1024, "OCFSV2", nil, 0},
	{Kind{"ocfs2", "file system of a cluster", RawDisk}, 2048, "OCFSV2", nil, 0},
	{Kind{"ocfs2", "file system of a cluster", RawDisk}, 4096, "OCFSV2", nil, 0},
	{Kind{"ocfs2", "file system of a cluster", RawDisk}, 8192, "OCFSV2", nil, 0},
	{Kind{"ufs", "file system", RawDisk}, 8192 + 1372, "\x54\x19\x01\x00", nil, 0},
	{Kind{"ufs", "file system", RawDisk}, 65536 + 1372, "\x19\x01\x54\x19", nil, 0},
	{Kind{"vmfs", "disk of VMware ESX", RawDisk}, 1 << 20, "\x0d\xd0\x01\xc0", nil, 0},
	{Kind{"vmfs", "file system of VMware ESX", RawDisk}, 2 << 20, "\x5e\xf1\xab\x2f", nil, 0},
}, swap(4096, 8192, 16384, 32768, 65536), zfs(), []signature{
	{Kind{"mbr", "disk with an MBR partition table, or a boot sector", RawDisk}, 510, "\x55\xaa", mbr, 0},
	{Kind{"apple-partitions", "disk with an Apple partition table", RawDisk}, 512, "PM\x00\x00", nil, 0},
	{Kind{"bsd-label", "disk with a BSD disk label", RawDisk}, 512, "\x57\x45\x56\x82", nil, 0},
	{Kind{"sgi-label", "disk with an SGI disk label", RawDisk}, 0, "\x0b\xe5\xa9\x41", nil, 0},

	{Kind{"gzip", "compressed data", Packed}, 0, "\x1f\x8b\x08", nil, 0},
	{Kind{"zstd", "compressed data", Packed}, 0, "\x28\xb5\x2f\xfd", nil, 0},
	{Kind{"xz", "compressed data", Packed}, 0, "\xfd7zXZ\x00", nil, 0},
	{Kind{"lz4", "compressed data", Packed}, 0, "\x04\x22\x4d\x18", nil, 0},
	{Kind{"bzip2", "compressed data", Packed}, 0, "BZh", nil, 0},
	{Kind{"lzop", "compressed data", Packed}, 0, "\x89LZO\x00\x0d\x0a\x1a\x0a", nil, 0},
	{Kind{"zip", "archive", Packed}, 0, "PK\x03\x04", nil, 0},
	{Kind{"7z", "archive", Packed}, 0, "7z\xbc\xaf\x27\x1c", nil, 0},
	{Kind{"rar", "archive", Packed}, 0, "Rar!\x1a\x07", nil, 0},
	{Kind{"tar", "archive", Packed}, 257, "ustar", nil, 0},

	// What is left of a disk whose beginning was overwritten, and members of RAIDs that keep their records at the end.
	{Kind{"luks", "encrypted disk, its second header", RawDisk}, 16 << 10, "SKUL\xba\xbe", nil, 0},
	{Kind{"gpt", "disk whose second GPT partition table is left", RawDisk}, -512, "EFI PART", nil, 0},
	{Kind{"gpt", "disk of 4 KiB sectors whose second GPT partition table is left", RawDisk}, -4096, "EFI PART", nil, 0},
	{Kind{"btrfs", "file system, its second superblock", RawDisk}, 64<<20 + 64, "_BHRfS_M", nil, 0},
	{Kind{"linux-raid", "member of a Linux RAID", RawDisk}, -8192, raidMagic, nil, 4096},
	{Kind{"linux-raid", "member of a Linux RAID", RawDisk}, -65536, raidMagic, nil, 65536},
	{Kind{"intel-raid", "member of an Intel RAID", RawDisk}, -1024, "Intel Raid ISM Cfg Sig. ", nil, 0},
	{Kind{"ddf-raid", "member of a DDF RAID", RawDisk}, -512, "\xde\x11\xde\x11", nil, 0},
	{Kind{"lsi-raid", "member of an LSI RAID", RawDisk}, -512, "$XIDE$", nil, 0},
	{Kind{"nvidia-raid", "member of an NVIDIA RAID", RawDisk}, -1024, "NVIDIA", nil, 0},
}, promise(63, 255, 256, 16, 399, 591, 675, 735, 911, 974, 991, 951, 3087))

const raidMagic = "\xfc\x4e\x2b\xa9"

func concat(lists ...[]signature) (all []signature) {
	for _, l := range lists {
		all = append(all, l...)
	}
	return all
}

// swap returns the signatures at the end of the first page, for these page sizes: swap space, and hibernation images in
// it.
func swap(pages ...int64) (all []signature) {
	for _, page := range pages {
		for _, magic := range []string{"SWAPSPACE2", "SWAP-SPACE", "S1SUSPEND\x00", "S2SUSPEND\x00", "ULSUSPEND\x00", "LINHIB0001"} {
			all = append(all, signature{Kind{"swap", "swap space", RawDisk}, page - 10, magic, nil, 0})
		}
	}
	return all
}

// zfs returns the signatures of the uberblocks in the first label of a ZFS disk. Slots are 1 KiB or larger, and any of
// them may be in use; those at multiples of 4 KiB are read.
func zfs() (all []signature) {
	for off := int64(128 << 10); off < 256<<10; off += 4096 {
		for _, magic := range []string{"\x0c\xb1\xba\x00\x00\x00\x00\x00", "\x00\x00\x00\x00\x00\xba\xb1\x0c"} {
			all = append(all, signature{Kind{"zfs", "disk of a ZFS pool", RawDisk}, off, magic, nil, 0})
		}
	}
	return all
}

// promise returns the signatures of Promise RAID members, at these numbers of sectors before the end.
func promise(sectors ...int64) (all []signature) {
	for _, n := range sectors {
		all = append(all, signature{Kind{"promise-raid", "member of a Promise RAID", RawDisk}, -n * ondisk.SectorSize, "Promise Technology, Inc.", nil, 0})
	}
	return all
}

// label is a name in a field that is padded with zeros.
func label(b []byte) string {
	name, _, _ := bytes.Cut(b, []byte{0})
	return string(bytes.TrimSpace(name))
}

// known returns the details that are not empty.
func known(list ...Detail) (kept []Detail) {
	for _, d := range list {
		if d.Text != "" || d.IsSize {
			kept = append(kept, d)
		}
	}
	return kept
}

// sizeDetail is a size in bytes; in a damaged field it may have any value.
func sizeDetail(n uint64) Detail { return Detail{Name: "size", Bytes: n, IsSize: true} }

func qcow2(h []byte) ([]Detail, bool) {
	list := []Detail{{Name: "version", Text: fmt.Sprint(binary.BigEndian.Uint32(h[4:]))}, sizeDetail(binary.BigEndian.Uint64(h[24:]))}
	at, n := binary.BigEndian.Uint64(h[8:]), uint64(binary.BigEndian.Uint32(h[16:]))
	if at > 0 && at < headBytes && n <= 1023 && at+n <= headBytes {
		list = append(list, Detail{Name: "backing file", Text: label(h[at : at+n])})
	}
	return known(list...), true
}

func luks(h []byte) ([]Detail, bool) {
	return known(Detail{Name: "version", Text: fmt.Sprint(binary.BigEndian.Uint16(h[6:]))}, Detail{Name: "uuid", Text: label(h[168:208])}), true
}

// physicalVolume reads the label, which may be in any of the first four sectors: it contains its sector's number and
// the offset of what follows.
func physicalVolume(h []byte) ([]Detail, bool) {
	at := bytes.Index(h[:4*ondisk.SectorSize], []byte("LABELONE"))
	l := h[at : at+ondisk.SectorSize]
	if binary.LittleEndian.Uint64(l[8:]) != uint64(at/ondisk.SectorSize) || string(l[24:29]) != "LVM2 " {
		return nil, false
	}
	next := binary.LittleEndian.Uint32(l[20:])
	if next > ondisk.SectorSize-40 {
		return nil, true
	}
	return known(Detail{Name: "uuid", Text: volumeUUID(l[next : next+32])}, sizeDetail(binary.LittleEndian.Uint64(l[next+32:]))), true
}

// volumeUUID writes 32 characters as LVM prints them, or "" where they are not printable.
func volumeUUID(b []byte) string {
	for _, c := range b {
		if c <= ' ' || c >= 0x7f {
			return ""
		}
	}
	s := string(b)
	return strings.Join([]string{s[:6], s[6:10], s[10:14], s[14:18], s[18:22], s[22:26], s[26:]}, "-")
}

// ext reads the superblock of ext2, ext3 and ext4, which share their magic.
func ext(h []byte) ([]Detail, bool) {
	s := h[1024:2048]
	shift := binary.LittleEndian.Uint32(s[24:])
	compatible, incompatible := binary.LittleEndian.Uint32(s[92:]), binary.LittleEndian.Uint32(s[96:])
	blocks := uint64(binary.LittleEndian.Uint32(s[4:]))
	const journal, extents, bits64 = 4, 0x40, 0x80
	if shift > 6 || blocks == 0 { // two bytes of magic may match by chance
		return nil, false
	}
	version := "ext2"
	switch {
	case incompatible&extents != 0:
		version = "ext4"
	case compatible&journal != 0:
		version = "ext3"
	}
	if incompatible&bits64 != 0 {
		blocks |= uint64(binary.LittleEndian.Uint32(s[336:])) << 32
	}
	return known(Detail{Name: "version", Text: version}, Detail{Name: "label", Text: label(s[120:136])}, sizeDetail(min(blocks, 1<<47)<<(10+shift))), true
}

func xfs(h []byte) ([]Detail, bool) {
	size := binary.BigEndian.Uint64(h[8:])
	return known(Detail{Name: "label", Text: label(h[108:120])}, sizeDetail(min(size, 1<<47)*uint64(min(binary.BigEndian.Uint32(h[4:]), 1<<16)))), true
}

// mbr counts the partitions. Each has one of two flag values; with any other it is no table.
func mbr(h []byte) ([]Detail, bool) {
	n := 0
	for i := range 4 {
		p := h[446+16*i:]
		if p[0]&0x7f != 0 {
			return nil, true
		}
		if p[4] != 0 {
			n++
		}
	}
	return known(Detail{Name: "partitions", Text: fmt.Sprint(n)}), true
}
