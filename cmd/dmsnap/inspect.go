package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/store"
)

// inspection is what inspect prints as JSON.
type inspection struct {
	Path    string        `json:"path"`
	Kind    string        `json:"kind"`
	About   string        `json:"about"`
	Bytes   int64         `json:"bytes"`
	InUse   bool          `json:"in_use"` // another program has it open for writing
	Details []detail      `json:"details"`
	Store   *storeFacts   `json:"store,omitempty"`
	Merging *mergeBeside  `json:"merging,omitempty"` // of an origin: the offline merge into it that is not complete
	Beside  []storeBeside `json:"beside"`            // stores with names made from that of this disk
	Next    []nextStep    `json:"next"`

	kind image.Kind
}

// detail is a property of what was found.
type detail struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// printableDetails writes what was found as text for a terminal.
func printableDetails(found []image.Detail) []detail {
	list := []detail{}
	for _, d := range found {
		value := printable(d.Text)
		switch {
		case d.IsSize && d.Bytes > math.MaxInt64: // no size: the field is damaged
			value = fmt.Sprintf("%d bytes", d.Bytes)
		case d.IsSize:
			value = bytesText(int64(d.Bytes))
		}
		list = append(list, detail{d.Name, value})
	}
	return list
}

// storeFacts describes a store.
type storeFacts struct {
	Header   storeHeader           `json:"header"`
	Opens    bool                  `json:"opens"`
	Figures  *api.Figures          `json:"figures,omitempty"` // of one that opens
	Problems map[check.Code]uint64 `json:"problems"`          // how often each was found
	Origin   string                `json:"origin,omitempty"`  // a file whose name is that of the store without its suffix
	report   *check.Report
}

// storeHeader is the header as found.
type storeHeader struct {
	Valid        uint32 `json:"valid"`
	Version      uint32 `json:"version"`
	ChunkSectors uint32 `json:"chunk_sectors"`
}

// mergeBeside is an incomplete offline merge, by its side file.
type mergeBeside struct {
	SideFile   string `json:"side_file"`
	COW        string `json:"cow"`
	TakingBack bool   `json:"taking_back"`     // cow is the undo store of an earlier merge
	Error      string `json:"error,omitempty"` // why the side file can't be read
}

// mergeInto reads the side file of an origin.
func mergeInto(path string) *mergeBeside {
	half, err := merge.ReadSideFile(path)
	switch {
	case errors.Is(err, merge.ErrUnfinished):
		return &mergeBeside{SideFile: merge.SideFilePath(path), Error: err.Error()}
	case half == nil: // or the origin can't be found again
		return nil
	}
	return &mergeBeside{SideFile: half.Path(), COW: half.COW(), TakingBack: half.TakingBack()}
}

// storeBeside is a store found by a name made from that of the disk.
type storeBeside struct {
	Path       string `json:"path"`
	State      string `json:"state"` // ok, invalid or damaged
	Exceptions uint64 `json:"exceptions"`
	Fits       bool   `json:"fits"` // no exception is past the end of the disk
	InUse      bool   `json:"in_use"`
}

// nextStep is a command that applies to what was found.
type nextStep struct {
	Command string `json:"command"`
	Why     string `json:"why"`
}

func newInspect() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "inspect PATH",
		Short: "Show what a file or device is, and which verbs apply to it",
		Long: `Show what PATH is: an exception store, with its header, state and figures; a disk, and whether a store with a name
made from its own is beside it (disk.img.cow or disk.cow for disk.img); a disk image that is not raw; an LVM physical
volume, an encrypted disk, a file system, compressed data, text. Then show which commands apply.

Nothing is written. Files in use are read, too.

Exit status: 0 the format is known, 1 it is unknown, 2 trouble.`,
		Example: `  dmsnap inspect disk.cow
  dmsnap inspect --json disk.img`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, stop := untilSignal()
			defer stop()
			i, err := inspect(ctx, args[0])
			if err != nil {
				return about(args[0], err)
			}
			if asJSON {
				err = printJSON(c, i)
			} else {
				err = i.print(c.OutOrStdout())
			}
			if err == nil && i.kind == image.Unknown {
				err = errNo
			}
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// inspect examines path and the files whose names belong to it.
func inspect(ctx context.Context, path string) (*inspection, error) {
	dev, err := openDevice(path, block.Options{ReadOnly: true, Lock: block.LockShared})
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	c, err := image.Probe(dev)
	if err != nil {
		return nil, err
	}
	i := &inspection{Path: path, Kind: c.Name, About: c.About, Bytes: dev.Size(), InUse: block.HasWriter(path),
		Details: printableDetails(c.Details), Beside: []storeBeside{}, kind: c.Kind}
	if c.Kind == image.Store {
		if i.Store, err = factsOf(ctx, i, dev); err != nil {
			return nil, err
		}
	} else {
		i.Beside = storesBeside(path, dev.Size())
	}
	i.Merging = mergeInto(path)
	i.Next = i.next()
	return i, nil
}

// factsOf reads the store on dev, sound or not.
func factsOf(ctx context.Context, i *inspection, dev block.Device) (*storeFacts, error) {
	r, err := checkDevice(ctx, dev, check.Options{}, i.InUse)
	if err != nil {
		return nil, err
	}
	h := r.Header
	f := &storeFacts{Header: storeHeader{h.Valid, h.Version, h.ChunkSectors}, Problems: r.Found, Origin: originBeside(i.Path), report: r}
	if st, err := openWhileWritten(dev, i.InUse); err == nil {
		figures := server.FiguresOf(statusOfStore(st))
		f.Figures, f.Opens = &figures, !r.Has(check.ChunkNotBlocks)
	}
	return f, nil
}

// originBeside finds the file that a store's name is made from: disk.img for disk.img.cow or disk.cow.
func originBeside(path string) string {
	stem, ok := strings.CutSuffix(path, ".cow")
	if !ok {
		return ""
	}
	for _, p := range []string{stem, stem + ".img", stem + ".raw"} {
		if info, err := os.Stat(p); err == nil && info.Mode().IsRegular() {
			return p
		}
	}
	return ""
}

// storesBeside finds stores that are named after the disk at path.
func storesBeside(path string, size int64) []storeBeside {
	found := []storeBeside{}
	names := []string{path + ".cow"}
	for _, end := range []string{".img", ".raw"} {
		if stem, ok := strings.CutSuffix(path, end); ok {
			names = append(names, stem+".cow")
		}
	}
	for _, name := range names {
		cow, err := block.Open(name, block.Options{ReadOnly: true, Lock: block.LockShared})
		if err != nil {
			continue
		}
		if h, err := store.ReadHeader(cow); err == nil && h.Magic == ondisk.Magic {
			found = append(found, lookBeside(name, cow, size))
		}
		cow.Close()
	}
	return found
}

func lookBeside(name string, cow block.Device, size int64) storeBeside {
	b := storeBeside{Path: name, State: "damaged", InUse: block.HasWriter(name)}
	if st, err := openWhileWritten(cow, b.InUse); err == nil {
		b.State, b.Exceptions = string(statusOfStore(st).State), st.Len()
		b.Fits = st.CheckOrigin(size) == nil
	}
	return b
}

func (i *inspection) print(w io.Writer) error {
	use := ""
	if i.InUse {
		use = ", in use"
	}
	fmt.Fprintf(w, "%s: %s, %s%s\n", i.Path, i.title(), bytesText(i.Bytes), use)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, d := range i.Details {
		fmt.Fprintf(t, "  %s\t%s\n", d.Name, d.Value)
	}
	if i.Store != nil {
		i.Store.print(t)
	}
	if m := i.Merging; m != nil && m.Error != "" {
		fmt.Fprintf(t, "  merging\t%s\n", printable(m.Error))
	} else if m != nil {
		fmt.Fprintf(t, "  merging\tan offline merge of %s is not complete (%s): this disk alone is a mixture\n", printable(m.COW), printable(m.SideFile))
	}
	for _, b := range i.Beside {
		fmt.Fprintf(t, "  beside it\t%s: a store, %s, %s\n", b.Path, b.State, plural(b.Exceptions, "exception"))
	}
	for n, step := range i.Next {
		head := ""
		if n == 0 {
			head = "next"
		}
		fmt.Fprintf(t, "  %s\t%s\n  \t    %s\n", head, step.Why, step.Command)
	}
	return t.Flush()
}

// title is what it is, with its state.
func (i *inspection) title() string {
	switch {
	case i.Store != nil && i.Store.report.Has(check.MarkedInvalid):
		return i.About + ", marked invalid"
	case i.Store != nil && i.Store.report.Worst() == check.Error:
		return i.About + ", damaged"
	case i.Kind != i.About && i.Store == nil && i.kind != image.Zeros && i.kind != image.Nothing && i.kind != image.Unknown:
		return i.Kind + ", " + i.About
	}
	return i.About
}

func (f *storeFacts) print(t io.Writer) {
	fmt.Fprintf(t, "  header\tvalid %d, version %d, chunks of %d sectors\n", f.Header.Valid, f.Header.Version, f.Header.ChunkSectors)
	if f.Figures != nil {
		printFigures(t, *f.Figures)
	}
	for _, p := range check.Problems() {
		if n := f.Problems[p.Code]; n > 0 {
			fmt.Fprintf(t, "  %v %v\t%s (%d)\n", p.Code, p.Severity, p.Name, n)
		}
	}
	if f.Origin != "" {
		fmt.Fprintf(t, "  origin\t%s, by its name\n", f.Origin)
	}
}
