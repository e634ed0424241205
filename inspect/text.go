package inspect

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/text"
)

// A TextWriter writes what was found as text, for people.
type TextWriter struct {
	W       io.Writer
	Full    string // advice that follows the statement that a COW device is full
	Columns int    // of a map; 0: 64
	Colours bool   // in a map, else letters
}

// Report writes a report.
func (p TextWriter) Report(r *Report) error {
	var table bytes.Buffer
	t := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	for _, i := range r.Images {
		p.inspection(t, i)
	}
	for _, i := range r.Images {
		i.printPartitions(t)
	}
	for _, g := range r.VolumeGroups {
		printGroup(t, g)
	}
	if len(r.Warnings) > 0 {
		fmt.Fprintln(t)
	}
	for _, warning := range r.Warnings {
		fmt.Fprintf(t, "warning: %s\n", warning)
	}
	t.Flush() // a buffer takes everything
	for line := range strings.Lines(table.String()) {
		if _, err := fmt.Fprintln(p.W, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

func (p TextWriter) inspection(t io.Writer, i *Inspection) {
	use := ""
	if i.InUse {
		use = ", in use"
	}
	fmt.Fprintf(t, "%s: %s, %s%s\n", i.Path, i.title(), bytesize.Text(i.Bytes), use)
	for _, d := range i.Details {
		fmt.Fprintf(t, "  %s\t%s\n", d.Name, d.Value)
	}
	if i.Store != nil {
		p.store(t, i.Store)
	}
	if i.QCOW2 != nil {
		printQCOW2(t, i.QCOW2)
	}
	if m := i.Merging; m != nil && m.Error != "" {
		fmt.Fprintf(t, "  merging\t%s\n", text.Name(m.Error))
	} else if m != nil && m.InPart {
		fmt.Fprintf(t, "  merging\ta merge was reverted in part, by the undo store %s (%s): this disk is a mixture, and an older undo store reverts the rest\n",
			text.Name(m.COW), text.Name(m.SideFile))
	} else if m != nil {
		fmt.Fprintf(t, "  merging\ta merge of %s is not complete (%s): this disk alone is a mixture\n", text.Name(m.COW), text.Name(m.SideFile))
	}
	for _, b := range i.Beside {
		fmt.Fprintf(t, "  beside it\t%s: a store, %s, %s\n", b.Path, b.State, text.Count(b.Exceptions, "exception"))
	}
	for n, step := range i.Next {
		head := ""
		if n == 0 {
			head = "next"
		}
		fmt.Fprintf(t, "  %s\t%s\n  \t    %s\n", head, step.Why, step.Command)
	}
}

// title is what it is, with its state.
func (i *Inspection) title() string {
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

func (p TextWriter) store(t io.Writer, s *Store) {
	fmt.Fprintf(t, "  header\tvalid %d, version %d, chunks of %d sectors\n", s.Header.Valid, s.Header.Version, s.Header.ChunkSectors)
	if s.Figures != nil {
		p.figures(t, *s.Figures)
	}
	for _, problem := range check.Problems() {
		if n := s.Problems[problem.Code]; n > 0 {
			fmt.Fprintf(t, "  %v %v\t%s (%d)\n", problem.Code, problem.Severity, problem.Name, n)
		}
	}
	if s.Origin != "" {
		fmt.Fprintf(t, "  origin\t%s, by its name\n", s.Origin)
	}
}

func (i *Inspection) printPartitions(t io.Writer) {
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
		fmt.Fprintf(t, "  %s\t%s\t%s\n", p.Address, bytesize.Text(p.Size), content)
	}
}

func printGroup(t io.Writer, g Group) {
	fmt.Fprintf(t, "\nvolume group %s, %s\n", g.Name, text.Count(uint64(len(g.Volumes)), "volume"))
	for _, pv := range g.PVs {
		outdated := ""
		if pv.Outdated {
			outdated = ", outdated"
		}
		fmt.Fprintf(t, "  physical volume %s, %s%s\n", pv.Address, bytesize.Text(pv.Size), outdated)
	}
	for _, m := range g.Missing {
		fmt.Fprintf(t, "  missing: physical volume %s, last seen as %s: %s\n", m.ID, text.Name(m.Device), m.Reason)
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
		fmt.Fprintf(t, "  %s\t%s\t%s\t%s\t%s\t%s\t%s\n", volumeTitle(v), text.Name(v.Type), bytesize.Text(v.Size), v.Origin, state, fill, volumeNote(g, v))
	}
}

// volumeTitle is the address of a volume, in brackets if it is a part of another.
func volumeTitle(v Volume) string {
	if v.Visible {
		return v.Address
	}
	return "[" + v.Address + "]"
}

// volumeNote says what else must be known of a volume.
func volumeNote(g Group, v Volume) string {
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
