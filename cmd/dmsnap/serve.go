package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/text"
	"github.com/dmsnap/dmsnap/merge"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/store"
	"github.com/dmsnap/dmsnap/web"
)

// serveOptions are the options of serve.
type serveOptions struct {
	socket, listen string
	control        string
	vhostUser      string
	fuse           fuseFlags
	ioFlusher      bool
	operator       operatorFlags
	filesOnly      bool // of mount: no NBD server, and the end of the mount is the end
	exportOrigin   bool
	readOnly       bool
	create         bool
	force          bool
	disk           diskFlags
	store          storeFlag
	sync           syncFlag
	onFull         fullFlag
	grow, growMax  sizeFlag
	certificates   string
	tls            tlsFlag
	maxConnections uint
	idleTimeout    time.Duration
	chunkSize      sizeFlag
	merge          merge.Options
}

func newServe() *cobra.Command {
	var o serveOptions
	c := &cobra.Command{
		Use:   "serve ORIGIN [[NAME=]COW...]",
		Short: "Serve snapshots and their origin over NBD",
		Long: `Serve the snapshots of an origin over NBD, each as an export: NAME, or the base name of the COW file without its
extension. The export "" is the first snapshot. --export-origin also serves the origin, as "origin"; every
snapshot preserves what clients overwrite there. The text before the first "=" is a NAME unless it has a slash.

Without COW, ORIGIN.cow is used, and created if it does not exist; with --read-only the origin alone is served then. Any
other COW must hold a store, unless --create is given: then missing files and stores are created as by dmsnap create.
With --store N the exceptions are kept in memory, and the COW is scratch space without use afterwards.

ORIGIN may be a qcow2 image or an NBD URI; then it is only read. A format other than raw is logged, and recorded in the
stores that are created.

ORIGIN may be a part of a disk: DISK#pN is partition N, DISK#VG/LV a logical volume, without root or activation. An LV
that has snapshots, or is one, is served with all of them under their LVM names, and its origin: whatever is written
to the origin is preserved in every one, and LVM finds what was written when it activates the group again. A group that
is active on this host is refused. The disk is locked as a whole. With a part or a URI, COW and --socket or --listen
must be given; COW may be left out where an LV has snapshots, whose COW volumes have a fixed size.

The origin is opened read-only, and shared with other readers, unless --export-origin is given or a live merge
begins: both require exclusive use.

Without --socket or --listen, the socket is ORIGIN.sock. Sockets are accessible only to their owner (mode 0600).
--listen without a HOST means the loopback interface, since NBD has no authentication; 0.0.0.0:PORT is every
interface, IPv4 only; [::]:PORT is every interface, IPv6 too. Port 0 is a free port; the URI shows it.

When a COW is full, by its own size or because the file system below is full, nothing is lost: writes that require
space, to the snapshot and to the origin, fail with "no space" until there is some, and all other requests succeed.
See --on-full, --grow, and dmsnap grow.

The URI of each export is printed, one per line, when clients can connect. SIGINT, SIGTERM and SIGHUP (unless it is
ignored, as with nohup) complete the requests in flight, make everything durable, and end with status 0.

With --tls-certificates the server uses TLS, and its URIs begin with nbds. A service manager may pass the socket, and
one named "control" (systemd socket activation); then --socket, --listen and --control are not used.

With --fuse DIR each export is also a file DIR/NAME, of a file system that is mounted on DIR until the server ends, with
or without root. Its writes are durable after an fsync: see docs/devices.md.

With --vhost-user DIR each export is also a vhost-user-blk back-end, on the socket DIR/NAME.sock, for one virtual
machine at a time: see docs/devices.md. Requests take the way through shared memory, and not through NBD.

With --http [HOST:]PORT the server has a page for browsers, at the URL that is printed (its token is required), and
metrics for Prometheus at /metrics. --notify and --notify-exec send alerts: see docs/operations.md.

With --control PATH a running server accepts commands: see status, snapshot, drop, grow and merge.`,
		Example: `  dmsnap serve disk.img
  dmsnap serve disk.img before=disk.cow --export-origin --socket nbd.sock --control server.sock
  dmsnap serve disk.img a.cow b.cow --create --listen 127.0.0.1:10809
  dmsnap serve vm.img#vg0/root --socket nbd.sock`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, stop := untilSignal()
			defer stop()
			// A closed output pipe must not end the server.
			signal.Ignore(syscall.SIGPIPE)
			return o.run(ctx, args[0], args[1:], c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	f := c.Flags()
	f.StringVar(&o.socket, "socket", "", "listen on this unix socket (default ORIGIN.sock)")
	f.StringVar(&o.listen, "listen", "", "listen on TCP instead, at [HOST:]PORT")
	f.StringVar(&o.vhostUser, "vhost-user", "", "also listen in this folder, on a socket NAME.sock for each export, for virtual machines (vhost-user-blk)")
	f.StringVar(&o.fuse.dir, "fuse", "", "also show each export as a file NAME in this empty folder")
	o.fuse.add(f, "fuse-")
	o.operator.add(f)
	o.addStores(c)
	f.StringVar(&o.certificates, "tls-certificates", "", "use TLS with server-cert.pem and server-key.pem of this folder; if it has ca-cert.pem, clients require a certificate signed by it")
	f.Var(&o.tls, "tls", "with --tls-certificates: require TLS of every client, or allow it")
	f.UintVar(&o.maxConnections, "max-connections", 0, "maximum number of client connections (default: no limit)")
	f.DurationVar(&o.idleTimeout, "idle-timeout", 0, "disconnect clients without a request for this long, e.g. 10m (default: never)")
	f.BoolVar(&o.ioFlusher, "io-flusher", false, "the exports are block devices of this host: never wait for dirty pages to be written when memory is allocated; requires CAP_SYS_RESOURCE, and --fuse does it where it is permitted")
	c.MarkFlagsMutuallyExclusive("socket", "listen")
	return c
}

// addStores adds the flags that serve and mount share.
func (o *serveOptions) addStores(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.control, "control", "", "listen for the control API on this unix socket (default: none)")
	f.BoolVar(&o.exportOrigin, "export-origin", false, `serve the origin as "origin"`)
	f.BoolVar(&o.readOnly, "read-only", false, "open everything read-only")
	f.BoolVar(&o.create, "create", false, "create missing COW files and stores")
	f.Var(&o.store, "store", "P, PO (a full COW refuses writes and the snapshot stays valid) or N (in memory)")
	f.Var(&o.sync, "sync", "when a write is durable: at a flush, like a disk with a write cache, or always, before a write to a snapshot is acknowledged")
	f.Var(&o.onFull, "on-full", "what to do when the COW device is full: writes fail, pause until there is space, or invalidate the snapshot as the kernel does")
	f.Var(&o.grow, "grow", "when a COW file is full, make it longer by this size (default: never)")
	f.Var(&o.growMax, "grow-max", "maximum size for --grow")
	f.Var(&o.chunkSize, "chunk-size", "chunk size of created stores (default 4KiB)")
	f.BoolVar(&o.force, "force", false, "create stores and scratch space over existing content, and serve an origin that is too short for its store, or files that are mounted or used by other devices, or an origin with an incomplete merge of another COW")
	o.disk.add(f)
	c.MarkFlagsMutuallyExclusive("read-only", "create")
}

// attachments reads the [NAME=]COW arguments.
func (o *serveOptions) attachments(originPath string, args []string) (list []api.AttachRequest) {
	all := api.AttachRequest{Create: o.create, Force: o.force, ChunkSize: o.chunkSize.bytes, Store: o.store.String()}
	if len(args) == 0 {
		cow := originPath + ".cow"
		if _, err := os.Lstat(cow); o.readOnly && err != nil {
			return nil
		}
		all.Name, all.COW, all.Create = server.ExportName(cow), cow, !o.readOnly
		return []api.AttachRequest{all}
	}
	for _, arg := range args {
		list = append(list, server.Attachment(arg, all))
	}
	return list
}

// storesOf are the COW devices that hold a store, or will.
func storesOf(list []api.AttachRequest) (paths []string) {
	for _, q := range list {
		if q.Store != snapshot.Transient.String() {
			paths = append(paths, q.COW)
		}
	}
	return paths
}

// run serves until ctx ends or a listener fails. A refused serve leaves no file: all checks come first, then the origin
// is opened, then the sockets are made, and COW files last.
func (o *serveOptions) run(ctx context.Context, originPath string, cows []string, stdout, stderr io.Writer) (err error) {
	if _, err := o.chunkSize.chunkSectors(); err != nil {
		return err
	}
	if err := o.operator.check(); err != nil {
		return err
	}
	if o.ioFlusher {
		if err := server.BecomeIOFlusher(); err != nil {
			return err
		}
	}
	log := o.operator.openLog(stderr)
	defer log.end()
	at, err := o.listenAt(originPath)
	if err != nil {
		return err
	}
	list := o.attachments(originPath, cows)
	files, err := o.fuse.mount(log.line)
	if err != nil {
		return err
	}
	if o.filesOnly {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		go func() {
			<-files.Ended()
			cancel()
		}()
	}
	o.disk.remote.Context = ctx
	s, err := o.open(originPath, list, files, log)
	if err != nil {
		return errors.Join(advise(err), files.close())
	}
	defer func() { err = errors.Join(err, files.close(), s.Close()) }()
	if err := o.checkVolumes(s, originPath, cows); err != nil {
		return err
	}
	page, err := o.operator.listen()
	if err != nil {
		return err
	}
	l, control, err := at.Open()
	if err != nil {
		server.CloseListeners(page)
		return err
	}
	if err := o.attach(s, list, len(cows) > 0); err != nil {
		server.CloseListeners(l, control, page)
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	wait := s.Start(ctx, l, control)
	if s.OriginFormat() != ondisk.RawFormat || o.disk.raw {
		log.line(fmt.Sprintf("%s: the format of the origin is %s", originPath, strings.Replace(s.OriginFormat(), "@", ", version ", 1)))
	}
	var text bytes.Buffer
	st := s.Status()
	for _, v := range st.Snapshots {
		printExport(&text, v.Name, v.URI, v.VhostUser, v.File)
	}
	if st.Origin.URI != "" || st.Origin.File != "" {
		printExport(&text, st.Origin.Name, st.Origin.URI, st.Origin.VhostUser, st.Origin.File)
	}
	watched, err := o.operator.start(ctx, page, web.Config{Tree: func() (api.Tree, error) { return s.Tree(), nil }, API: s.Handler()}, log, &text)
	if err != nil {
		server.CloseListeners(page)
		stop()
		return errors.Join(err, wait())
	}
	defer func() {
		stop()
		err = errors.Join(err, watched())
	}()
	stdout.Write(text.Bytes()) // who does not read it may still use what is served
	reportReady(text.Bytes())
	return wait()
}

// printExport prints where an export is found.
func printExport(w io.Writer, name, uri, vhostSocket, file string) {
	if uri != "" {
		fmt.Fprintf(w, "%s  %s\n", printable(name), uri)
	}
	if vhostSocket != "" {
		fmt.Fprintf(w, "%s  vhost-user %s\n", printable(name), printable(vhostSocket))
	}
	if file != "" {
		fmt.Fprintf(w, "%s  file %s\n", printable(name), printable(file))
	}
}

// open opens the origin. The caller closes the server.
func (o *serveOptions) open(originPath string, cows []api.AttachRequest, files mounted, log serverLog) (s *server.Server, err error) {
	disk, err := o.disk.options(block.Options{})
	if err != nil {
		return nil, err
	}
	if disk.Format, err = source.FormatOf(originPath, storesOf(cows)...); err != nil {
		return nil, err
	}
	opts := server.Options{ReadOnly: o.readOnly, Raw: o.disk.raw, Format: disk.Format, Open: source.Opener(disk), Force: o.force, Sync: o.sync.SyncMode, OnFull: o.onFull.FullPolicy, Merge: o.merge, Log: log.Line, Logger: log.Logger, VhostUser: o.vhostUser, Observe: o.operator.http != "",
		Grow: snapshot.Growth{Step: o.grow.bytes, Max: o.growMax.bytes},
		NBD:  nbd.Options{MaxConnections: int(o.maxConnections), IdleTimeout: o.idleTimeout}}
	if files.Server != nil {
		opts.Files = files
	}
	if o.certificates != "" {
		if opts.NBD.TLS, err = server.LoadTLS(o.certificates); err != nil {
			return nil, err
		}
		opts.NBD.RequireTLS = !o.tls.allow
	}
	return server.Open(originPath, opts)
}

// checkVolumes requires COW files of an address that has no snapshots of its own.
func (o *serveOptions) checkVolumes(s *server.Server, originPath string, cows []string) error {
	switch {
	case len(cows) > 0 || source.IsFile(originPath):
		return nil
	case !s.HasVolumes() && o.readOnly:
		return nil
	case !s.HasVolumes():
		return fmt.Errorf("%s: COW is required: it is not an LVM volume with snapshots; --read-only serves it alone", originPath)
	case o.grow.bytes > 0:
		return fmt.Errorf("%s: --grow: COW volumes have a fixed size", originPath)
	}
	return nil
}

// attach exports the origin, if requested, and attaches the snapshots, all or none: of a volume those of its group, and those of
// the list, unless that is a default.
func (o *serveOptions) attach(s *server.Server, list []api.AttachRequest, explicit bool) error {
	if o.exportOrigin {
		if err := s.ExportOrigin(); err != nil {
			return err
		}
	}
	if len(list) == 0 && !s.HasVolumes() {
		return advise(s.ExportAlone())
	}
	err := s.AttachVolumes()
	if err == nil && (explicit || !s.HasVolumes()) {
		err = s.AttachAll(list)
	}
	switch {
	case errors.Is(err, store.ErrOriginTooSmall):
		err = fmt.Errorf("%w; --force serves it nevertheless", err)
	case errors.Is(err, cowfile.ErrOnlyRead):
		return fmt.Errorf("%w; --read-only serves it for reading", err)
	}
	return advise(err)
}

// listenAt are the addresses, checked before anything is opened.
func (o *serveOptions) listenAt(originPath string) (l server.Listeners, err error) {
	l = server.Listeners{Without: o.filesOnly, Socket: o.socket, Listen: o.listen, Control: o.control}
	if l.Passed, err = server.PassedListeners(); err != nil {
		return l, err
	}
	if l.Socket == "" {
		if l.Socket = originPath + ".sock"; l.Listen == "" && l.Passed["nbd"] == nil && !l.Without && !source.IsFile(originPath) {
			return l, fmt.Errorf("%s: --socket or --listen is required with a part of a disk or a URI", originPath)
		}
	}
	return l, l.Check()
}

// printable is a name as it is printed.
func printable(name string) string { return text.Name(name) }
