package main

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/fuse"
)

func newMount() *cobra.Command {
	o := serveOptions{filesOnly: true}
	background := false
	c := &cobra.Command{
		Use:   "mount ORIGIN [NAME=]COW DIR",
		Short: "Show a snapshot as a file in a folder, without a server for NBD",
		Long: `Mount a file system on the empty folder DIR that shows the snapshot as a file NAME of the origin's size, and with
--export-origin the origin as "origin". It is serve --fuse DIR without NBD: root is not required, but fusermount3 is then.
The file is a disk: "mount -o loop DIR/NAME" mounts what is in it. Writes to it go to COW, and are durable after an fsync.

It stays until dmsnap umount DIR, umount(8) or a signal ends it; then everything is made durable. A signal unmounts DIR also
while it is in use. With --background it returns when the file is there, and goes on without a terminal; messages
after that are lost.`,
		Example: `  dmsnap mount --background disk.img vm1=disk.cow files
  dmsnap umount files`,
		Args: cobra.ExactArgs(3),
		RunE: func(c *cobra.Command, args []string) error {
			if background {
				return inBackground(c)
			}
			ctx, stop := untilSignal()
			defer stop()
			signal.Ignore(syscall.SIGPIPE) // a closed output must not end it
			o.fuse.dir = args[2]
			return o.run(ctx, args[0], args[1:2], c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	f := c.Flags()
	f.BoolVar(&background, "background", false, "return when the file is there")
	o.fuse.add(f, "")
	o.addStores(c)
	return c
}

// readyVariable names the descriptor to which a process that was started by inBackground writes when it is ready.
const readyVariable = "DMSNAP_READY_FD"

// inBackground starts this program again with the same arguments, in a session of its own, and returns when that process is ready or
// has ended.
func inBackground(c *cobra.Command) error {
	ready, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	args := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(s string) bool { return s == "--background" || s == "--background=true" })
	p := exec.Command("/proc/self/exe", args...)
	p.Args[0] = os.Args[0]
	p.Env = append(os.Environ(), readyVariable+"=3")
	p.ExtraFiles = []*os.File{theirs}
	p.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	stderr, err := p.StderrPipe()
	if err == nil {
		err = p.Start()
	}
	theirs.Close()
	if err != nil {
		return err
	}
	if text, err := io.ReadAll(ready); err == nil && len(text) > 0 {
		return printf(c, "%s", text)
	}
	text, _ := io.ReadAll(stderr) // it has ended
	p.Wait()
	return errors.New(strings.TrimPrefix(strings.TrimSpace(string(text)), "dmsnap: "))
}

// reportReady gives what a process prints when it is ready to the one that started it by inBackground, if one did.
func reportReady(text []byte) {
	if os.Getenv(readyVariable) != "3" {
		return
	}
	os.Unsetenv(readyVariable)
	f := os.NewFile(3, "ready")
	f.Write(text)
	f.Close()
}

func newUmount() *cobra.Command {
	var lazy, asJSON bool
	c := &cobra.Command{
		Use:   "umount DIR",
		Short: "Detach a folder that dmsnap mount or serve --fuse mounted",
		Long: `Make what was written to the files of a mounted folder durable, unmount it, and wait for the end of dmsnap mount. A folder
in use is refused, by a loop device over one of its files for example, unless --lazy is given: then the folder is free at
once, and dmsnap mount ends with the last use. What is left of a process that was killed is removed.`,
		Example: `  dmsnap mount --background disk.img vm1=disk.cow files
  dmsnap umount files`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, stop := untilSignal()
			defer stop()
			if err := fuse.Unmount(ctx, args[0], lazy); err != nil {
				return err
			}
			return printResult(c, asJSON, map[string]string{"unmounted": args[0]}, "%s unmounted\n", printable(args[0]))
		},
	}
	c.Flags().BoolVar(&lazy, "lazy", false, "unmount a folder in use, too, and do not wait")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
