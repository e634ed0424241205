package main

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/internal/eventlog"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/nbdkernel"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/source"
)

// attachOptions are the options of attach.
type attachOptions struct {
	nbdkernel.HoldOptions
	foreground, list, asJSON bool
	certificates             string
}

func newAttach() *cobra.Command {
	var o attachOptions
	c := &cobra.Command{
		Use:   "attach URI [/dev/nbdN]",
		Short: "Attach an NBD export as a block device, by the kernel's NBD client",
		Long: `Attach the export of an NBD URI as a block device of this host. The device is printed when it is ready: it has its size,
and its partitions are known. Without /dev/nbdN, the kernel chooses one. The kernel module nbd must be loaded
("modprobe nbd"); root is required. dmsnap detach ends it.

The kernel then speaks to the server by itself. When the server ends, requests fail.

With --foreground, dmsnap stays between them until a signal ends it, or dmsnap detach does. When the server ends and is
started again, also after it was killed, dmsnap connects again, and sends again what was written and not flushed, up to
64 MiB of which it keeps in memory. The device's users wait meanwhile. TLS requires --foreground: the kernel has none.

--list shows the devices that are attached, by whatever program.`,
		Example: `  dmsnap attach 'nbd+unix:///vm1?socket=nbd.sock'
  dmsnap attach --list`,
		Args: func(c *cobra.Command, args []string) error {
			if o.list {
				return cobra.ExactArgs(0)(c, args)
			}
			return cobra.RangeArgs(1, 2)(c, args)
		},
		RunE: func(c *cobra.Command, args []string) error { return o.run(c, args) },
	}
	f := c.Flags()
	f.BoolVar(&o.list, "list", false, "list the devices that are attached")
	f.BoolVar(&o.foreground, "foreground", false, "stay, and connect again when the server was started again")
	f.IntVar(&o.Connections, "connections", 1, "connections to the server, or with --foreground to the kernel")
	f.BoolVar(&o.ReadOnly, "read-only", false, "attach the device read-only")
	f.IntVar(&o.BlockSize, "block-size", 0, "logical block size in bytes, 512 to 4096 (default: the least that the server accepts)")
	f.DurationVar(&o.Timeout, "timeout", 0, "give a connection up when a request takes longer (default: never)")
	f.DurationVar(&o.DeadTimeout, "dead-timeout", 0, "how long requests wait when the server is lost (default: they fail at once; 5m with --foreground)")
	f.StringVar(&o.certificates, "nbd-certificates", "", "of an nbds URI: folder with ca-cert.pem and, if the server requires a certificate, client-cert.pem and client-key.pem")
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
	return c
}

func (o *attachOptions) run(c *cobra.Command, args []string) error {
	if o.list {
		return o.printList(c)
	}
	ctx, stop := untilSignal()
	defer stop()
	o.Index = nbdkernel.AnyIndex
	if len(args) > 1 {
		var err error
		if o.Index, err = nbdkernel.IndexOf(args[1]); err != nil {
			return err
		}
	}
	show := func(d nbdkernel.Device) error {
		return printResult(c, o.asJSON, d, "%s\n", d.Path)
	}
	if !o.foreground {
		d, err := nbdkernel.Attach(ctx, args[0], o.Options)
		if errors.Is(err, nbdkernel.ErrTLS) {
			err = fmt.Errorf("%w; --foreground has it", err)
		}
		if err != nil {
			return err
		}
		return show(d)
	}
	_ = server.BecomeIOFlusher() // where it is permitted
	log, endLog := eventlog.Writer(c.ErrOrStderr(), "dmsnap: ")
	defer endLog()
	o.Log = log
	o.Dial = func(ctx context.Context) (*nbd.Client, error) {
		if o.certificates == "" {
			return nbd.Dial(ctx, args[0])
		}
		config, err := source.LoadTLS(o.certificates)
		if err != nil {
			return nil, err
		}
		return nbd.DialTLS(ctx, args[0], config)
	}
	return nbdkernel.Hold(ctx, args[0], o.HoldOptions, show)
}

func (o *attachOptions) printList(c *cobra.Command) error {
	list, err := nbdkernel.List()
	if err != nil {
		return err
	}
	if o.asJSON {
		return printJSON(c, list)
	}
	w := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
	for _, d := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\n", d.Path, bytesText(d.SizeBytes), d.URI)
	}
	return w.Flush()
}

func newDetach() *cobra.Command {
	var force, asJSON bool
	c := &cobra.Command{
		Use:   "detach /dev/nbdN",
		Short: "Detach a block device that is attached to an NBD export",
		Long: `Make what was written to an NBD device durable and detach it from its server. A device in use, by a mounted file system
for one, is refused without --force; with it, its users get I/O errors.`,
		Example: `  dmsnap detach /dev/nbd0`,
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, stop := untilSignal()
			defer stop()
			if err := nbdkernel.Detach(ctx, args[0], force); err != nil {
				return err
			}
			return printResult(c, asJSON, map[string]string{"detached": args[0]}, "%s detached\n", args[0])
		},
	}
	c.Flags().BoolVar(&force, "force", false, "detach a device in use, too, and one that can't be flushed within a minute")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
