package inspect

import (
	"fmt"
	"io"
	"time"

	"github.com/dmsnap/dmsnap/internal/bytesize"
	"github.com/dmsnap/dmsnap/internal/text"
)

func printQCOW2(t io.Writer, q *QCOW2) {
	if q.ClusterSize > 0 {
		fmt.Fprintf(t, "  clusters\t%s, %s\n", bytesize.Text(q.ClusterSize), q.Compression)
	}
	if q.Encryption != "" {
		fmt.Fprintf(t, "  encrypted\t%s: the disk in it can't be read\n", q.Encryption)
	}
	if q.Dirty {
		fmt.Fprintf(t, "  dirty\treference counts may be wrong, which does not matter for reading\n")
	}
	if q.Corrupt {
		fmt.Fprintf(t, "  corrupt\ta program found its tables damaged and marked it so\n")
	}
	if q.DataFile != "" {
		fmt.Fprintf(t, "  data file\t%s\n", text.Name(q.DataFile))
	}
	for _, s := range q.Snapshots {
		fmt.Fprintf(t, "  internal snapshot\t%s %s, %s, %s\n", text.Name(s.ID), text.Name(s.Name), bytesize.Text(s.SizeBytes), s.Time.Format(time.RFC3339))
	}
	for _, b := range q.Bitmaps {
		state := ""
		switch {
		case b.InUse:
			state = ", in use when a program was killed: its content is wrong"
		case b.Stale:
			state = ", out of date: its content is wrong"
		case b.DirtyBytes != nil:
			state = fmt.Sprintf(", %s marked", bytesize.Text(*b.DirtyBytes))
		}
		fmt.Fprintf(t, "  bitmap\t%s, a bit for %s%s\n", text.Name(b.Name), bytesize.Text(b.Granularity), state)
	}
	if q.Check != nil {
		printQCOW2Check(t, q.Check)
	}
	if q.Error != "" {
		fmt.Fprintf(t, "  error\t%s\n", text.Name(q.Error))
	}
}

func printQCOW2Check(t io.Writer, c *QCOW2Check) {
	switch {
	case c.Error != "":
		fmt.Fprintf(t, "  check\tnot finished: %s\n", text.Name(c.Error))
	case c.Sound():
		fmt.Fprintf(t, "  check\tno problem\n")
	default:
		fmt.Fprintf(t, "  check\t%s, %s\n", text.Count(uint64(c.Errors), "error"), text.Count(uint64(c.Leaks), "leaked cluster"))
	}
	for _, p := range c.Problems {
		fmt.Fprintf(t, "  \t%s\n", p) // names in it are quoted
	}
}
