package main

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/served"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/stream"
)

type sendOptions struct {
	control       string
	since, output string
	drop, plain   bool
	from          sizeFlag
	force         bool
	disk          diskFlags
	json          bool
}

// sendResult is what send prints as JSON.
type sendResult struct {
	Kind stream.Kind `json:"kind"`
	Size int64       `json:"size"` // of the disk, in bytes
	stream.Count
	Name  string `json:"name,omitempty"`  // with --control: the checkpoint or snapshot that was sent
	Since string `json:"since,omitempty"` // with --control: what it was compared with
}

func newSend() *cobra.Command {
	var o sendOptions
	c := &cobra.Command{
		Use:   "send {ORIGIN COW | ADDRESS | --control PATH NODE}",
		Short: "Write what changed on a disk as a stream, for dmsnap receive",
		Long: `Write a stream with what the snapshot in COW shows and ORIGIN does not or, with --since COW_OLD, what changed between
the snapshots in COW_OLD and COW. Of an ADDRESS, a disk or a part of one, the stream has everything.

With --control PATH, NODE is a checkpoint of a daemon (vm1@tuesday), or a node, of which a checkpoint without a name is made
unless nothing was written since the last one: clients continue, and the live node is not read. With --since CHECKPOINT
the stream has what changed since: a checkpoint below it (vm1@monday, or monday), or the disk. Of dmsnap serve, NODE is
a snapshot and CHECKPOINT another one; the stream is not completed if a client writes to them meanwhile.

dmsnap receive applies the stream to a copy of the disk as it was: a copy of ORIGIN, or of what COW_OLD shows. The
stream has digests of the old and of the new bytes, so that no other disk is changed. It goes to standard output,
compressed by zstd.`,
		Example: `  dmsnap send disk.img disk.cow | ssh host dmsnap receive - copy.img
  dmsnap send disk.img tuesday.cow --since monday.cow --output tuesday.delta
  dmsnap send disk.img | ssh host dmsnap receive - whole.img
  dmsnap send vm1@before --since base --output vm1.delta --control fleet/control.sock`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c, args) },
	}
	f := c.Flags()
	f.StringVar(&o.control, "control", "", "control socket of the server that has NODE")
	f.StringVar(&o.since, "since", "", "COW of the older snapshot that the receiver has; with --control, a checkpoint or snapshot")
	f.StringVarP(&o.output, "output", "o", standardOutput, "file to write; \"-\" is standard output")
	f.BoolVar(&o.drop, "drop-unchanged", false, "leave out what was copied to a COW and never changed")
	f.BoolVar(&o.plain, "no-compress", false, "do not compress")
	f.Var(&o.from, "resume-from", "begin at this byte of the disk, where a receiver stopped")
	o.disk.add(f)
	f.BoolVar(&o.force, "force", false, "replace the output file if it exists")
	f.BoolVar(&o.json, "json", false, "print what was sent as JSON; to standard error where the stream goes to standard output")
	return c
}

func (o *sendOptions) run(c *cobra.Command, args []string) (err error) {
	switch {
	case o.control != "" && len(args) == 2:
		return errors.New("--control: one NODE is required")
	case o.control == "" && o.since != "" && len(args) == 1:
		return errors.New("--since: ORIGIN COW are required: it compares two snapshots of ORIGIN")
	}
	var inputs []string
	if o.control == "" {
		inputs = append(inputs, args...)
		if o.since != "" {
			inputs = append(inputs, o.since)
		}
	}
	if o.output == standardOutput {
		if err := checkNoTerminal(c, "redirect it, or use --output"); err != nil {
			return err
		}
	} else if err := checkOutput(o.output, o.force, inputs); err != nil {
		return err
	}
	ctx, stop := untilSignal()
	defer stop()
	o.disk.remote.Context = ctx
	from, opened, err := o.open(ctx, args)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, opened.Close()) }()
	res := sendResult{Kind: from.Source.Kind(), Size: from.Source.Size(), Name: from.Name, Since: from.Since}
	bar := progress.New(c.ErrOrStderr(), "send")
	defer bar.End()
	fill := func(w io.Writer) (err error) {
		res.Count, err = stream.Send(ctx, w, from.Source, stream.SendOptions{
			DropUnchanged: o.drop, Plain: o.plain, From: o.from.bytes, Complete: from.Check,
			Progress: func(reached int64) { bar.Show(reached, from.Source.Size()) },
		})
		return err
	}
	if o.output == standardOutput {
		err = writeStandardOutput(c, inputs, fill)
	} else {
		err = writeOutput(o.output, o.force, inputs, func(f *os.File) error { return fill(f) })
	}
	if err != nil {
		return err
	}
	bar.End()
	switch {
	case o.json:
		return printJSON(c, res)
	case o.output == standardOutput:
		return nil
	}
	what := ""
	if res.Name != "" {
		what = " of " + printable(res.Name)
	}
	return printf(c, "sent %s and %s of zeros%s, in %s\n", bytesText(res.Data), bytesText(res.Zero), what, plural(uint64(res.Records), "range"))
}

// open opens what is sent.
func (o *sendOptions) open(ctx context.Context, args []string) (*served.Disk, io.Closer, error) {
	s, err := o.disk.options(block.Options{})
	if err != nil {
		return nil, nil, err
	}
	if o.control != "" {
		d, err := served.Open(ctx, api.NewClient(o.control), args[0], o.since, s.NBD)
		return d, d, err
	}
	from, opened, err := offline.OpenChanges(args, o.since, s)
	return &served.Disk{Source: from}, opened, advise(err)
}
