// Package image finds out what a disk, a partition or a file holds, by looking at the places where programs put their
// signatures: file systems, partition tables, volume managers, RAID members, disk images that are not raw, compressed
// files, and the files of dmsnap itself.
//
//	c, err := image.Probe(dev)    // what is it? c.Kind.Name is "ext4", "qcow2", "store", "zeros", ...
//	err = image.CheckRaw(dev)     // a disk's own bytes, or a container that has to be converted first?
//	err = image.CheckEmpty(dev)   // may something new be put here, with nothing lost?
//
// Guarantees: all of them only read. They look at both ends of a device, since several signatures are at its end (the second GPT,
// RAID members), read a bounded number of bytes whatever the device holds, and return no error for content that they do
// not understand. They may be called concurrently.
package image

import (
	"bytes"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/ondisk"
)

// A Kind is a kind of content of disks and files.
type Kind struct {
	Name  string // stable, for scripts: "ext4", "qcow2"
	About string // for people: "file system"
	Role  Role
}

// String returns the name and what it means.
func (k Kind) String() string { return k.Name + ", " + k.About }

// A Role is how dmsnap can use some content.
type Role uint8

const (
	Other     Role = iota
	RawDisk        // a disk's content, which can be an origin
	Container      // a disk image that is not raw
	Packed         // compressed: there may be a disk in it
	Own            // a file that dmsnap wrote
)

// A Detail is a property of the content: text, or a size.
type Detail struct {
	Name   string
	Text   string // as it is on the disk: not checked for control characters
	Bytes  uint64 // a damaged field may have any value
	IsSize bool   // Bytes counts, and Text does not
}

// The kinds that have no signature in the table, or one that is more than its magic.
var (
	Store   = Kind{"store", "dm-snapshot exception store", Own}
	Nothing = Kind{"empty", "nothing: 0 bytes", Other}
	Zeros   = Kind{"zeros", "zeros at its beginning: a blank disk, or a COW device without a store", RawDisk}
	Text    = Kind{"text", "text", Other}
	Unknown = Kind{"unknown", "none of the kinds that dmsnap knows", RawDisk}
)

// Kinds returns every kind that Probe can find.
func Kinds() []Kind {
	all := []Kind{Store, Nothing, Zeros, Text, Unknown}
	for _, s := range signatures {
		all = append(all, s.Kind)
	}
	return all
}

// Content is what Probe found.
type Content struct {
	Kind
	Details []Detail
	Off     int64 // where its magic is, in bytes; 0 where it has none
}

// headBytes is how much of the beginning is read at once. Signatures that are elsewhere are read one by one.
const headBytes = 72 << 10

// Probe identifies the content of dev. The most specific signature counts: a GPT rather than the boot sector in front
// of it. The error is that of a read.
func Probe(dev block.Device) (Content, error) {
	size := dev.Size()
	if size == 0 {
		return Content{Kind: Nothing}, nil
	}
	v, err := newView(dev)
	if err != nil {
		return Content{}, err
	}
	if ondisk.DecodeHeader(v.head).Magic == ondisk.Magic {
		return Content{Kind: Store}, nil
	}
	for _, s := range signatures {
		off := s.offset(size)
		b, err := v.bytes(off, len(s.magic))
		if err != nil {
			return Content{}, err
		}
		if string(b) != s.magic {
			continue
		}
		c := Content{Kind: s.Kind, Off: off}
		if s.details == nil {
			return c, nil
		}
		var is bool
		if c.Details, is = s.details(v.head); is {
			return c, nil
		}
	}
	begin := v.head[:min(size, headBytes)]
	switch {
	case len(bytes.Trim(begin, "\x00")) == 0:
		return Content{Kind: Zeros}, nil
	case isText(begin[:min(len(begin), 4096)]):
		return Content{Kind: Text}, nil
	}
	return Content{Kind: Unknown}, nil
}

// A NotRawError reports a file whose bytes are not those of a disk, but an image in another format.
type NotRawError struct{ Kind Kind }

func (e *NotRawError) Error() string {
	switch e.Kind.Role {
	case Container:
		return fmt.Sprintf("is a %s image (%s), not a raw disk; convert it first", e.Kind.Name, e.Kind.About)
	case Packed:
		return fmt.Sprintf("is %s (%s), not a raw disk; unpack it first", e.Kind.Name, e.Kind.About)
	}
	return fmt.Sprintf("is a %s (%s), not a raw disk", e.Kind.Name, e.Kind.About)
}

// CheckRaw returns a *NotRawError when dev is known to hold something other than the bytes of a disk: an image of
// another format, compressed data, a file of dmsnap. Unknown content is accepted. Other errors are those of reads.
func CheckRaw(dev block.Device) error {
	c, err := Probe(dev)
	if err != nil {
		return err
	}
	switch c.Role {
	case Container, Packed, Own:
		return &NotRawError{c.Kind}
	}
	return nil
}

// A view reads dev where signatures are. Bytes that dev does not have are not equal to any magic.
type view struct {
	dev  block.Device
	head []byte // headBytes, filled up with zeros
}

func newView(dev block.Device) (*view, error) {
	v := &view{dev, make([]byte, headBytes)}
	if n := min(dev.Size(), headBytes); n > 0 {
		if _, err := dev.ReadAt(v.head[:n], 0); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// bytes returns n bytes at off, or none where dev does not have them.
func (v *view) bytes(off int64, n int) ([]byte, error) {
	switch {
	case off < 0 || off > v.dev.Size()-int64(n):
		return nil, nil
	case off <= headBytes-int64(n):
		return v.head[off : off+int64(n)], nil
	}
	b := make([]byte, n)
	_, err := v.dev.ReadAt(b, off)
	return b, err
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
