package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"os/user"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/fleet/daemon"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/web"
)

// daemonOptions are the options of daemon.
type daemonOptions struct {
	daemon.Config
	group, mode    string
	operator       operatorFlags
	disk           diskFlags
	sync           syncFlag
	chunkSize      sizeFlag
	maxConnections uint
	idleTimeout    time.Duration
}

func newDaemon() *cobra.Command {
	var o daemonOptions
	c := &cobra.Command{
		Use:   "daemon --dir DIR",
		Short: "Serve a fleet of disks that are forked from one another",
		Long: `Serve the disks, checkpoints and nodes in DIR over NBD, and accept commands that change them: disk, tree, fork,
checkpoint, rollback, squash, drop, merge, adopt, export, policy, table and status with --control. DIR is made if there is
none. Its state survives kill -9 at any moment. One daemon at a time uses DIR.

NBD clients connect to DIR/nbd.sock, commands to DIR/control.sock, unless options say otherwise. The sockets are for the user of the
daemon alone (mode 0600); --socket-mode and --socket-group let others in: they may do everything but name files, add and
remove disks, merge and set policies. --listen also serves on TCP, without a HOST on the loopback interface. With --access
FILE, a client on TCP has the rights that FILE gives to the name in its certificate: a line each of NAME, DISK ("*": all)
and read, write or admin; others are refused.

Files in requests must lie below a folder given with --allow-path; without one none is opened.

The freeze command runs with the argument freeze before checkpoints are made, and with thaw after, always. The nodes are in
$DMSNAP_NODES. One that fails, or takes longer than --freeze-timeout, refuses the checkpoint.

SIGTERM and SIGINT complete the requests in flight, make everything durable, and end with status 0, within 10 s. SIGHUP reads
certificates, --access and --policies again. docs/fleet.md has the whole from installation to a hundred virtual machines.`,
		Example: `  dmsnap daemon --dir fleet --allow-path .`,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			reload := make(chan struct{}, 1)
			ctx, stop := untilSignal(func() {
				select {
				case reload <- struct{}{}:
				default:
				}
			})
			defer stop()
			signal.Ignore(syscall.SIGPIPE)
			return o.run(ctx, reload, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	f := c.Flags()
	f.StringVar(&o.Dir, "dir", "", "folder of the state and the layers")
	f.StringVar(&o.Control, "control", "", "listen for commands on this unix socket (default DIR/control.sock)")
	f.StringVar(&o.Socket, "socket", "", "listen for NBD clients on this unix socket (default DIR/nbd.sock)")
	f.StringVar(&o.group, "socket-group", "", "group of both sockets, by name or number (default: that of the process)")
	f.StringVar(&o.mode, "socket-mode", "0600", "mode of both sockets, octal")
	f.StringVar(&o.Listen, "listen", "", "listen for NBD clients on TCP too, at [HOST:]PORT")
	f.StringVar(&o.Certificates, "tls-certificates", "", "TLS for --listen, with server-cert.pem and server-key.pem of this folder; if it has ca-cert.pem, clients require a certificate signed by it")
	f.StringVar(&o.Access, "access", "", "file with the rights of clients on TCP, by the names in their certificates")
	f.StringArrayVar(&o.AllowPaths, "allow-path", nil, "folder below which requests may name files (repeatable)")
	f.StringVar(&o.Freeze.Command, "freeze-command", "", "shell command that runs before (freeze) and after (thaw) checkpoints are made")
	f.DurationVar(&o.Freeze.Timeout, "freeze-timeout", 10*time.Second, "maximum time of the freeze command")
	f.StringVar(&o.Policies, "policies", "", "file with policies of disks that have none of their own: a line each of DISK (\"*\": all) and KEY=VALUE")
	f.Var(&o.sync, "sync", "when a write is durable: at a flush, like a disk with a write cache, or always, before it is acknowledged")
	f.UintVar(&o.maxConnections, "max-connections", 0, "maximum number of client connections (default: no limit)")
	f.DurationVar(&o.idleTimeout, "idle-timeout", 0, "disconnect clients without a request for this long, e.g. 10m (default: never)")
	f.Var(&o.chunkSize, "chunk-size", "chunk size of new layers (default 4KiB)")
	o.operator.add(f)
	o.disk.addRemote(f)
	c.MarkFlagRequired("dir")
	return c
}

// run serves until ctx ends or a listener fails.
func (o *daemonOptions) run(ctx context.Context, reload <-chan struct{}, stdout, stderr io.Writer) (err error) {
	chunkSectors, err := o.chunkSize.chunkSectors()
	if err != nil {
		return err
	}
	if o.Mode, err = socketMode(o.mode); err != nil {
		return err
	}
	if o.Group, err = groupID(o.group); err != nil {
		return err
	}
	o.disk.remote.Context = ctx
	disk, err := o.disk.options(block.Options{})
	if err != nil {
		return err
	}
	if err := o.operator.check(); err != nil {
		return err
	}
	log := o.operator.openLog(stderr)
	defer log.end()
	o.Log, o.Logger = log.Line, log.Logger
	page, err := o.operator.listen()
	if err != nil {
		return err
	}
	defer server.CloseListeners(page)
	if o.operator.watched() {
		o.Beside = func(ctx context.Context, d *daemon.Daemon, control http.Handler) (func() error, error) {
			return o.operator.start(ctx, page, web.Config{Tree: func() (api.Tree, error) { return d.Tree(), nil }, Version: func() any { return d.Version() }, API: control}, log, stdout)
		}
	}
	if o.Passed, err = server.PassedListeners(); err != nil {
		return err
	}
	return o.Serve(ctx, reload, fleet.Options{Open: source.Opener(disk), Sync: o.sync.SyncMode, ChunkSectors: chunkSectors, Observe: o.operator.http != "",
		NBD: nbd.Options{MaxConnections: int(o.maxConnections), IdleTimeout: o.idleTimeout}}, func(uris []string) {
		for _, uri := range uris {
			fmt.Fprintf(stdout, "%s\n", uri)
		}
	})
}

func socketMode(text string) (os.FileMode, error) {
	n, err := strconv.ParseUint(text, 8, 32)
	if err != nil || n&^0o777 != 0 {
		return 0, fmt.Errorf("--socket-mode: %q is not an octal mode such as 0660", text)
	}
	return os.FileMode(n), nil
}

// groupID is the number of a group, -1 of "".
func groupID(name string) (int, error) {
	if name == "" {
		return -1, nil
	}
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, fmt.Errorf("--socket-group: %w", err)
	}
	return strconv.Atoi(g.Gid)
}
