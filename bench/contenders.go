package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A contender is a column of the table: one way to serve the same origin.
type contender struct {
	key, title string
	needs      string // the program, "" for dmsnap itself
	// create makes an empty overlay; nil when the overlay ends with the process, or there is none.
	create func(ctx context.Context, l *lab, base, image string) error
	// serve is the command line of the server; nil when fio goes to the image itself.
	serve  func(l *lab, base, image, socket string) []string
	export string
	// open starts a server that is not reached over NBD, instead of serve.
	open func(ctx context.Context, l *lab, base, image string) (*target, error)
	// raw: there is no overlay, the image is a copy of the origin.
	raw bool
}

// The columns' keys. A bar names those it compares with.
const (
	ours     = "dmsnap"
	ourRaw   = "dmsnap-raw"
	qcow2    = "qcow2"
	qcow2by4 = "qcow2-4k"
	cow      = "nbdkit-cow"
	cowBy4   = "nbdkit-cow-4k"
	file     = "nbdkit-file"
	direct   = "direct"
	floor    = "floor"

	ourVhost         = "dmsnap-vhost"
	storageDaemon    = "storage-daemon"
	storageDaemonBy4 = "storage-daemon-4k"
	ourFuse          = "dmsnap-fuse"
	nbdfuse          = "nbdfuse"
)

var (
	durablePeers = []string{qcow2, qcow2by4}
	volatile     = []string{cow, cowBy4}
	cowPeers     = []string{qcow2, qcow2by4, cow, cowBy4}
)

// contenders in the order of the columns. The peers run with their defaults and, since blocks of 64 KiB cost
// them much in random writes of 4 KiB, with blocks of 4 KiB as well: the better one is the one to beat.
var contenders = append([]contender{
	{key: ours, title: "dmsnap",
		create: createDmsnap, serve: serveDmsnap},
	{key: ourRaw, title: "dmsnap raw", raw: true,
		serve: serveDmsnapRaw, export: "origin"},
	{key: qcow2, title: "qcow2", needs: "qemu-nbd",
		create: createQcow2("64k"), serve: serveQcow2},
	{key: qcow2by4, title: "qcow2 4k", needs: "qemu-nbd",
		create: createQcow2("4k"), serve: serveQcow2},
	{key: cow, title: "nbdkit cow", needs: "nbdkit",
		serve: serveCOW("64K")},
	{key: cowBy4, title: "nbdkit cow 4k", needs: "nbdkit",
		serve: serveCOW("4K")},
	{key: file, title: "nbdkit file", needs: "nbdkit", raw: true,
		serve: func(l *lab, base, image, socket string) []string {
			return []string{"nbdkit", "-f", "-U", socket, "file", image}
		}},
	{key: direct, title: "pread/pwrite", raw: true},
	{key: floor, title: "floor", raw: true,
		serve: func(l *lab, base, image, socket string) []string { return []string{l.self, "floor", socket, image} }},
	{key: ourVhost, title: "dmsnap vhost-user", create: createDmsnap, open: openVhost},
	{key: storageDaemon, title: "qemu-storage-daemon", needs: "qemu-storage-daemon", create: createQcow2("64k"), open: openStorageDaemon},
	{key: storageDaemonBy4, title: "qemu-storage-daemon 4k", needs: "qemu-storage-daemon", create: createQcow2("4k"), open: openStorageDaemon},
	{key: ourFuse, title: "dmsnap FUSE", create: createDmsnap, open: openFuse},
	{key: nbdfuse, title: "nbdfuse", needs: "nbdfuse", create: createDmsnap, open: openNbdfuse},
}, sourceContenders...)

// titled returns the title of a column.
func titled(key string) string {
	for _, c := range contenders {
		if c.key == key {
			return c.title
		}
	}
	return key
}

// find returns a contender by its key.
func find(key string) contender {
	for _, c := range contenders {
		if c.key == key {
			return c
		}
	}
	panic("no contender " + key)
}

// available says whether the contender's program is there.
func (c contender) available() bool {
	if c.needs == "" {
		return true
	}
	_, err := exec.LookPath(c.needs)
	return err == nil
}

func createDmsnap(ctx context.Context, l *lab, base, image string) error {
	return command(ctx, l.binary, "create", base, image)
}

func serveDmsnap(l *lab, base, image, socket string) []string {
	return []string{l.binary, "serve", base, "snap=" + image, "--socket", socket}
}

// serveDmsnapRaw serves the image as an origin. A server has one snapshot at least when it starts;
// [lab.open] drops it.
func serveDmsnapRaw(l *lab, base, image, socket string) []string {
	return []string{l.binary, "serve", image, "none=" + l.path("none.cow"), "--create",
		"--export-origin", "--socket", socket, "--control", l.path("c.sock")}
}

func createQcow2(cluster string) func(ctx context.Context, l *lab, base, image string) error {
	return func(ctx context.Context, l *lab, base, image string) error {
		return command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base,
			"-o", "cluster_size="+cluster, image)
	}
}

// serveQcow2 has qemu-nbd's default cache mode, writeback: flushes reach the disk. As many clients as come.
func serveQcow2(l *lab, base, image, socket string) []string {
	return []string{"qemu-nbd", "-t", "-e", "64", "-f", "qcow2", "-k", socket, image}
}

// serveCOW keeps what is written in an unlinked file in the scratch directory.
func serveCOW(blocks string) func(l *lab, base, image, socket string) []string {
	return func(l *lab, base, image, socket string) []string {
		return []string{"env", "TMPDIR=" + l.dir, "nbdkit", "-f", "-U", socket, "--filter=cow", "file", base, "cow-block-size=" + blocks}
	}
}

// A target is what clients work on: a server that runs, or a file.
type target struct {
	server *server
	export string
	uri    string   // of the NBD export, or
	path   string   // of the file
	mount  string   // path is in a file system that is mounted: fio bypasses its cache
	vhost  bool     // the server's socket is of vhost-user
	behind *server  // the server that server is a client of
	files  []string // origin and overlay, as far as they have names
}

// servers are the processes that serve, the one that clients connect to first.
func (t *target) servers() []*server {
	var all []*server
	for _, s := range []*server{t.server, t.behind} {
		if s != nil {
			all = append(all, s)
		}
	}
	return all
}

func (t *target) close() error {
	var errs []error
	for _, s := range t.servers() {
		errs = append(errs, s.stop())
	}
	return errors.Join(errs...)
}

// open starts c on an image that is there, or made already.
func (l *lab) open(ctx context.Context, c contender, base, image string) (*target, error) {
	switch {
	case c.open != nil:
		return c.open(ctx, l, base, image)
	case c.serve == nil:
		return &target{path: image}, nil
	}
	s, err := l.start(ctx, func(socket string) []string { return c.serve(l, base, image, socket) })
	if err != nil {
		return nil, err
	}
	if c.key == ourRaw {
		if err := command(ctx, l.binary, "drop", "--control", l.path("c.sock"), "none"); err != nil {
			return nil, errors.Join(err, s.stop())
		}
	}
	return &target{server: s, export: c.export, uri: s.uri(c.export)}, nil
}

// prepare brings c into the state in which a workload begins: an empty overlay, or one into which fill was
// written through the server itself. Where the overlay is a file that state is made once and kept; changes says
// that the workload changes which chunks are in the overlay, so that it gets a copy.
func (l *lab) prepare(ctx context.Context, c contender, fill *job, changes bool) (*target, error) {
	base, err := l.image("base.img", l.origin)
	if err != nil {
		return nil, err
	}
	var image string
	switch {
	case c.raw:
		if image, err = l.image("raw.img", l.origin); err != nil {
			return nil, err
		}
		fill = nil // all of it is there already
	case c.create == nil: // in the process
	case fill == nil:
		if image, err = l.overlay(ctx, c, base); err != nil {
			return nil, err
		}
	default:
		if image, err = l.template(ctx, c, base, fill); err != nil {
			return nil, err
		}
		if changes {
			kept := image
			image = l.path(c.key + ".run")
			if err := copyImage(ctx, kept, image); err != nil {
				return nil, err
			}
		}
		if err := warm(image); err != nil {
			return nil, err
		}
	}
	t, err := l.open(ctx, c, base, image)
	if err != nil {
		return nil, err
	}
	t.files = []string{base, image}
	if c.raw {
		t.files = []string{image}
	}
	if fill != nil && c.create == nil {
		if _, err := l.fio(ctx, *fill, t); err != nil {
			return nil, errors.Join(fmt.Errorf("fill: %w", err), t.close())
		}
	}
	settle()
	return t, nil
}

// readAgain drops what is cached of the files of t, also of those without a name, and reads them from their beginnings, as after a start of the machine.
// The kernel caches a file that was written by 4 KiB at random in pages of 4 KiB, and one that was read in order in large folios, which are cheaper to read:
// without this, a row compares the ways in which its files were written.
func (t *target) readAgain() error {
	files := slices.DeleteFunc(slices.Clone(t.files), func(path string) bool { return path == "" })
	for _, s := range t.servers() {
		open, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", s.cmd.Process.Pid))
		if err != nil {
			return err
		}
		for _, fd := range open {
			if name, err := os.Readlink(fd); err == nil && strings.HasSuffix(name, " (deleted)") {
				files = append(files, fd)
			}
		}
	}
	return readAgain(files)
}

// readAgain is target.readAgain of files alone.
func readAgain(files []string) error {
	for _, path := range files {
		info, err := os.Stat(path)
		if err != nil || !info.Mode().IsRegular() {
			continue // closed meanwhile
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
		if err == nil {
			err = warm(path)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// overlay makes an empty overlay in place of the last one.
func (l *lab) overlay(ctx context.Context, c contender, base string) (string, error) {
	image := l.path(c.key + ".run")
	if err := os.Remove(image); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	return image, c.create(ctx, l, base, image)
}

// filledAs says whose overlay has the same content and format, for contenders that fio can't fill themselves.
var filledAs = map[string]string{ourVhost: ours, ourFuse: ours, nbdfuse: ours, storageDaemon: qcow2, storageDaemonBy4: qcow2by4}

// template returns the overlay of c with fill written to it, made when it is first asked for.
func (l *lab) template(ctx context.Context, c contender, base string, fill *job) (string, error) {
	if as, ok := filledAs[c.key]; ok {
		c = find(as)
	}
	kept := l.path(c.key + "." + fill.name)
	if _, err := os.Stat(kept); err == nil {
		return kept, nil
	}
	l.say("%s: %s", c.key, fill.name)
	image, err := l.overlay(ctx, c, base)
	if err != nil {
		return "", err
	}
	t, err := l.open(ctx, c, base, image)
	if err != nil {
		return "", err
	}
	_, err = l.fio(ctx, *fill, t)
	if err := errors.Join(err, t.close()); err != nil {
		return "", fmt.Errorf("fill: %w", err)
	}
	return kept, os.Rename(image, kept)
}
