package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// A kind is something that disks and files can hold, known by bytes at a fixed place.
type kind struct {
	name  string // stable, for scripts
	about string
	off   int
	magic string
	role  role
	// details says more from the first headBytes of the file, of which only the magic is certain; a
	// field that is not there reads as zeros. False: it is no such thing after all.
	details func(head []byte) (list []detail, is bool)
}

// A role is what something can be to dmsnap.
type role uint8

const (
	otherRole  role = iota
	diskRole        // a disk's content, which can be an origin
	imageRole       // a disk image that is not raw
	packedRole      // compressed: there may be a disk in it
	ownRole         // a file that dmsnap wrote
)

// A detail is a figure of a kind, as text.
type detail struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// headBytes is how much of a file is looked at: the farthest magic is that of btrfs, at 64 KiB.
const headBytes = 72 << 10

// kinds are looked for in this order: what says more comes first. A partition table may stand in a sector in front
// of an LVM label, a boot sector in front of a file system.
var kinds = []kind{
	{"dump", "text of dmsnap dump", 0, "dmsnap store 1\n", ownRole, nil},
	{"packed-dump", "packed text of dmsnap dump", 0, "dmsnap packed store 1\n", ownRole, nil},
	{"undo", "undo file of dmsnap repair", 0, "dmsnap undo 1\n", ownRole, nil},
	{"qcow2", "disk image of qemu", 0, "QFI\xfb", imageRole, qcow2},
	{"qed", "disk image of qemu", 0, "QED\x00", imageRole, nil},
	{"vmdk", "disk image of VMware", 0, "KDMV", imageRole, nil},
	{"vmdk", "description of a disk image of VMware", 0, "# Disk DescriptorFile", imageRole, nil},
	{"vhdx", "disk image of Hyper-V", 0, "vhdxfile", imageRole, nil},
	{"vhd", "disk image of Virtual PC", 0, "conectix", imageRole, nil},
	{"vdi", "disk image of VirtualBox", 64, "\x7f\x10\xda\xbe", imageRole, nil},
	{"luks", "encrypted disk", 0, "LUKS\xba\xbe", diskRole, luks},
	{"lvm2-pv", "physical volume of LVM", 0, "LABELONE", diskRole, physicalVolume},
	{"lvm2-pv", "physical volume of LVM", 512, "LABELONE", diskRole, physicalVolume},
	{"lvm2-pv", "physical volume of LVM", 1024, "LABELONE", diskRole, physicalVolume},
	{"lvm2-pv", "physical volume of LVM", 1536, "LABELONE", diskRole, physicalVolume},
	{"gpt", "disk with a GPT partition table", 512, "EFI PART", diskRole, nil},
	{"gpt", "disk of 4 KiB sectors with a GPT partition table", 4096, "EFI PART", diskRole, nil},
	{"ext4", "file system", 1080, "\x53\xef", diskRole, ext},
	{"xfs", "file system", 0, "XFSB", diskRole, xfs},
	{"btrfs", "file system", 65600, "_BHRfS_M", diskRole, nil},
	{"iso9660", "file system of optical discs", 32769, "CD001", diskRole, nil},
	{"squashfs", "file system, read-only", 0, "hsqs", diskRole, nil},
	{"ntfs", "file system", 3, "NTFS    ", diskRole, nil},
	{"exfat", "file system", 3, "EXFAT   ", diskRole, nil},
	{"fat", "file system", 82, "FAT32   ", diskRole, nil},
	{"fat", "file system", 54, "FAT", diskRole, nil},
	{"swap", "swap space", 4086, "SWAPSPACE2", diskRole, nil},
	{"mbr", "disk with an MBR partition table, or a boot sector", 510, "\x55\xaa", diskRole, mbr},
	{"gzip", "compressed data", 0, "\x1f\x8b\x08", packedRole, nil},
	{"zstd", "compressed data", 0, "\x28\xb5\x2f\xfd", packedRole, nil},
	{"xz", "compressed data", 0, "\xfd7zXZ\x00", packedRole, nil},
	{"lz4", "compressed data", 0, "\x04\x22\x4d\x18", packedRole, nil},
	{"bzip2", "compressed data", 0, "BZh", packedRole, nil},
	{"zip", "archive", 0, "PK\x03\x04", otherRole, nil},
}

// The kinds that have no magic.
var (
	storeKind   = kind{name: "store", about: "dm-snapshot exception store"}
	emptyKind   = kind{name: "empty", about: "nothing: 0 bytes"}
	zerosKind   = kind{name: "zeros", about: "zeros at its beginning: a blank disk, or a COW device without a store", role: diskRole}
	textKind    = kind{name: "text", about: "text"}
	unknownKind = kind{name: "unknown", about: "none of the kinds that dmsnap knows", role: diskRole}
)

// readHead reads what kindOf looks at; a short file is filled up with zeros.
func readHead(dev block.Device) (head []byte, err error) {
	head = make([]byte, headBytes)
	if n := min(dev.Size(), headBytes); n > 0 {
		_, err = dev.ReadAt(head[:n], 0)
	}
	return head, err
}

// kindOf recognises the first headBytes of a file of size bytes.
func kindOf(head []byte, size int64) (kind, []detail) {
	if size == 0 {
		return emptyKind, nil
	}
	if ondisk.DecodeHeader(head).Magic == ondisk.Magic {
		return storeKind, nil
	}
	for _, k := range kinds {
		if !bytes.HasPrefix(head[k.off:], []byte(k.magic)) {
			continue
		}
		if k.details == nil {
			return k, nil
		}
		if list, is := k.details(head); is {
			return k, list
		}
	}
	begin := head[:min(size, headBytes)]
	switch {
	case len(bytes.Trim(begin, "\x00")) == 0:
		return zerosKind, nil
	case isText(begin[:min(len(begin), 4096)]):
		return textKind, nil
	}
	return unknownKind, nil
}

// isText reports whether b, which may end within a character, is text.
func isText(b []byte) bool {
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		if r == utf8.RuneError && n == 1 && utf8.FullRune(b) || r < ' ' && !strings.ContainsRune("\t\n\v\f\r\x1b", r) || r == 0x7f {
			return false
		}
		b = b[n:]
	}
	return true
}

// label is a name in a field that zeros fill up.
func label(b []byte) string {
	name, _, _ := bytes.Cut(b, []byte{0})
	return printable(string(bytes.TrimSpace(name)))
}

// known leaves out what is empty.
func known(list ...detail) (kept []detail) {
	for _, d := range list {
		if d.Value != "" {
			kept = append(kept, d)
		}
	}
	return kept
}

// sizeDetail says a number of bytes, which a damaged field may have at anything.
func sizeDetail(n uint64) detail {
	if n >= 1<<63 {
		return detail{"size", fmt.Sprintf("%d bytes", n)}
	}
	return detail{"size", bytesText(int64(n))}
}

func qcow2(h []byte) ([]detail, bool) {
	list := []detail{{"version", fmt.Sprint(binary.BigEndian.Uint32(h[4:]))}, sizeDetail(binary.BigEndian.Uint64(h[24:]))}
	at, n := binary.BigEndian.Uint64(h[8:]), uint64(binary.BigEndian.Uint32(h[16:]))
	if at > 0 && at < headBytes && n <= 1023 && at+n <= headBytes {
		list = append(list, detail{"backing file", label(h[at : at+n])})
	}
	return known(list...), true
}

func luks(h []byte) ([]detail, bool) {
	return known(detail{"version", fmt.Sprint(binary.BigEndian.Uint16(h[6:]))}, detail{"uuid", label(h[168:208])}), true
}

// physicalVolume reads the label, which may be in any of the first four sectors: its sector's number and the
// offset of what follows stand in it.
func physicalVolume(h []byte) ([]detail, bool) {
	at := bytes.Index(h[:4*ondisk.SectorSize], []byte("LABELONE"))
	l := h[at : at+ondisk.SectorSize]
	if binary.LittleEndian.Uint64(l[8:]) != uint64(at/ondisk.SectorSize) || string(l[24:29]) != "LVM2 " {
		return nil, false
	}
	next := binary.LittleEndian.Uint32(l[20:])
	if next > ondisk.SectorSize-40 {
		return nil, true
	}
	return known(detail{"uuid", volumeUUID(l[next : next+32])}, sizeDetail(binary.LittleEndian.Uint64(l[next+32:]))), true
}

// volumeUUID writes 32 characters as LVM prints them, or "" when they aren't any.
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
func ext(h []byte) ([]detail, bool) {
	s := h[1024:2048]
	shift := binary.LittleEndian.Uint32(s[24:])
	compatible, incompatible := binary.LittleEndian.Uint32(s[92:]), binary.LittleEndian.Uint32(s[96:])
	blocks := uint64(binary.LittleEndian.Uint32(s[4:]))
	const journal, extents, bits64 = 4, 0x40, 0x80
	if shift > 6 || blocks == 0 { // two bytes are soon met by chance
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
	return known(detail{"version", version}, detail{"label", label(s[120:136])}, sizeDetail(min(blocks, 1<<47)<<(10+shift))), true
}

func xfs(h []byte) ([]detail, bool) {
	size := binary.BigEndian.Uint64(h[8:])
	return known(detail{"label", label(h[108:120])}, sizeDetail(min(size, 1<<47)*uint64(min(binary.BigEndian.Uint32(h[4:]), 1<<16)))), true
}

// mbr counts the partitions. Each has one of two flags; anything else there is no table.
func mbr(h []byte) ([]detail, bool) {
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
	return known(detail{"partitions", fmt.Sprint(n)}), true
}
