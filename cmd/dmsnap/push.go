package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/progress"
	"github.com/dmsnap/dmsnap/offline"
	"github.com/dmsnap/dmsnap/publish"
	"github.com/dmsnap/dmsnap/served"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/source"
	"github.com/dmsnap/dmsnap/source/remote"
)

// fetchFlags are the flags about registries, object stores and web servers.
type fetchFlags struct {
	source.RemoteOptions
	cacheSize sizeFlag
}

func (o *fetchFlags) add(f *pflag.FlagSet) {
	f.BoolVar(&o.Insecure, "insecure", false, "of oci://, s3:// and http://: plain HTTP, not only for this host")
	f.BoolVar(&o.Helpers, "allow-credential-helpers", false, "run the programs that credential files name, and read the AWS profile")
	f.StringVar(&o.CacheDir, "cache-dir", "", "folder of the cache for disks on other hosts (default: dmsnap in the user's cache folder)")
	f.Var(&o.cacheSize, "cache-size", "bound of that cache (default 20GiB)")
}

// addPrefetch adds the flags that are about one disk.
func (o *fetchFlags) addPrefetch(f *pflag.FlagSet) {
	f.StringVar(&o.Prefetch, "prefetch", "", "of a disk on another host: fetch the ranges in this file at once, in the background")
	f.StringVar(&o.Record, "prefetch-record", "", "of a disk on another host: write the ranges that were read to this new file at the end")
}

func (o *fetchFlags) options(warn func(string)) source.RemoteOptions {
	o.CacheSize, o.Log = o.cacheSize.bytes, warn
	return o.RemoteOptions
}

func newPush() *cobra.Command {
	var disk diskFlags
	var control string
	var asJSON bool
	c := &cobra.Command{
		Use:   "push {BASE [COW...] | --control PATH NODE} REF",
		Short: "Write a disk with its stores to a registry or an object store",
		Long: `Write BASE, and each COW over the disk that those before it make, to an OCI registry or an S3 bucket as layers. Each
layer has what its COW holds. REF is [oci://]HOST[:PORT]/REPOSITORY[:TAG] or s3://BUCKET/KEY; it names the new disk
when everything is there. Layers that are there are not written again.

BASE may be a disk in a registry or a bucket: its layers are used as they are, and not read.

With --control PATH, NODE is a checkpoint of a daemon, or a node as it is now, of which a checkpoint without a name is made if it was
written since the last one. The disk beneath it is the base, and each checkpoint with a name a layer.

Hosts read the disk at oci://… or s3://… as ORIGIN of any verb, or copy it with dmsnap pull. Credentials are those of
docker or podman login; of S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, its server AWS_ENDPOINT_URL.`,
		Example: `  dmsnap push disk.img localhost:5000/golden/debian:13
  dmsnap push disk.img disk.cow localhost:5000/golden/debian:13-web
  dmsnap push vm1@before localhost:5000/golden/debian:13-web --control fleet/control.sock`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(c *cobra.Command, args []string) (err error) {
			to, err := remote.Open(args[len(args)-1], disk.remote.RemoteOptions.Options)
			if err != nil {
				return err
			}
			ctx, stop := untilSignal()
			defer stop()
			bar := progress.New(c.ErrOrStderr(), "push")
			defer bar.End()
			made, err := disk.push(ctx, control, args[:len(args)-1], to, publish.Options{Progress: bar.Show})
			if err != nil {
				return err
			}
			bar.End()
			if asJSON {
				return printJSON(c, made)
			}
			return printf(c, "%s  %s  %s written\n", made.Reference, made.Digest, bytesText(made.Written))
		},
	}
	disk.add(c.Flags())
	c.Flags().StringVar(&control, "control", "", "control socket of the daemon that has NODE")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// push pushes what names, or a node, stand for.
func (d *diskFlags) push(ctx context.Context, control string, names []string, to remote.Repository, o publish.Options) (made publish.Pushed, err error) {
	d.remote.Context = ctx
	s, err := d.options(block.Options{ReadOnly: true})
	switch {
	case err != nil:
		return made, err
	case control == "":
		made, err = offline.Push(ctx, names, to, s, o)
		return made, advise(err)
	case len(names) != 1:
		return made, errors.New("with --control, NODE and REF are required")
	}
	t, err := served.OpenTree(ctx, api.NewClient(control), names[0], s)
	if err != nil {
		return made, err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	return t.Push(ctx, to, o)
}
