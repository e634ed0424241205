package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/dmsnap/dmsnap/fuse"
	"github.com/dmsnap/dmsnap/server"
)

// fuseFlags are the options of serve about files.
type fuseFlags struct {
	dir        string
	allowOther bool
	cache      bool
	owner      string
	mode       string
}

func (o *fuseFlags) add(f *pflag.FlagSet, prefix string) {
	f.BoolVar(&o.allowOther, prefix+"allow-other", false, "let other users use the files, as owner and mode say")
	f.BoolVar(&o.cache, prefix+"cache", false, "let the kernel cache what is read and written (default: requests go past the page cache)")
	f.StringVar(&o.owner, prefix+"owner", "", "owner of the files, UID[:GID] (default: the user of the server)")
	f.StringVar(&o.mode, prefix+"mode", "0600", "mode of the files, octal")
}

// options checks the flags.
func (o *fuseFlags) options(log func(string)) (opts fuse.Options, err error) {
	opts = fuse.Options{AllowOther: o.allowOther, Cache: o.cache, Log: log}
	mode, err := strconv.ParseUint(o.mode, 8, 32)
	if err != nil || mode > 0o777 {
		return opts, fmt.Errorf("mode %q: must be octal, at most 0777", o.mode)
	}
	opts.Mode = os.FileMode(mode)
	if o.owner == "" {
		return opts, nil
	}
	uid, gid, both := strings.Cut(o.owner, ":")
	u, err := strconv.ParseUint(uid, 10, 31)
	g := u
	if both && err == nil {
		g, err = strconv.ParseUint(gid, 10, 31)
	}
	if err != nil {
		return opts, fmt.Errorf("owner %q: must be UID or UID:GID", o.owner)
	}
	opts.Owner = &fuse.Owner{UID: int(u), GID: int(g)}
	return opts, nil
}

// mounted is what --fuse mounted, or nothing.
type mounted struct{ *fuse.Server }

// close ends the requests to the files, makes everything durable and unmounts.
func (m mounted) close() error {
	if m.Server == nil {
		return nil
	}
	return m.Close()
}

// mount mounts the folder, if there is to be one.
func (o *fuseFlags) mount(log func(string)) (m mounted, err error) {
	opts, err := o.options(log)
	if err == nil && o.dir != "" {
		_ = server.BecomeIOFlusher() // where it is permitted
		m.Server, err = fuse.Mount(o.dir, opts)
	}
	if err != nil {
		err = fmt.Errorf("mount files: %w", err)
	}
	return m, err
}
