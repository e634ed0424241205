package inspect

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/server/api"
)

// Daemon writes what the daemon of a fleet serves.
func (p TextWriter) Daemon(d api.Daemon) error {
	fmt.Fprintf(p.W, "fleet %s: %s, %s, %s, %s in layers, %s\n", text.Name(d.Dir), text.Count(uint64(d.Disks), "disk"),
		text.Count(uint64(d.Checkpoints), "checkpoint"), text.Count(uint64(d.Nodes), "node"), bytesize.Text(d.Bytes), text.Count(uint64(d.Connections), "connection"))
	if d.Error != "" {
		fmt.Fprintf(p.W, "  no changes are accepted: %s\n", d.Error)
	}
	var err error
	for _, m := range d.Merges {
		err = cmp.Or(err, p.TreeMerge(m))
	}
	for _, uri := range d.URIs {
		_, err = fmt.Fprintf(p.W, "  uri %s\n", uri)
	}
	return err
}

// Tree writes a tree with its elements below their parents.
func (p TextWriter) Tree(tree api.Tree) error {
	children := map[string][]api.Element{}
	for _, e := range tree.Elements {
		children[e.Parent] = append(children[e.Parent], e)
	}
	t := tabwriter.NewWriter(p.W, 0, 0, 2, ' ', 0)
	writeElements(t, children, "", 0)
	if tree.Error != "" {
		fmt.Fprintf(t, "no changes are accepted: %s\n", tree.Error)
	}
	return t.Flush()
}

// maxIndent bounds the indentation of a chain.
const maxIndent = 32

func writeElements(w io.Writer, children map[string][]api.Element, parent string, depth int) {
	list := children[parent]
	slices.SortStableFunc(list, func(a, b api.Element) int { return cmp.Compare(a.Name, b.Name) })
	for _, e := range list {
		where := e.URI
		if e.Kind == api.KindDisk {
			where = strings.TrimSpace(text.Name(e.File) + " " + e.URI)
		}
		use := bytesize.Text(e.SizeBytes)
		if e.Kind != api.KindDisk {
			use = bytesize.Text(e.AllocatedBytes) + " of " + use
		}
		if e.State == api.ElementFailed {
			where = strings.TrimSpace("failed: " + e.Error)
		}
		if e.Connections > 0 {
			use += fmt.Sprintf(", %s", text.Count(uint64(e.Connections), "connection"))
		}
		fmt.Fprintf(w, "%s%s\t%s\t%s\t%s\n", strings.Repeat("  ", min(depth, maxIndent)), text.Name(e.Name), e.Kind, use, where)
		writeElements(w, children, e.Name, depth+1)
	}
}

// Disks writes disks, one a line.
func (p TextWriter) Disks(d api.Disks) error {
	t := tabwriter.NewWriter(p.W, 0, 0, 2, ' ', 0)
	for _, disk := range d.Disks {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", text.Name(disk.Name), disk.State, disk.Format, bytesize.Text(disk.SizeBytes), text.Name(disk.Source))
	}
	return t.Flush()
}

// Disk writes one disk.
func (p TextWriter) Disk(d api.Disk) error {
	fmt.Fprintf(p.W, "disk %s: %s\n", text.Name(d.Name), d.State)
	t := tabwriter.NewWriter(p.W, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "  source\t%s (%s)\n  size\t%s\n  children\t%d\n", text.Name(d.Source), d.Format, bytesize.Text(d.SizeBytes), d.Children)
	if d.Error != "" {
		fmt.Fprintf(t, "  error\t%s\n", d.Error)
	}
	if d.URI != "" {
		fmt.Fprintf(t, "  uri\t%s\n", d.URI)
	}
	for _, key := range slices.Sorted(maps.Keys(d.Policy)) {
		fmt.Fprintf(t, "  policy\t%s=%s\n", key, d.Policy[key])
	}
	if err := t.Flush(); err != nil || d.Merge == nil {
		return err
	}
	return p.TreeMerge(*d.Merge)
}

// TreeMerge writes the merge of a node.
func (p TextWriter) TreeMerge(m api.TreeMerge) error {
	_, err := fmt.Fprintf(p.W, "merge of %s into %s: %s, %s of %s\n", text.Name(m.Node), text.Name(m.Disk), m.State, bytesize.Text(m.CopiedBytes), bytesize.Text(m.TotalBytes))
	if m.Error != "" {
		_, err = fmt.Fprintf(p.W, "  %s\n", m.Error)
	}
	return err
}

// Element writes where a node is found, or the name of another element.
func (p TextWriter) Element(e api.Element) error {
	line := text.Name(e.Name)
	if e.URI != "" {
		line += "  " + e.URI
	}
	_, err := fmt.Fprintln(p.W, line)
	return err
}

// Table writes device-mapper tables: what stands for files first, then each device with its table.
func (p TextWriter) Table(t api.Table) (err error) {
	mode := func(readOnly bool) string {
		if readOnly {
			return " read-only"
		}
		return ""
	}
	for _, f := range t.Files {
		fmt.Fprintf(p.W, "# %s: a block device of the file %s%s\n", f.Placeholder, text.Name(f.File), mode(f.ReadOnly))
	}
	for _, d := range t.Devices {
		_, err = fmt.Fprintf(p.W, "# device %s%s\n%s\n", d.Name, mode(d.ReadOnly), strings.TrimSpace(d.Table))
	}
	return err
}
