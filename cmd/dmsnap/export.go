package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/store"
)

func newExport() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use:   "export ORIGIN COW OUT",
		Short: "Write a snapshot's content to a raw image",
		Long: `Write what the snapshot shows to OUT, as a sparse raw image; "-" is standard output.

OUT appears under its name when it is whole and on disk, never before. An existing file is replaced with
--force only. An invalid snapshot is refused.`,
		Example: `  dmsnap export disk.img disk.cow old.img
  dmsnap export disk.img disk.cow - | zstd > old.img.zst`,
		Args: cobra.ExactArgs(3),
		RunE: func(c *cobra.Command, args []string) (err error) {
			snap, closeAll, err := openSnapshot(args[0], args[1])
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, closeAll()) }()
			ctx, stop := untilSignal()
			defer stop()
			bar := newProgress(c.ErrOrStderr(), "export")
			defer bar.end()
			if args[2] == "-" {
				return copyOut(ctx, &plainWriter{c.OutOrStdout()}, snap, bar)
			}
			return exportFile(ctx, snap, args[2], force, args[:2], bar)
		},
	}
	c.Flags().BoolVar(&force, "force", false, "replace OUT when it exists")
	return c
}

// openSnapshot opens a snapshot for reading alone, and refuses one that can't be read whole.
func openSnapshot(originPath, cowPath string) (*snapshot.Snapshot, func() error, error) {
	origin, cow, both, err := openPair(originPath, cowPath, block.Options{ReadOnly: true})
	if err != nil {
		return nil, nil, err
	}
	snap, err := attachReadable(origin, cow)
	if err != nil {
		return nil, nil, errors.Join(about(cowPath, err), both.Close())
	}
	// Nothing was written through snap, so nothing is left to sync.
	return snap, both.Close, nil
}

func attachReadable(origin, cow block.Device) (*snapshot.Snapshot, error) {
	st, err := store.Open(cow)
	if err != nil {
		return nil, err
	}
	if err := st.Err(); err != nil {
		return nil, fmt.Errorf("%w: it was marked so when its COW device was full or failed, and its content is lost", err)
	}
	if err := st.CheckOrigin(origin.Size()); err != nil {
		return nil, err
	}
	return snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
}

// exportFile writes the image to a new file.
func exportFile(ctx context.Context, snap *snapshot.Snapshot, out string, force bool, inputs []string, bar *progressBar) error {
	return newFile(out, force, inputs, func(f *os.File) error { return writeImage(ctx, f, snap, bar) })
}

// newFile has fill write a file under a temporary name beside out, and gives it its name when it is on disk: out
// is whole or not there. What exists is replaced with force only, and none of the inputs ever.
func newFile(out string, force bool, inputs []string, fill func(*os.File) error) (err error) {
	if out, err = checkOut(out, force, inputs); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(out), "."+filepath.Base(out)+".*.part")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if err = fill(f); err == nil {
		err = f.Sync() // what it holds is durable before its name is
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := rename(f.Name(), out, force); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(out))
}

// checkOut refuses what must not be replaced, and returns the path of the file itself where out is a
// symbolic link.
func checkOut(out string, force bool, inputs []string) (string, error) {
	target, err := filepath.EvalSymlinks(out)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(out); err == nil {
			return "", fmt.Errorf("%s: a symbolic link to nothing", out)
		}
		_, err := os.Stat(filepath.Dir(out)) // told before any work is done
		return out, err
	}
	if err != nil {
		return "", about(out, err)
	}
	info, err := os.Stat(target)
	if err != nil {
		return "", err
	}
	for _, in := range inputs {
		if i, err := os.Stat(in); err == nil && os.SameFile(i, info) {
			return "", fmt.Errorf("%s: is the same file as %s", out, in)
		}
	}
	switch {
	case !info.Mode().IsRegular():
		return "", fmt.Errorf("%s: not a regular file; write to it with OUT - and a redirection", out)
	case !force:
		return "", fmt.Errorf("%s: %w; --force replaces it", out, fs.ErrExist)
	}
	return target, nil
}

// rename gives the finished file its name; without replace it takes no name that exists meanwhile.
func rename(from, to string, replace bool) error {
	if replace {
		return os.Rename(from, to)
	}
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // a file system that has no such thing
		if err = os.Link(from, to); err == nil {
			err = os.Remove(from)
		}
		return err
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// syncFolder makes the names in a folder durable, where its file system can.
func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// writeImage fills a new file with the image.
func writeImage(ctx context.Context, f *os.File, snap *snapshot.Snapshot, bar *progressBar) error {
	if err := f.Truncate(snap.Size()); err != nil {
		return err
	}
	return copyOut(ctx, &sparseWriter{f: f}, snap, bar)
}

// An imageWriter takes the image from its first byte to its last.
type imageWriter interface {
	data(p []byte) error
	zeros(n int64) error
}

const (
	copyBytes = 1 << 20 // read at once
	zeroBytes = 4096    // zeros of this size and alignment become holes
)

// copyOut hands dev's content to w, its holes as zeros.
func copyOut(ctx context.Context, w imageWriter, dev block.Device, bar *progressBar) error {
	size := dev.Size()
	buf := make([]byte, copyBytes)
	for off := int64(0); off < size; {
		extents, err := block.Extents(dev, off, size-off)
		if err != nil {
			return err
		}
		for _, e := range extents {
			if e.Flags&block.ReadsZero != 0 {
				err = w.zeros(e.Length)
				off += e.Length
			}
			for end := off + e.Length; err == nil && e.Flags&block.ReadsZero == 0 && off < end; {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				p := buf[:min(copyBytes-off%copyBytes, end-off)]
				if _, err = dev.ReadAt(p, off); err == nil {
					err = writePieces(w, p, off)
				}
				off += int64(len(p))
				bar.show(off, size)
			}
			if err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	bar.show(size, size)
	return nil
}

var noBytes [zeroBytes]byte

// writePieces hands over p, which begins at byte off of the image, telling zeros from data.
func writePieces(w imageWriter, p []byte, off int64) error {
	for len(p) > 0 {
		zero, n := isZero(p, off), int64(0)
		for n < int64(len(p)) && isZero(p[n:], off+n) == zero {
			n += pieceLength(p[n:], off+n)
		}
		var err error
		if zero {
			err = w.zeros(n)
		} else {
			err = w.data(p[:n])
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// pieceLength is how much of p, at byte off, lies in the aligned piece it begins in.
func pieceLength(p []byte, off int64) int64 { return min(zeroBytes-off%zeroBytes, int64(len(p))) }

func isZero(p []byte, off int64) bool {
	n := pieceLength(p, off)
	return bytes.Equal(p[:n], noBytes[:n])
}

// plainWriter writes every byte, as a pipe needs it.
type plainWriter struct{ w io.Writer }

func (w *plainWriter) data(p []byte) error {
	_, err := w.w.Write(p)
	return err
}

func (w *plainWriter) zeros(n int64) error {
	for n > 0 {
		k := min(n, int64(len(manyZeros)))
		if err := w.data(manyZeros[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

var manyZeros [copyBytes]byte

// sparseWriter leaves zeros out of a file that is as long as the image already.
type sparseWriter struct {
	f   *os.File
	off int64
}

func (w *sparseWriter) data(p []byte) error {
	n, err := w.f.WriteAt(p, w.off)
	w.off += int64(n)
	return err
}

func (w *sparseWriter) zeros(n int64) error {
	w.off += n
	return nil
}
