package offline

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/compact"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/lvm"
)

// CompactOptions are the options of [Compact]. The zero value is usable.
type CompactOptions struct {
	Origin        string         // of the store; empty: of a snapshot volume its own, else it is not known
	Source        source.Options // how disks are opened; ReadOnly and Lock are set by Compact
	DropUnchanged bool           // leave out chunks whose content is the origin's
	ChunkSectors  uint32         // of the new store; 0: as before
	Force         bool           // replace the output if it exists
	Progress      func(done, total int64)
}

// CompactResult says what became of a store.
type CompactResult struct {
	Path           string `json:"path"` // of the new store
	ChunkSectors   uint32 `json:"chunk_sectors"`
	Exceptions     uint64 `json:"exceptions"`
	Bytes          int64  `json:"bytes"`           // size of the file
	AllocatedBytes int64  `json:"allocated_bytes"` // space that it takes
	DataBytes      int64  `json:"data_bytes"`
	DroppedBytes   int64  `json:"dropped_bytes"` // in chunks that were stored and are the origin's
	FilledBytes    int64  `json:"filled_bytes"`  // read from the origin to fill larger chunks
	// EndUnknown is set if the last chunk was split into smaller ones without an origin that gives its end.
	EndUnknown bool `json:"end_unknown"`

	LastStored block.Range `json:"-"` // with EndUnknown: where the end may be
	dropped    bool
}

// WriteText writes the result for people.
func (r CompactResult) WriteText(w io.Writer) error {
	line := fmt.Sprintf("%s: %s, %s a chunk; takes %s of %s", r.Path, text.Count(r.Exceptions, "exception"),
		bytesize.Text(int64(r.ChunkSectors)*512), bytesize.Text(r.AllocatedBytes), bytesize.Text(r.Bytes))
	if r.dropped {
		line += fmt.Sprintf("; %s unchanged and dropped", bytesize.Text(r.DroppedBytes))
	}
	if r.FilledBytes > 0 {
		line += fmt.Sprintf("; %s filled from the origin", bytesize.Text(r.FilledBytes))
	}
	_, err := fmt.Fprintln(w, line)
	return err
}

// Compact copies the store of path, a COW device or the address of a snapshot volume, into the new file out, densely and in
// the order of the origin. The file gets its name when it is complete and durable.
//
// Errors: store.ErrInvalid, compact.ErrDamaged, compact.ErrNeedsOrigin; those of opening and of newfile's outputs.
func Compact(ctx context.Context, path, out string, o CompactOptions) (res CompactResult, err error) {
	o.Source.ReadOnly, o.Source.Lock = true, block.LockRead
	opts := compact.Options{DropUnchanged: o.DropUnchanged, ChunkSectors: o.ChunkSectors, Progress: o.Progress}
	inputs := []string{path}
	var cow *source.Disk
	if o.Origin != "" {
		origin, err := source.OpenOriginOf(o.Origin, path, o.Source)
		if err != nil {
			return res, err
		}
		defer origin.Close()
		opts.Origin = origin
		inputs = append(inputs, o.Origin)
	} else if sides, err := source.OpenSides([]string{path}, o.Source); err == nil {
		defer sides.Close()
		opts.Origin, cow = sides.Origin, sides.COWs[0]
	} else if !errors.Is(err, lvm.ErrNoSnapshot) {
		return res, err
	}
	if cow == nil {
		if cow, err = source.OpenStore(path, o.Source); err != nil {
			return res, err
		}
		defer cow.Close()
	}
	if err := cowfile.CheckStore(path, cow); err != nil {
		return res, err
	}
	if o.Origin != "" {
		if err := source.CheckComplete(o.Origin, cow); err != nil {
			return res, err
		}
	}
	p, err := compact.NewPlan(ctx, cow, opts)
	if err != nil {
		return res, block.WithPath(path, err)
	}
	var made compact.Result
	err = writeDevice(out, o.Force, inputs, p.Size(), func(dst *block.File) (err error) {
		made, err = p.Write(ctx, dst)
		return err
	})
	if block.IsNoSpace(err) {
		return res, fmt.Errorf("%s: no space for the new store: %w", out, err)
	}
	if err != nil {
		return res, block.WithPath(out, err)
	}
	l := p.Layout()
	res = CompactResult{Path: out, ChunkSectors: l.ChunkSectors, Exceptions: made.Exceptions, DataBytes: int64(made.Exceptions) << l.Shift(),
		DroppedBytes: int64(made.Dropped) << l.Shift(), FilledBytes: made.Filled, EndUnknown: p.EndUnknown(), dropped: o.DropUnchanged}
	if res.EndUnknown {
		res.LastStored.Off, res.LastStored.Length = p.LastStored()
	}
	res.AllocatedBytes, res.Bytes, err = spaceOf(out)
	return res, err
}

// PunchResult says what [Punch] freed.
type PunchResult struct {
	Path           string `json:"path"`
	UnusedBytes    int64  `json:"unused_bytes"`    // that no exception uses: they are holes now
	FreedBytes     int64  `json:"freed_bytes"`     // of them, those that took space before
	AllocatedBytes int64  `json:"allocated_bytes"` // space that the file takes now
}

// WriteText writes the result for people.
func (r PunchResult) WriteText(w io.Writer) error {
	_, err := fmt.Fprintf(w, "%s: %s freed, of %s that no exception uses; takes %s now\n", r.Path, bytesize.Text(r.FreedBytes),
		bytesize.Text(r.UnusedBytes), bytesize.Text(r.AllocatedBytes))
	return err
}

// ErrBlockDevice reports that holes can't be made in a block device.
var ErrBlockDevice = errors.New("is a block device")

// Punch punches holes into a COW file where chunks are that no exception uses. Errors: ErrBlockDevice; store.ErrInvalid,
// compact.ErrDamaged; those of opening.
func Punch(ctx context.Context, path string, progress func(done, total int64)) (res PunchResult, err error) {
	if info, err := os.Stat(path); err == nil && info.Mode()&os.ModeDevice != 0 && info.Mode()&os.ModeCharDevice == 0 {
		return res, fmt.Errorf("%s: %w", path, ErrBlockDevice)
	}
	cow, err := source.OpenWhole(path, block.Options{})
	if err != nil {
		return res, err
	}
	defer cow.Close()
	if err := cowfile.CheckStore(path, cow); err != nil {
		return res, err
	}
	before, _, err := spaceOf(path)
	if err != nil {
		return res, err
	}
	unused, err := compact.Punch(ctx, cow, progress)
	if err != nil {
		return res, block.WithPath(path, err)
	}
	after, _, err := spaceOf(path)
	return PunchResult{path, unused, max(0, before-after), after}, err
}

// spaceOf returns how much space a file takes, and its size, in bytes.
func spaceOf(path string) (allocated, size int64, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, 0, err
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512, info.Size(), nil
}
