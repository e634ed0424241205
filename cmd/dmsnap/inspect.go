package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/source"
)

// inspection is what inspect prints of a disk as JSON.
type inspection struct {
	*inspect.Disk
	Details []detail `json:"details"`
	inspect.Table
	Next []nextStep `json:"next"`
}

// oneInspection is what inspect prints as JSON for one path.
type oneInspection struct {
	inspection
	VolumeGroups []inspect.Group `json:"volume_groups"`
	Warnings     []string        `json:"warnings"`
}

// severalInspections is what inspect prints as JSON for several paths.
type severalInspections struct {
	Images       []*inspection   `json:"images"`
	VolumeGroups []inspect.Group `json:"volume_groups"`
	Warnings     []string        `json:"warnings"`
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

// nextStep is a command that applies to what was found.
type nextStep struct {
	Command string `json:"command"`
	Why     string `json:"why"`
}

func newInspect() *cobra.Command {
	var asJSON bool
	var disk diskFlags
	c := &cobra.Command{
		Use:   "inspect PATH...",
		Short: "Show what a file or device is and holds, and which verbs apply to it",
		Long: `Show what PATH is: an exception store, with its header, state and figures; a disk, and whether a store with a name
made from its own is beside it (disk.img.cow or disk.cow for disk.img); a disk image that is not raw; an LVM physical
volume, an encrypted disk, a file system, compressed data, text. Then show which commands apply.

Of a disk, list the partitions, and the volume groups of LVM with their volumes, each with its address, type and size;
of a snapshot its origin, the state and fill level of its store; and the reason if a volume can't be read. Volumes in
brackets are parts of others. A group that is on several disks needs all of them: inspect A B C.

PATH may be an address: DISK#p2 shows what is in partition 2.

Nothing is written. Files in use are read, too.

Exit status: 0 the format is known, 1 it is unknown, 2 trouble.`,
		Example: `  dmsnap inspect disk.cow
  dmsnap inspect --json disk.img
  dmsnap inspect vm.img`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, stop := untilSignal()
			defer stop()
			images, parts, err := disk.inspectAll(ctx, args)
			if err != nil {
				return err
			}
			switch {
			case asJSON && len(images) == 1:
				err = printJSON(c, oneInspection{*images[0], parts.Groups, parts.Warnings})
			case asJSON:
				err = printJSON(c, severalInspections{images, parts.Groups, parts.Warnings})
			default:
				err = printInspection(c.OutOrStdout(), images, parts)
			}
			for _, i := range images {
				if err == nil && i.Content.Kind == image.Unknown {
					err = errNo
				}
			}
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	disk.addPVs(c.Flags())
	return c
}

// inspectAll examines disks and what they hold.
func (d *diskFlags) inspectAll(ctx context.Context, paths []string) ([]*inspection, *inspect.Contents, error) {
	var all []*inspection
	var disks []inspect.Image
	var place []int // of each of them in all
	var notes []string
	for _, path := range paths {
		// Of a whole disk the bytes themselves are looked at.
		whole := fileOf(path) == path
		dev, err := source.Open(path, source.Options{ReadOnly: true, Lock: block.LockShared, Raw: whole, PVs: d.pvs})
		if err != nil {
			return nil, nil, about(path, advise(err))
		}
		defer dev.Close()
		look, err := inspect.Look(ctx, path, dev)
		if err != nil {
			return nil, nil, about(path, err)
		}
		inside := dev // the disk in an image
		if whole && look.Kind == source.QCOW2 {
			if inside, err = source.Open(path, source.Options{ReadOnly: true, Lock: block.LockShared}); err != nil {
				notes = append(notes, fmt.Sprintf("what is in the image is not listed: %v", err))
			} else {
				defer inside.Close()
			}
		}
		if whole && err == nil && (look.Content.Role == image.RawDisk || look.Kind == source.QCOW2) {
			place = append(place, len(all))
			disks = append(disks, inspect.Image{Path: path, Dev: inside, InUse: look.InUse})
		}
		all = append(all, &inspection{Disk: look, Details: printableDetails(look.Content.Details), Table: inspect.Table{Partitions: []inspect.Partition{}}})
	}
	parts := inspect.Parts(disks)
	parts.Warnings = append(parts.Warnings, notes...)
	for n, i := range place {
		all[i].Table = parts.Tables[n]
	}
	for _, i := range all {
		i.Next = i.next(parts.Groups)
	}
	return all, parts, nil
}

func printInspection(w io.Writer, images []*inspection, parts *inspect.Contents) error {
	var table bytes.Buffer
	t := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	for _, i := range images {
		i.print(t)
	}
	for _, i := range images {
		i.printPartitions(t)
	}
	for _, g := range parts.Groups {
		printGroup(t, g)
	}
	if len(parts.Warnings) > 0 {
		fmt.Fprintln(t)
	}
	for _, warning := range parts.Warnings {
		fmt.Fprintf(t, "warning: %s\n", warning)
	}
	t.Flush() // a buffer takes everything
	for line := range strings.Lines(table.String()) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

func (i *inspection) print(t io.Writer) {
	use := ""
	if i.InUse {
		use = ", in use"
	}
	fmt.Fprintf(t, "%s: %s, %s%s\n", i.Path, i.title(), bytesText(i.Bytes), use)
	for _, d := range i.Details {
		fmt.Fprintf(t, "  %s\t%s\n", d.Name, d.Value)
	}
	if i.Store != nil {
		printStore(t, i.Store)
	}
	if i.QCOW2 != nil {
		printQCOW2(t, i.QCOW2)
	}
	if m := i.Merging; m != nil && m.Error != "" {
		fmt.Fprintf(t, "  merging\t%s\n", printable(m.Error))
	} else if m != nil {
		fmt.Fprintf(t, "  merging\ta merge of %s is not complete (%s): this disk alone is a mixture\n", printable(m.COW), printable(m.SideFile))
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
}

func printQCOW2(t io.Writer, q *inspect.QCOW2) {
	if q.ClusterSize > 0 {
		fmt.Fprintf(t, "  clusters\t%s, %s\n", bytesText(q.ClusterSize), q.Compression)
	}
	if q.DataFile != "" {
		fmt.Fprintf(t, "  data file\t%s\n", printable(q.DataFile))
	}
	for _, s := range q.Snapshots {
		fmt.Fprintf(t, "  internal snapshot\t%s %s, %s, %s\n", printable(s.ID), printable(s.Name), bytesText(s.SizeBytes), s.Time.Format(time.RFC3339))
	}
	for _, b := range q.Bitmaps {
		fmt.Fprintf(t, "  bitmap\t%s, a bit for %s\n", printable(b.Name), bytesText(b.Granularity))
	}
	if q.Error != "" {
		fmt.Fprintf(t, "  error\t%s\n", printable(q.Error))
	}
}

// title is what it is, with its state.
func (i *inspection) title() string {
	kind := i.Content.Kind
	switch {
	case i.Store != nil && i.Store.Report.Has(check.MarkedInvalid):
		return i.About + ", marked invalid"
	case i.Store != nil && i.Store.Report.Worst() == check.Error:
		return i.About + ", damaged"
	case i.Store == nil && kind != image.Zeros && kind != image.Nothing && kind != image.Unknown:
		return kindTitle(i.Kind, i.About)
	}
	return i.About
}

// kindTitle is the name of a kind and what it means.
func kindTitle(kind, about string) string {
	if kind == about {
		return about
	}
	return kind + ", " + about
}

func printStore(t io.Writer, s *inspect.Store) {
	fmt.Fprintf(t, "  header\tvalid %d, version %d, chunks of %d sectors\n", s.Header.Valid, s.Header.Version, s.Header.ChunkSectors)
	if s.Figures != nil {
		printFigures(t, *s.Figures)
	}
	for _, p := range check.Problems() {
		if n := s.Problems[p.Code]; n > 0 {
			fmt.Fprintf(t, "  %v %v\t%s (%d)\n", p.Code, p.Severity, p.Name, n)
		}
	}
	if s.Origin != "" {
		fmt.Fprintf(t, "  origin\t%s, by its name\n", s.Origin)
	}
}

func (i *inspection) printPartitions(t io.Writer) {
	if len(i.Partitions) == 0 {
		return
	}
	fmt.Fprintf(t, "\n%s: partition table (%s)\n  ADDRESS\tSIZE\tCONTENT\n", i.Path, i.Scheme)
	for _, p := range i.Partitions {
		content := kindTitle(p.Kind, p.About)
		switch {
		case p.Group != "":
			content = "physical volume of volume group " + p.Group
		case p.Kind == image.Zeros.Name:
			content = "zeros"
		case p.Kind == "extended" || p.Kind == image.Unknown.Name:
			content = p.Kind
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\n", p.Address, bytesText(p.Size), content)
	}
}

func printGroup(t io.Writer, g inspect.Group) {
	fmt.Fprintf(t, "\nvolume group %s, %s\n", g.Name, plural(uint64(len(g.Volumes)), "volume"))
	for _, pv := range g.PVs {
		outdated := ""
		if pv.Outdated {
			outdated = ", outdated"
		}
		fmt.Fprintf(t, "  physical volume %s, %s%s\n", pv.Address, bytesText(pv.Size), outdated)
	}
	for _, m := range g.Missing {
		fmt.Fprintf(t, "  missing: physical volume %s, last seen as %s: %s\n", m.ID, printable(m.Device), m.Reason)
	}
	for _, a := range g.Attributes {
		fmt.Fprintf(t, "  %s: another host may use it now\n", a)
	}
	if g.Error != "" {
		fmt.Fprintf(t, "  can't be read: %s\n", g.Error)
	}
	for _, w := range g.Warnings {
		fmt.Fprintf(t, "  warning: %s\n", w)
	}
	if len(g.Volumes) == 0 {
		return
	}
	fmt.Fprintf(t, "  ADDRESS\tTYPE\tSIZE\tORIGIN\tSTORE\tFILL\tNOTE\n")
	for _, v := range g.Volumes {
		state, fill := "", ""
		switch {
		case v.Status != nil:
			state, fill = string(v.State), fmt.Sprintf("%.1f %%", v.Percent)
		case v.Damaged:
			state = "damaged"
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\t%s\t%s\t%s\t%s\n", volumeTitle(v), printable(v.Type), bytesText(v.Size), v.Origin, state, fill, volumeNote(g, v))
	}
}

// volumeTitle is the address of a volume, in brackets if it is a part of another.
func volumeTitle(v inspect.Volume) string {
	if v.Visible {
		return v.Address
	}
	return "[" + v.Address + "]"
}

// volumeNote says what else must be known of a volume.
func volumeNote(g inspect.Group, v inspect.Volume) string {
	switch {
	case g.Error != "":
		return "can't be read"
	case !v.Readable:
		return "can't be read: " + v.Reason
	case v.Merging && v.Origin != "":
		return "to be merged into its origin"
	case v.Merging:
		return "shows the snapshot that is to be merged"
	case v.ReadOnly:
		return "read-only"
	}
	return ""
}
