package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dmsnap/dmsnap/source/cache"
)

// cached is what cache list prints as JSON.
type cached struct {
	Items []cache.Item `json:"items"`
	Bytes int64        `json:"bytes"` // of all
}

// pruned is what cache prune prints as JSON.
type pruned struct {
	RemovedBytes int64 `json:"removed_bytes"`
}

func newCache() *cobra.Command {
	var disk diskFlags
	var to sizeFlag
	var asJSON bool
	c := &cobra.Command{
		Use:   "cache {list | prune}",
		Short: "Show or shorten the local cache of disks on other hosts",
		Long: `cache list shows what is in the cache: parts of disks in registries, object stores and web servers. All processes of a
user share it. It is bounded by --cache-size of the verbs that read such disks.

cache prune removes what was not used for the longest time until the rest takes --to bytes (default: all). Disks that are in use
are read on; what they need again is fetched again.`,
		Example: `  dmsnap cache list
  dmsnap cache prune --to 5GiB`,
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{"list", "prune"},
		RunE: func(c *cobra.Command, args []string) error {
			if to.set && args[0] != "prune" {
				return errors.New("--to is for cache prune")
			}
			kept, err := disk.remote.OpenCache()
			if err != nil {
				return err
			}
			defer kept.Close()
			if args[0] == "prune" {
				n, err := kept.Evict(to.bytes)
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(c, pruned{n})
				}
				return printf(c, "%s removed\n", bytesText(n))
			}
			list := cached{}
			if list.Items, err = kept.List(); err != nil {
				return err
			}
			var text strings.Builder
			for _, i := range list.Items {
				list.Bytes += i.Bytes
				fmt.Fprintf(&text, "%s  %s  used %s  %.16s\n", printable(i.Name), bytesText(i.Bytes), i.LastUsed.Format(time.DateTime), i.Key)
			}
			if asJSON {
				return printJSON(c, list)
			}
			return printf(c, "%s%s in all\n", text.String(), bytesText(list.Bytes))
		},
	}
	f := c.Flags()
	f.StringVar(&disk.remote.CacheDir, "cache-dir", "", "folder of the cache (default: dmsnap in the user's cache folder)")
	f.Var(&to, "to", "of prune: how much may stay")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
