package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dmsnap/dmsnap/server/api"
)

// policies are the policies in force.
type policies struct {
	applying sync.Mutex // see applySpace

	mu    sync.Mutex                   // guards texts
	texts map[string]map[string]string // the defaults, by disk; "*" for all

	// These are the loop's.
	used    map[string]time.Time // see makePlan
	failed  map[string]string    // by removal: the error that was logged
	limited bool                 // some disk had a policy at the last step

	temporary atomic.Bool // there may be a temporary node
	squashing sync.WaitGroup
	busy      atomic.Bool // something is squashed
}

func (p *policies) init() {
	p.used, p.failed = map[string]time.Time{}, map[string]string{}
	p.temporary.Store(true) // those of before the start
}

func (p *policies) setDefaults(texts map[string]map[string]string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.texts = texts
}

// policyOf is the policy of a disk: the keys that it has itself, then those of its defaults, then those of all disks. What
// can't be read counts as nothing: it was checked when it was set.
func (d *Daemon) policyOf(disk api.Disk) Policy {
	set := map[string]string{}
	d.policies.mu.Lock()
	maps.Copy(set, d.policies.texts["*"])
	maps.Copy(set, d.policies.texts[disk.Name])
	d.policies.mu.Unlock()
	maps.Copy(set, disk.Policy)
	p, err := ParsePolicy(set)
	if err != nil {
		d.log.Event(slog.LevelError, fmt.Sprintf("policy of disk %s: %v: none is applied", disk.Name, err), "policy ignored", err, slog.String("disk", disk.Name))
		return Policy{}
	}
	return p
}

// setPolicy changes keys of a disk's policy. The whole policy must be one that can be read.
func (d *Daemon) setPolicy(ctx context.Context, q api.PolicyRequest) (api.Disk, error) {
	disk, err := d.fleet.Disk(q.Disk)
	if err != nil {
		return disk, err
	}
	after := map[string]string{}
	maps.Copy(after, disk.Policy)
	maps.Copy(after, q.Set)
	maps.DeleteFunc(after, func(_, value string) bool { return value == "" })
	if _, err := ParsePolicy(after); err != nil {
		return disk, refuse(api.CodeBadRequest, "set: %v", err)
	}
	if disk, err = d.fleet.SetPolicy(ctx, q); err == nil {
		d.applySpace()
	}
	return disk, err
}

// applySpace gives the fleet the limits of space that policies set, which bind at once.
func (d *Daemon) applySpace() {
	d.policies.applying.Lock() // what is looked up last is set last
	defer d.policies.applying.Unlock()
	for _, disk := range d.fleet.Disks().Disks {
		d.fleet.SetSpace(disk.Name, d.policyOf(disk).space())
	}
}

// reserveNode refuses a further node of a disk whose policy has a maximum, and holds back others until unlock. Temporary nodes
// don't count.
func (d *Daemon) reserveNode(name, node string) (unlock func(), err error) {
	if strings.HasPrefix(node, TemporaryPrefix) {
		return func() {}, nil
	}
	disk, err := d.fleet.Disk(name)
	if err != nil {
		return nil, err
	}
	most := d.policyOf(disk).MaxNodes
	if most == 0 {
		return func() {}, nil
	}
	d.forks.Lock()
	n := 0
	for _, e := range d.fleet.Tree().Elements {
		if e.Kind == api.KindNode && e.Disk == name && !strings.HasPrefix(e.Name, TemporaryPrefix) {
			n++
		}
	}
	if n >= most {
		d.forks.Unlock()
		return nil, refuse(api.CodeQuota, "disk %q has %d nodes, and its policy allows %d", name, n, most)
	}
	return d.forks.Unlock, nil
}

// applyPolicies applies policies every so often, until ctx ends.
func (d *Daemon) applyPolicies(ctx context.Context) {
	every := d.opts.PolicyInterval
	if every <= 0 {
		every = time.Second
	}
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			d.step(context.WithoutCancel(ctx), now)
		}
	}
}

// step applies policies once, at the time now. A daemon without policies does nothing, whatever the number of its nodes.
func (d *Daemon) step(ctx context.Context, now time.Time) {
	byDisk := map[string]Policy{}
	any := false
	for _, disk := range d.fleet.Disks().Disks {
		byDisk[disk.Name] = d.policyOf(disk)
		any = any || byDisk[disk.Name] != Policy{}
	}
	temporary := d.policies.temporary.Swap(false)
	if !any && !d.policies.limited && !temporary {
		return
	}
	d.policies.limited = any
	tree := d.fleet.Tree()
	if slices.ContainsFunc(tree.Elements, func(e api.Element) bool { return strings.HasPrefix(e.Name, TemporaryPrefix) }) {
		d.policies.temporary.Store(true)
	}
	p := makePlan(now, tree, func(disk string) Policy { return byDisk[disk] }, d.policies.used)
	if d.opts.Limits != nil {
		d.opts.Limits.set(p.rates)
	}
	for _, r := range p.remove {
		d.remove(ctx, r)
	}
	d.squash(p.squash)
}

// squash squashes checkpoints, in the background, unless that is under way.
func (d *Daemon) squash(list []string) {
	if len(list) == 0 || d.policies.busy.Swap(true) {
		return
	}
	d.policies.squashing.Go(func() {
		defer d.policies.busy.Store(false)
		for _, name := range list {
			if _, err := d.fleet.Squash(d.ending, api.SquashRequest{Node: name}); err != nil && d.ending.Err() == nil && !isGone(err) {
				d.log.Event(slog.LevelWarn, fmt.Sprintf("%s: not squashed: %v", name, err), "not squashed by policy", err, slog.String("name", name))
			}
		}
	})
}

// isGone reports whether an error says that an element does not exist: somebody else removed it.
func isGone(err error) bool {
	var e *api.Error
	return errors.As(err, &e) && (e.Code == api.CodeNoSuchNode || e.Code == api.CodeNoSuchCheckpoint || e.Code == api.CodeNoSuchElement)
}

// remove drops what a policy does not keep. What can't be dropped is tried again at the next step, and logged once.
func (d *Daemon) remove(ctx context.Context, r removal) {
	drop := d.fleet.Drop
	if r.checkpoint {
		drop = d.fleet.Forget
	}
	err := drop(ctx, r.name)
	if err == nil {
		delete(d.policies.failed, r.name)
		d.log.Event(slog.LevelInfo, fmt.Sprintf("%s: dropped: %s", r.name, r.why), "dropped by policy", nil, slog.String("name", r.name))
		return
	}
	if isGone(err) {
		return
	}
	if d.policies.failed[r.name] != err.Error() {
		d.policies.failed[r.name] = err.Error()
		d.log.Event(slog.LevelWarn, fmt.Sprintf("%s: not dropped, although %s: %v", r.name, r.why, err), "not dropped by policy", err, slog.String("name", r.name))
	}
}
