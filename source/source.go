// Package source opens disks by name, wherever they are: raw and qcow2 images, block devices, exports of NBD servers, disks in
// registries, object stores and web servers, and partitions and logical volumes in any of them.
//
//	d, err := source.Open("debian.qcow2", source.Options{ReadOnly: true})
//	d, err := source.Open("vm.img#vg0/root", source.Options{ReadOnly: true})
//	d, err := source.Open("nbd://backup/vm1#p2", source.Options{ReadOnly: true})
//	d, err := source.Open("oci://registry.example/golden/debian:13", source.Options{ReadOnly: true})
//
// A name is an address of package source/address whose path may be an NBD URI or a reference of package source/remote. A
// [Disk] is a block.Device and a cowfile.Origin.
//
// # Guarantees
//
//   - Methods of a Disk may be called concurrently, Close after the last of them.
//   - Raw files and block devices are opened for writing too; qcow2 images and NBD exports are only read
//     (cowfile.ErrOnlyRead).
//   - What a disk names itself (backing files, data files) is opened only as far as Options say.
//   - Locks are those of package block, on every file that is open (docs/decisions/0001-locks.md).
package source

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/source/address"
	"github.com/dmsnap/dmsnap/source/lvm"
	"github.com/dmsnap/dmsnap/source/ondemand"
	"github.com/dmsnap/dmsnap/source/qcow2"
	"github.com/dmsnap/dmsnap/source/remote"
	"github.com/dmsnap/dmsnap/store"
)

// QCOW2 is the format of a disk in a qcow2 image.
const QCOW2 = "qcow2"

// A FormatError reports a disk that was taken for one of a format and can't be opened so.
type FormatError struct {
	Format string
	Err    error
}

func (e *FormatError) Error() string { return e.Format + " image: " + e.Err.Error() }

func (e *FormatError) Unwrap() error { return e.Err }

// Options say how a disk is opened. The zero value opens for writing; see block.Options.
type Options struct {
	ReadOnly bool
	Lock     block.LockMode
	Used     bool

	// Raw: the bytes of the file or export are the disk, whatever they look like.
	Raw bool
	// Format is that of the disk, as the label of a store records it; empty: it is found out. With ondisk.RawFormat, the
	// signature of a qcow2 image is content: a guest can write it.
	Format string

	// Follow opens the backing files that qcow2 images name; see qcow2.FileOptions.
	Follow bool
	// BackingFile and DataFile are the paths of the qcow2 image's backing file and external data file.
	BackingFile, DataFile string

	// PVs are the names of further disks with physical volumes of the volume group.
	PVs []string
	// SysFS is where sysfs is mounted, which says which volume groups are active on this host; empty: /sys. Their volumes are
	// refused (lvm.ErrActive) unless Lock is block.LockShared.
	SysFS string

	// Incomplete: a store is opened with its origin also where a merge into that is not complete and the store shows a mixture
	// (merge.ErrMixture), for programs that complete the merge or rescue what can be read: Warn is called then.
	Incomplete bool

	NBD    NBDOptions
	Remote RemoteOptions

	// Warn, where it is not nil, is called with what must be known of a disk that is opened. It names the disk.
	Warn func(text string)
}

// NBDOptions say how NBD exports are opened.
type NBDOptions struct {
	// Reconnect is how long a lost connection is tried to be replaced. 0: it is an error.
	Reconnect time.Duration
	// TLS is for URIs that ask for TLS; see nbd.DialTLS.
	TLS *tls.Config
	// Timeout bounds how long a server may send nothing while requests are in flight; the connection is lost then. It bounds
	// the first connection, too. 0: 30 s.
	Timeout time.Duration
}

// Guarantees: a Disk is an open disk.
type Disk struct {
	block.Forward // to what was asked for
	name          string
	format        string
	bottom        *block.File   // nil: an NBD export
	files         []*block.File // all that are open
	pvs           []*Disk
	further       []lvm.Disk // the same
	closers       []io.Closer
	fetched       *ondemand.Disk // that the disk is in; nil: none
	plain         bool           // it is the whole of a file, an export or such a disk
	onlyRead      string         // why it can't be written to; empty: it can
}

var _ cowfile.Origin = (*Disk)(nil)

// Open opens a disk. The error names it.
func Open(name string, o Options) (*Disk, error) {
	a, err := address.Parse(name)
	if err != nil {
		return nil, err
	}
	return open(a, o)
}

// OpenStore opens a device that holds a store: the COW volume of an address that names a snapshot volume. A file or export
// that is addressed as a whole is not looked at.
func OpenStore(name string, o Options) (*Disk, error) {
	a, err := address.Parse(name)
	if err != nil {
		return nil, err
	}
	if a = a.Store(); a.Plain() {
		o.Raw = true
	}
	return open(a, o)
}

// OpenOrigin is Open for the origin of a store. Its size must be a whole number of sectors.
func OpenOrigin(name string, o Options) (*Disk, error) {
	d, err := Open(name, o)
	if err != nil {
		return nil, err
	}
	if err := cowfile.CheckSize(d); err != nil {
		d.Close()
		return nil, block.WithPath(name, err)
	}
	return d, nil
}

// OpenPair opens an origin in the format that a store records, and the device that holds the store. Where that shows a mixture they are refused
// (merge.ErrMixture), see Options.Incomplete.
func OpenPair(originName, cowName string, o Options) (origin, cow *Disk, err error) {
	if origin, err = OpenOriginOf(originName, cowName, o); err != nil {
		return nil, nil, err
	}
	if cow, err = OpenStore(cowName, o); err != nil {
		origin.Close()
		return nil, nil, err
	}
	if err = cowfile.CheckStore(cowName, cow); err == nil && !o.Raw { // it may be another one by now
		err = CheckFormat(origin, cowName, cow)
	}
	if err == nil {
		err = o.checkComplete(originName, cow)
	}
	if err != nil {
		cow.Close()
		origin.Close()
		return nil, nil, err
	}
	return origin, cow, nil
}

// CheckComplete is merge.CheckOrigin for the origin that a name stands for. What is no file here has no side file.
func CheckComplete(name string, cows ...block.Device) error {
	a, err := address.Parse(name)
	if err != nil || isURI(a.Path) {
		return err
	}
	return merge.CheckOrigin(a.Path, cows...)
}

// checkComplete is CheckComplete unless o says otherwise.
func (o Options) checkComplete(name string, cows ...block.Device) error {
	err := CheckComplete(name, cows...)
	if o.Incomplete && errors.Is(err, merge.ErrMixture) {
		if o.Warn != nil {
			o.Warn(err.Error())
		}
		return nil
	}
	return err
}

// OpenOriginOf is OpenOrigin in the format that the label of a store records: ondisk.RawFormat without a label, and also
// where there is no store. Of a part of a disk a store without a label says nothing: LVM and the kernel make such stores whatever
// the format of the disk is. The store must be on another disk.
func OpenOriginOf(originName, cowName string, o Options) (*Disk, error) {
	err := CheckDifferent(originName, cowName)
	if err == nil {
		o.Format, err = formatFor(cowName, o)
	}
	if err != nil {
		return nil, err
	}
	if isPart(originName) && o.Format == ondisk.RawFormat {
		o.Format = ""
	}
	return OpenOrigin(originName, o)
}

// FormatOf is cowfile.FormatOf for the stores of an origin with this name. Of a part of a disk, stores without a label say
// nothing.
func FormatOf(originName string, cowPaths ...string) (string, error) {
	format, err := cowfile.FormatOf(cowPaths...)
	if isPart(originName) && format == ondisk.RawFormat {
		format = ""
	}
	return format, err
}

// CheckFormat is cowfile.CheckFormat; the error names the store.
func CheckFormat(origin *Disk, cowName string, cow block.Device) error {
	return block.WithPath(cowName, cowfile.CheckFormat(origin, cow, isPart(origin.name)))
}

// formatFor returns what the label of a store records.
func formatFor(cowName string, o Options) (string, error) {
	o.ReadOnly, o.Lock = true, block.LockNone
	cow, err := OpenStore(cowName, o)
	if err != nil {
		return "", err
	}
	defer cow.Close()
	if cow.Size() < ondisk.SectorSize {
		return ondisk.RawFormat, nil
	}
	format, err := store.OriginFormat(cow)
	return format, block.WithPath(cowName, err)
}

// OpenWhole opens a file or a block device that is going to be changed in place. Parts of disks are refused.
func OpenWhole(path string, o block.Options) (*block.File, error) {
	switch {
	case isPart(path):
		return nil, fmt.Errorf("%s: a part of a disk can't be changed in place; a file or a block device as a whole is required", path)
	case isURI(path):
		return nil, fmt.Errorf("%s: %s: a file or a block device is required", path, kindOfURI(path))
	}
	return cowfile.OpenDevice(path, o)
}

// The kinds of disks that are only read.
const (
	exportKind  = "an NBD export"
	fetchedKind = "a disk on another host"
	imageKind   = "a qcow2 image"
)

func kindOfURI(path string) string {
	if isRemote(path) {
		return fetchedKind
	}
	return exportKind
}

// Opener returns a function that opens origins as o says.
func Opener(o Options) cowfile.Opener {
	return func(name string, oo cowfile.OriginOptions) (cowfile.Origin, error) {
		o := o
		o.ReadOnly, o.Lock, o.Used, o.Raw, o.Format = oo.ReadOnly, oo.Lock, oo.Used, oo.Raw, oo.Format
		d, err := Open(name, o)
		if err != nil {
			return nil, err
		}
		if a, err := address.Parse(name); err == nil && a.Plain() { // a server opens the parts of it
			if err := d.openPVs(o); err != nil {
				return nil, errors.Join(err, d.Close())
			}
		}
		return d, nil
	}
}

// isRemote reports whether a path is a URI of a disk that is fetched as it is read.
func isRemote(path string) bool {
	return isURI(path) && (remote.IsReference(path) || remote.IsFile(path))
}

func open(a address.Address, o Options) (*Disk, error) {
	d := &Disk{name: a.String(), plain: a.Plain()}
	whole, err := d.openWhole(a.Path, o)
	if err == nil && !a.Plain() {
		whole, err = d.openPart(a, whole, o)
	}
	if err == nil && !o.ReadOnly && d.onlyRead != "" {
		err = fmt.Errorf("%s: %s: %w", a, d.onlyRead, cowfile.ErrOnlyRead)
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	d.Forward = block.NewForward(whole)
	return d, nil
}

// openPart opens what a names on a disk.
func (d *Disk) openPart(a address.Address, whole block.Device, o Options) (block.Device, error) {
	if err := d.openPVs(o); err != nil {
		return nil, err
	}
	if err := d.checkUnused(a, whole, o); err != nil {
		return nil, err
	}
	return address.Open(a, whole, d.further...)
}

// checkUnused refuses disks that the kernel uses itself, and a volume whose group is active on this host, unless o has
// block.LockShared.
func (d *Disk) checkUnused(a address.Address, whole block.Device, o Options) error {
	if o.Lock == block.LockShared {
		return nil
	}
	if err := d.CheckUnused(); err != nil {
		return err
	}
	return address.CheckInactive(a, cmp.Or(o.SysFS, "/sys"), whole, d.further...)
}

// openPVs opens the further disks with physical volumes.
func (d *Disk) openPVs(o Options) error {
	for _, name := range o.PVs {
		further := o
		further.PVs, further.Format = nil, ""
		pv, err := Open(name, further)
		if err != nil {
			return err
		}
		d.closers, d.pvs = append(d.closers, pv), append(d.pvs, pv)
		d.files = append(d.files, pv.files...)
		d.further = append(d.further, lvm.Disk{Name: name, Dev: pv})
	}
	return nil
}

// openWhole opens a file, a block device or an export, and what it holds.
func (d *Disk) openWhole(path string, o Options) (block.Device, error) {
	dev, err := d.openBottom(path, o)
	if err != nil {
		return nil, block.WithPath(path, err)
	}
	if d.fetched != nil && d.fetched.Description() != nil {
		d.format = ondisk.RawFormat // by definition: nothing is fetched to find it out
	} else if d.format, err = formatOf(dev, o); err != nil {
		return nil, block.WithPath(path, err)
	}
	if d.fetched != nil {
		if d.format, err = versionOf(d.fetched, d.format, o); err != nil {
			return nil, block.WithPath(path, err)
		}
	}
	if name, _ := ondisk.CutOriginVersion(d.format); name == ondisk.RawFormat {
		return dev, nil
	}
	d.onlyRead = imageKind
	beside := path
	if d.bottom == nil {
		beside = ""
	}
	// The image is opened for reading alone: its lock becomes a reader's, too.
	img, err := qcow2.OpenOn(dev, beside, qcow2.FileOptions{Follow: o.Follow, Backing: o.BackingFile, Data: o.DataFile, Lock: readLock(o.Lock)})
	if err != nil {
		return nil, block.WithPath(path, &FormatError{QCOW2, err})
	}
	d.closers = append(d.closers, img)
	d.files = append(d.files, img.Files()...)
	if img.Info().Corrupt && o.Warn != nil {
		o.Warn(fmt.Sprintf("%s: %v: a program found its tables damaged; what is read may be wrong", path, qcow2.ErrMarkedCorrupt))
	}
	return img, nil
}

// readLock is a lock for a file that is only read.
func readLock(m block.LockMode) block.LockMode {
	if m == block.LockWrite {
		return block.LockRead
	}
	return m
}

func (d *Disk) openBottom(path string, o Options) (block.Device, error) {
	if isRemote(path) {
		return d.openFetched(path, o)
	}
	if isURI(path) {
		d.onlyRead = exportKind
		r, err := OpenExport(path, o.NBD)
		if err != nil {
			return nil, err
		}
		d.closers = append(d.closers, r)
		return r, nil
	}
	f, err := cowfile.OpenDevice(path, block.Options{ReadOnly: o.ReadOnly, Lock: o.Lock, Used: o.Used})
	if err != nil {
		return nil, err
	}
	d.bottom, d.files, d.closers = f, []*block.File{f}, []io.Closer{f}
	return f, nil
}

// formatOf decides which format the bytes of a file or an export have.
func formatOf(dev block.Device, o Options) (string, error) {
	o.Format, _ = ondisk.CutOriginVersion(o.Format)
	switch {
	case o.Raw:
		return ondisk.RawFormat, nil
	case o.Format == "":
		c, err := image.Probe(dev)
		if err != nil {
			return "", err
		}
		if c.Name == QCOW2 {
			return QCOW2, nil
		}
	case o.Format == QCOW2:
		return QCOW2, nil
	case o.Format != ondisk.RawFormat:
		return "", fmt.Errorf("the store is for an origin of format %q, which is unknown", o.Format)
	}
	return ondisk.RawFormat, cowfile.OriginOptions{Format: o.Format}.CheckRaw(dev)
}
