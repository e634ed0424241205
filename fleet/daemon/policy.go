package daemon

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/internal/bytesize"
)

// Policy is what a disk and its nodes may use, and what is removed. The zero value limits and removes nothing.
type Policy struct {
	OnFull           OnFull        // what writes do that need space when a quota is reached or the file system has none
	Quota, NodeQuota int64         // bytes that the layers of the disk, and those that are a node's own, may use on the file system
	Grow             int64         // bytes by which a node's quota grows when it is reached, while Quota allows it
	MaxNodes         int           // more are refused
	IdleDrop         time.Duration // nodes without clients for so long are dropped

	// Named checkpoints of a node are kept: the last ones, and the last of each of so many hours and days that have any. When
	// all are 0, every one is.
	KeepLast, Hourly, Daily int

	// Of each node, a second.
	ReadIOPS, WriteIOPS, ReadBytes, WriteBytes int64
}

// OnFull is what writes do when there is no space for them.
type OnFull string

// The values of OnFull; "" is FullFail.
const (
	FullFail  OnFull = "fail"  // they fail, with no space
	FullPause OnFull = "pause" // they wait until there is space
)

// space is what the policy says of space.
func (p Policy) space() fleet.Space {
	return fleet.Space{Disk: p.Quota, Node: p.NodeQuota, Grow: p.Grow, Pause: p.OnFull == FullPause}
}

// policyKeys read the value of each key.
var policyKeys = map[string]func(p *Policy, value string) error{
	"on-full": func(p *Policy, v string) error {
		p.OnFull = OnFull(v)
		if p.OnFull != FullFail && p.OnFull != FullPause {
			return fmt.Errorf("%q is not fail or pause", v)
		}
		return nil
	},
	"quota":       func(p *Policy, v string) error { return sizeInto(&p.Quota, v) },
	"node-quota":  func(p *Policy, v string) error { return sizeInto(&p.NodeQuota, v) },
	"grow":        func(p *Policy, v string) error { return sizeInto(&p.Grow, v) },
	"max-nodes":   func(p *Policy, v string) error { return countInto(&p.MaxNodes, v) },
	"keep-last":   func(p *Policy, v string) error { return countInto(&p.KeepLast, v) },
	"hourly":      func(p *Policy, v string) error { return countInto(&p.Hourly, v) },
	"daily":       func(p *Policy, v string) error { return countInto(&p.Daily, v) },
	"read-iops":   func(p *Policy, v string) error { return sizeInto(&p.ReadIOPS, v) },
	"write-iops":  func(p *Policy, v string) error { return sizeInto(&p.WriteIOPS, v) },
	"read-bytes":  func(p *Policy, v string) error { return sizeInto(&p.ReadBytes, v) },
	"write-bytes": func(p *Policy, v string) error { return sizeInto(&p.WriteBytes, v) },
	"idle-drop": func(p *Policy, v string) (err error) {
		if p.IdleDrop, err = time.ParseDuration(v); err == nil && p.IdleDrop <= 0 {
			err = fmt.Errorf("%q is not longer than 0", v)
		}
		return err
	},
}

// PolicyKeys are the keys of policies, in order.
func PolicyKeys() []string { return slices.Sorted(maps.Keys(policyKeys)) }

// ParsePolicy reads a policy. The error names the key.
func ParsePolicy(set map[string]string) (p Policy, err error) {
	for _, key := range slices.Sorted(maps.Keys(set)) {
		read := policyKeys[key]
		if read == nil {
			return p, fmt.Errorf("there is no key %q: the keys are %s", key, strings.Join(PolicyKeys(), ", "))
		}
		if err := read(&p, set[key]); err != nil {
			return p, fmt.Errorf("%s: %w", key, err)
		}
	}
	return p, nil
}

func sizeInto(n *int64, value string) (err error) {
	if *n, err = bytesize.Parse(value); err == nil && *n == 0 {
		err = fmt.Errorf("%q is not greater than 0", value)
	}
	return err
}

func countInto(n *int, value string) error {
	c, err := strconv.ParseUint(value, 10, 31)
	if err != nil || c == 0 {
		return fmt.Errorf("%q is not a number greater than 0", value)
	}
	*n = int(c)
	return nil
}

// ParsePolicyDefaults reads policies of disks: a line each, of a disk's name, or "*" for all, and one or more key=value. Empty
// lines and those that begin with # are skipped.
func ParsePolicyDefaults(r io.Reader) (map[string]map[string]string, error) {
	all := map[string]map[string]string{}
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		f := strings.Fields(lines.Text())
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		if all[f[0]] == nil {
			all[f[0]] = map[string]string{}
		}
		for _, word := range f[1:] {
			key, value, ok := strings.Cut(word, "=")
			if !ok {
				return nil, fmt.Errorf("line %d: %q is not key=value", n, word)
			}
			all[f[0]][key] = value
		}
	}
	return all, lines.Err()
}
