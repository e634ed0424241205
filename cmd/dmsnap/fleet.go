package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/fleet/daemon"
	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/server/api"
)

// The verbs of a fleet: requests to its daemon.

// controlVariable names the control socket of verbs that have no offline form.
const controlVariable = "DMSNAP_CONTROL"

// addControl adds --control to a verb without an offline form.
func addControl(c *cobra.Command, control *string) {
	c.Flags().StringVar(control, "control", "", "control socket of the server (default $"+controlVariable+")")
	c.PreRunE = func(*cobra.Command, []string) error {
		if *control == "" {
			*control = os.Getenv(controlVariable)
		}
		if *control == "" {
			return errors.New("--control PATH is required, or $" + controlVariable)
		}
		return nil
	}
}

// asking completes a verb that makes a request: do makes it, and print prints what it returned, unless that is wanted as JSON.
func asking[T any](c *cobra.Command, do func(context.Context, *api.Client, []string) (T, error), print func(*cobra.Command, T) error) *cobra.Command {
	var control string
	var asJSON bool
	c.RunE = func(c *cobra.Command, args []string) error {
		ctx, stop := untilSignal()
		defer stop()
		reply, err := do(ctx, api.NewClient(control), args)
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(c, reply)
		}
		return print(c, reply)
	}
	addControl(c, &control)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func printElement(c *cobra.Command, e api.Element) error { return textTo(c).Element(e) }

func newTree() *cobra.Command {
	return asking(&cobra.Command{
		Use:   "tree --control PATH",
		Short: "Show the disks, checkpoints and nodes of a fleet",
		Long: `Show the disks of a daemon with the checkpoints and nodes over them: what each layer uses of the size of its disk, and
the URI of each node.`,
		Example: `  dmsnap tree --control fleet/control.sock`,
		Args:    cobra.NoArgs,
	}, func(ctx context.Context, ctl *api.Client, _ []string) (api.Tree, error) { return ctl.Tree(ctx) },
		func(c *cobra.Command, t api.Tree) error { return textTo(c).Tree(t) })
}

func newDisk() *cobra.Command {
	var q api.AddDiskRequest
	c := asking(&cobra.Command{
		Use:   "disk {add NAME SOURCE | list | show NAME | remove NAME}",
		Short: "Show the disks of a fleet, add and remove them",
		Long: `Manage the disks of a daemon. SOURCE is a file, a block device, a qcow2 image, a part of a disk (DISK#pN, DISK#VG/LV) or an NBD
URI; files must lie below a folder that the daemon allows. With --writable the disk is exported itself; its nodes keep
what it had. A disk with nodes or checkpoints can't be removed. Its source is never removed.`,
		Example: `  dmsnap disk add more copy.img --control fleet/control.sock
  dmsnap disk list --control fleet/control.sock
  dmsnap disk show more --control fleet/control.sock
  dmsnap disk remove more --control fleet/control.sock`,
		Args: func(_ *cobra.Command, args []string) error {
			want := map[string]int{"add": 3, "list": 1, "show": 2, "remove": 2}
			if len(args) == 0 || want[args[0]] != len(args) {
				return errors.New("add NAME SOURCE, list, show NAME or remove NAME is required")
			}
			if args[0] != "add" && q != (api.AddDiskRequest{}) {
				return errors.New("--format, --raw and --writable are for disk add")
			}
			return nil
		},
	}, func(ctx context.Context, ctl *api.Client, args []string) (any, error) {
		switch args[0] {
		case "add":
			q.Name, q.Source = args[1], args[2]
			if !strings.Contains(q.Source, "://") { // the daemon may have another working directory
				var err error
				if q.Source, err = filepath.Abs(q.Source); err != nil {
					return nil, err
				}
			}
			d, err := ctl.AddDisk(ctx, q)
			return d, advise(err)
		case "list":
			return ctl.Disks(ctx)
		case "show":
			return ctl.Disk(ctx, args[1])
		}
		return dropped{args[1]}, ctl.RemoveDisk(ctx, args[1])
	}, func(c *cobra.Command, reply any) error {
		switch r := reply.(type) {
		case api.Disks:
			return textTo(c).Disks(r)
		case api.Disk:
			return textTo(c).Disk(r)
		}
		return printf(c, "%s removed\n", printable(reply.(dropped).Name))
	})
	f := c.Flags()
	f.StringVar(&q.Format, "format", "", "with add: raw or qcow2 (default: it is found out)")
	f.BoolVar(&q.Raw, "raw", false, "with add: use the bytes of SOURCE as the disk, even if it looks like an image of another format")
	f.BoolVar(&q.Writable, "writable", false, "with add: export the disk itself too, for writing")
	return c
}

// dropped is the JSON of what was removed.
type dropped struct {
	Name string `json:"dropped"`
}

func printDropped(c *cobra.Command, d dropped) error {
	return printf(c, "%s dropped\n", printable(d.Name))
}

func newFork() *cobra.Command {
	var q api.ForkRequest
	var size sizeFlag
	c := asking(&cobra.Command{
		Use:   "fork --control PATH FROM NEW",
		Short: "Make a node from a disk, a checkpoint or a running node",
		Long: `Make the node NEW, a writable disk that begins as FROM: a disk, a checkpoint (NODE@NAME), or a node at this moment, whose
clients stay connected. It takes about a millisecond, whatever the size.

With --size the node is larger than FROM; what lies behind reads as zeros. With --durable the command waits until the node
would survive a power failure; otherwise it does from its first flush on.`,
		Example: `  dmsnap fork base vm2 --control fleet/control.sock
  dmsnap fork vm1 vm3 --size 20GiB --control fleet/control.sock`,
		Args: cobra.ExactArgs(2),
	}, func(ctx context.Context, ctl *api.Client, args []string) (api.Element, error) {
		q.From, q.Name, q.Size = args[0], args[1], size.bytes
		return ctl.Fork(ctx, q)
	}, printElement)
	c.Flags().Var(&size, "size", "size of the node (default: that of FROM)")
	c.Flags().BoolVar(&q.Durable, "durable", false, "wait until it is on the disk")
	return c
}

func newCheckpoint() *cobra.Command {
	var q api.CheckpointRequest
	c := asking(&cobra.Command{
		Use:   "checkpoint --control PATH NODE... --name N",
		Short: "Make checkpoints of nodes at one moment",
		Long: `Keep the state of one or more nodes as NODE@N, while their clients continue. All are of one moment: a write that depends on
another node's write is in no checkpoint without it. The freeze command of the daemon runs before and after.`,
		Example: `  dmsnap checkpoint vm1 --name clean --control fleet/control.sock`,
		Args:    cobra.MinimumNArgs(1),
	}, func(ctx context.Context, ctl *api.Client, args []string) (api.Checkpoints, error) {
		q.Nodes = args
		return ctl.Checkpoint(ctx, q)
	}, func(c *cobra.Command, r api.Checkpoints) (err error) {
		for _, e := range r.Checkpoints {
			err = errors.Join(err, textTo(c).Element(e))
		}
		return err
	})
	c.Flags().StringVar(&q.Name, "name", "", "name of the checkpoint")
	c.Flags().BoolVar(&q.Durable, "durable", false, "wait until they are on the disk")
	c.MarkFlagRequired("name")
	return c
}

func newRollback() *cobra.Command {
	var q api.RollbackRequest
	c := asking(&cobra.Command{
		Use:   "rollback --control PATH NODE CHECKPOINT",
		Short: "Make a node show an earlier checkpoint again",
		Long: `Make NODE show CHECKPOINT, one of those that it was made of. What was written since the last checkpoint is lost; later
checkpoints stay. It is refused while clients are connected; --force disconnects them.`,
		Example: `  dmsnap rollback vm1 vm1@before --control fleet/control.sock`,
		Args:    cobra.ExactArgs(2),
	}, func(ctx context.Context, ctl *api.Client, args []string) (api.Element, error) {
		q.Node, q.Checkpoint = args[0], args[1]
		return ctl.Rollback(ctx, q)
	}, printElement)
	c.Flags().BoolVar(&q.Force, "force", false, "disconnect the clients of NODE")
	c.Flags().BoolVar(&q.Durable, "durable", false, "wait until it is on the disk")
	return c
}

func newSquash() *cobra.Command {
	return asking(&cobra.Command{
		Use:   "squash --control PATH {NODE | CHECKPOINT}",
		Short: "Merge the layers that are a node's own into one",
		Long: `Copy the layers that only NODE needs into one, while its clients continue. Named checkpoints, and layers that other nodes
need, stay. Of a CHECKPOINT, it is the layers without a name below it.`,
		Example: `  dmsnap squash vm1 --control fleet/control.sock`,
		Args:    cobra.ExactArgs(1),
	}, func(ctx context.Context, ctl *api.Client, args []string) (api.Element, error) {
		return ctl.Squash(ctx, args[0])
	}, printElement)
}

func newAdopt() *cobra.Command {
	var q api.AdoptRequest
	c := asking(&cobra.Command{
		Use:   "adopt --control PATH NODE COW --disk DISK",
		Short: "Make a node of an existing COW file",
		Long: `Make the store COW, of a snapshot of DISK, the layer of the new node NODE. The file stays where it is, below a folder that the
daemon allows, and belongs to the daemon from then on.`,
		Example: `  dmsnap adopt old more.cow --disk base --control fleet/control.sock`,
		Args:    cobra.ExactArgs(2),
	}, func(ctx context.Context, ctl *api.Client, args []string) (e api.Element, err error) {
		q.Node = args[0]
		if q.COW, err = filepath.Abs(args[1]); err != nil {
			return e, err
		}
		return ctl.Adopt(ctx, q)
	}, printElement)
	c.Flags().StringVar(&q.Disk, "disk", "", "disk of which COW is a snapshot")
	c.MarkFlagRequired("disk")
	return c
}

func newPolicy() *cobra.Command {
	return asking(&cobra.Command{
		Use:   "policy --control PATH DISK [KEY=VALUE...]",
		Short: "Show or set what the nodes of a disk may use and what is kept",
		Long: `Set keys of the policy of DISK, and show it. KEY= removes a key. The keys:

  on-full                  fail or pause: what writes do when a quota is reached
  quota, node-quota        most space that the layers of the disk, and those that are a node's own, may use
  grow                     by how much a node's quota grows when it is reached, while quota allows it
  max-nodes                most nodes
  idle-drop                drop nodes without clients for so long, e.g. 36h
  keep-last, hourly, daily how many checkpoints of each node to keep: the last ones, and the last of each hour and day;
                           without any of the three, all
  read-iops, write-iops, read-bytes, write-bytes   most requests and bytes a second, of each node`,
		Example: `  dmsnap policy base keep-last=3 daily=7 max-nodes=100 --control fleet/control.sock
  dmsnap policy base daily= --control fleet/control.sock`,
		Args: cobra.MinimumNArgs(1),
	}, func(ctx context.Context, ctl *api.Client, args []string) (api.Disk, error) {
		if len(args) == 1 {
			return ctl.Disk(ctx, args[0])
		}
		set := map[string]string{}
		for _, arg := range args[1:] {
			key, value, ok := strings.Cut(arg, "=")
			if !ok {
				return api.Disk{}, fmt.Errorf("%q is not KEY=VALUE: the keys are %s", arg, strings.Join(daemon.PolicyKeys(), ", "))
			}
			set[key] = value
		}
		return ctl.SetPolicy(ctx, args[0], set)
	}, func(c *cobra.Command, d api.Disk) error { return textTo(c).Disk(d) })
}

func newTable() *cobra.Command {
	return asking(&cobra.Command{
		Use:     "table --control PATH NODE",
		Short:   "Show the device-mapper tables with which a kernel shows a node",
		Long:    `Show the tables for dmsetup, bottom-up, with which a kernel shows the same disk as NODE while no daemon uses it.`,
		Example: `  dmsnap table vm1 --control fleet/control.sock`,
		Args:    cobra.ExactArgs(1),
	}, func(ctx context.Context, ctl *api.Client, args []string) (api.Table, error) {
		return ctl.Table(ctx, args[0])
	}, func(c *cobra.Command, t api.Table) error { return textTo(c).Table(t) })
}

// mergeNode starts the merge of a node into its disk, and waits for its end if that is asked for. A signal ends the wait,
// not the merge.
func (l *liveMerge) mergeNode(ctx context.Context, c *cobra.Command, ctl *api.Client, args []string, asJSON bool) error {
	if len(args) == 0 {
		return errors.New("in a fleet, merge takes the NAME of a node")
	}
	request := ctl.MergeNode
	switch {
	case l.pause:
		request = ctl.PauseNodeMerge
	case l.resume:
		request = ctl.ResumeNodeMerge
	}
	m, err := request(ctx, args[0])
	if err == nil && l.wait {
		bar := progress.New(c.ErrOrStderr(), "merge")
		m, err = ctl.WaitForNodeMerge(ctx, m, func(m api.TreeMerge) { bar.Show(m.CopiedBytes, m.TotalBytes) })
		bar.End()
		err = continues(err, "daemon")
	}
	switch {
	case err == nil && asJSON:
		err = printJSON(c, m)
	case err == nil:
		err = textTo(c).TreeMerge(m)
	}
	if err == nil && m.State == api.MergeFailed {
		err = fmt.Errorf("the merge of %s failed: %s", printable(m.Node), m.Error)
	}
	return err
}

// nodeSource replaces the name of a node, checkpoint or disk of a fleet by the URI of its content at this moment, until done is
// called. A node is made for it, which done drops, or the daemon when the program was killed. What can be refused of the
// output is, before that.
func nodeSource(ctx context.Context, control string, inputs []string, output string, force bool) (done func(), err error) {
	if len(inputs) != 1 {
		return nil, errors.New("with --control, NODE and OUT are required")
	}
	if output != standardOutput {
		if err := checkOutput(output, force, nil); err != nil {
			return nil, err
		}
	}
	ctl := api.NewClient(control)
	e, err := ctl.Fork(ctx, api.ForkRequest{From: inputs[0], Name: fmt.Sprintf("%s%d.%d", daemon.TemporaryPrefix, os.Getpid(), time.Now().UnixNano())})
	if err != nil {
		return nil, err
	}
	inputs[0] = e.URI
	return func() { ctl.DropNode(context.WithoutCancel(ctx), e.Name) }, nil
}
