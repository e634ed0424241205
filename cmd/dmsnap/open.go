package main

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/spf13/pflag"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/lvm"
	"github.com/dmsnap/dmsnap/source/qcow2"
	"github.com/dmsnap/dmsnap/store"
)

// about prefixes an error with the path, unless it has it.
func about(path string, err error) error { return block.WithPath(path, err) }

// An openDisk is a disk that was opened by its name.
type openDisk = *source.Disk

// diskFlags are the flags of verbs that open disks by name.
type diskFlags struct {
	raw, follow   bool
	incomplete    bool // see source.Options
	backing, data string
	certificates  string
	reconnect     time.Duration
	pvs           []string
	remote        fetchFlags
}

// addRaw adds the flag of every verb that takes an origin.
func (d *diskFlags) addRaw(f *pflag.FlagSet) {
	f.BoolVar(&d.raw, "raw", false, "use the bytes of ORIGIN as the disk, even if it looks like an image of another format")
}

// addPVs adds the flag of every verb that takes an address.
func (d *diskFlags) addPVs(f *pflag.FlagSet) {
	f.StringArrayVar(&d.pvs, "pv", nil, "of an address DISK#VG/LV: a further disk with physical volumes of the group (repeatable)")
}

// add adds all flags.
func (d *diskFlags) add(f *pflag.FlagSet) {
	d.addRaw(f)
	d.addOpening(f)
}

// addOpening adds those that say what is opened to read a disk.
func (d *diskFlags) addOpening(f *pflag.FlagSet) {
	d.addPVs(f)
	f.StringVar(&d.backing, "backing-file", "", "open this file as the backing file of the qcow2 image, whatever the image names")
	f.StringVar(&d.data, "data-file", "", "open this file as the external data file of the qcow2 image")
	d.remote.addPrefetch(f)
	d.addRemote(f)
}

// addRemote adds the flags that are about any number of disks: what images name, and NBD servers.
func (d *diskFlags) addRemote(f *pflag.FlagSet) {
	f.BoolVar(&d.follow, "follow-backing", false, "open the backing files that a qcow2 image names: relative names, below the image's folder")
	f.DurationVar(&d.reconnect, "reconnect", 0, "of an NBD URI: try for this long to replace a lost connection, e.g. 30s (default: the loss is an error)")
	d.remote.add(f)
	f.StringVar(&d.certificates, "nbd-certificates", "", "of an nbds URI: folder with ca-cert.pem and, if the server requires a certificate, client-cert.pem and client-key.pem")
}

// options are those of package source.
func (d *diskFlags) options(o block.Options) (source.Options, error) {
	s := source.Options{ReadOnly: o.ReadOnly, Lock: o.Lock, Used: o.Used, Raw: d.raw, Follow: d.follow, BackingFile: d.backing,
		DataFile: d.data, PVs: d.pvs, Incomplete: d.incomplete, NBD: source.NBDOptions{Reconnect: d.reconnect},
		Warn: func(about string) { fmt.Fprintf(os.Stderr, "dmsnap: warning: %s\n", text.WithoutSecrets(about)) }}
	s.Remote = d.remote.options(s.Warn)
	var err error
	if d.certificates != "" {
		s.NBD.TLS, err = source.LoadTLS(d.certificates)
	}
	return s, err
}

// open opens a disk; the error names it.
func (d *diskFlags) open(name string, o block.Options) (openDisk, error) {
	s, err := d.options(o)
	if err != nil {
		return nil, err
	}
	disk, err := source.Open(name, s)
	return disk, advise(err)
}

// openOrigin opens the origin of the store on cowName, in the format that the store records.
func (d *diskFlags) openOrigin(name, cowName string, o block.Options) (openDisk, error) {
	s, err := d.options(o)
	if err != nil {
		return nil, err
	}
	disk, err := source.OpenOriginOf(name, cowName, s)
	return disk, advise(err)
}

// openStore opens a device that holds a store: of a snapshot volume its COW volume. The error names it.
func (d *diskFlags) openStore(name string, o block.Options) (openDisk, error) {
	s, err := d.options(o)
	if err != nil {
		return nil, err
	}
	disk, err := source.OpenStore(name, s)
	return disk, advise(err)
}

// openSides opens an origin and one or two stores, or snapshot volumes, for a verb that has --live-read.
func (d *diskFlags) openSides(names []string, live bool) (*source.Sides, error) {
	s, err := d.options(block.Options{Lock: readingLock(live)})
	if err != nil {
		return nil, err
	}
	sides, err := source.OpenSides(names, s)
	if errors.Is(err, lvm.ErrNoSnapshot) {
		err = fmt.Errorf("%w; ORIGIN and COW are required, or the address of a snapshot volume", err)
	}
	return sides, adviseLive(advise(err), live)
}

// fileOf is the file or URI of a disk's name.
func fileOf(name string) string { return source.Path(name) }

// checkDifferent refuses two names of one disk. Two parts of a disk are different.
func checkDifferent(originName, cowName string) error {
	return source.CheckDifferent(originName, cowName)
}

// checkStore refuses a COW device whose header is not one of a store that can be read.
func checkStore(path string, cow block.Device) error { return advise(cowfile.CheckStore(path, cow)) }

// advise adds the remedy, a verb or a flag, to an error.
func advise(err error) error {
	var notRaw *image.NotRawError
	var notEmpty *image.NotEmptyError
	var needs *qcow2.NeedsFileError
	var format *source.FormatError
	var pending *server.PendingMergeError
	switch {
	case errors.As(err, &pending):
		return fmt.Errorf("%w; dmsnap merge %s completes it, dmsnap export writes what volumes show meanwhile", err, text.ShellWords(pending.Snapshot))
	case errors.Is(err, merge.ErrNotUndo):
		return fmt.Errorf("%w; choose another name, or use --force to replace it", err)
	case errors.Is(err, merge.ErrUnfinished):
		return fmt.Errorf("%w; --force continues anyway", err)
	case errors.Is(err, cowfile.ErrOtherVersion):
		return fmt.Errorf("%w; use that version, instead of a tag the digest, or --raw if the content is the same", err)
	case errors.Is(err, http.ErrSchemeMismatch):
		return fmt.Errorf("%w; --insecure allows plain HTTP", err)
	case errors.Is(err, lvm.ErrActive):
		return fmt.Errorf("%w; deactivate it first (vgchange -an)", err)
	case errors.Is(err, ondisk.ErrNoStore):
		return fmt.Errorf("%w; create one with dmsnap create", err)
	case errors.Is(err, cowfile.ErrOnlyRead):
		return fmt.Errorf("%w; dmsnap export writes what the snapshot shows to a new image", err)
	case errors.Is(err, qcow2.ErrEncrypted):
		return fmt.Errorf("%w; convert it to one that is not, with qemu-img and its key", err)
	case errors.As(err, &needs) && needs.Data:
		return fmt.Errorf("%w; --data-file PATH opens PATH as that file", err)
	case errors.As(err, &needs):
		return fmt.Errorf("%w; --backing-file PATH opens PATH as that file, --follow-backing opens files beside the image by their names", err)
	case errors.As(err, &format), errors.As(err, &notRaw):
		return fmt.Errorf("%w; --raw uses its bytes as the disk", err)
	case errors.Is(err, store.ErrExists):
		return fmt.Errorf("%w; --force creates a new one over it", err)
	case errors.As(err, &notEmpty):
		return fmt.Errorf("%w; --force overwrites it", err)
	}
	return err
}
