package daemon

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/dmsnap/dmsnap/server/api"
)

// TemporaryPrefix begins the names of nodes that are dropped temporaryIdle after their last client disconnected, whatever the
// policy: programs make them to read what an element shows at a moment, and drop them unless they are killed.
const TemporaryPrefix = "export."

const temporaryIdle = time.Minute

// A removal is a node or checkpoint that a policy does not keep.
type removal struct {
	name       string
	checkpoint bool
	why        string
}

// A plan is what policies want at one moment.
type plan struct {
	remove []removal
	// squash are checkpoints below which there are layers without a name that only they need, of disks whose policies remove
	// checkpoints.
	squash []string
	rates  map[string]Policy // of each node
}

// makePlan decides what policies want of a tree at the time now. used is when a client of each node was connected last, or the node
// seen first; it is updated.
func makePlan(now time.Time, t api.Tree, policyOf func(disk string) Policy, used map[string]time.Time) plan {
	p := plan{rates: map[string]Policy{}}
	seen := map[string]bool{}
	retained := map[string][]api.Element{} // named checkpoints by node
	for _, e := range t.Elements {
		policy := policyOf(e.Disk)
		switch e.Kind {
		case api.KindCheckpoint:
			if node, _, ok := strings.Cut(e.Name, "@"); ok && !e.Unnamed {
				retained[node+"@"+e.Disk] = append(retained[node+"@"+e.Disk], e)
			}
		case api.KindNode:
			seen[e.Name] = true
			if _, known := used[e.Name]; !known || e.Connections > 0 {
				used[e.Name] = now
			}
			most := policy.IdleDrop
			if strings.HasPrefix(e.Name, TemporaryPrefix) {
				most = temporaryIdle
			}
			if idle := now.Sub(used[e.Name]); most > 0 && idle >= most {
				p.remove = append(p.remove, removal{e.Name, false, fmt.Sprintf("it had no clients for %v", idle.Round(time.Second))})
			}
			p.rates[e.Name] = policy
		}
	}
	maps.DeleteFunc(used, func(name string, _ time.Time) bool { return !seen[name] })
	for _, list := range retained {
		p.remove = append(p.remove, unretained(policyOf(list[0].Disk), list)...)
	}
	p.squash = squashable(t, policyOf)
	slices.SortFunc(p.remove, func(a, b removal) int { return strings.Compare(a.name, b.name) })
	return p
}

// squashable are the checkpoints that are to be squashed.
func squashable(t api.Tree, policyOf func(disk string) Policy) (list []string) {
	under := map[string]bool{} // checkpoints without a name that one element needs, by name
	for _, e := range t.Elements {
		if p := policyOf(e.Disk); e.Kind == api.KindCheckpoint && e.Unnamed && e.Children == 1 && p.removesCheckpoints() {
			under[e.Name] = true
		}
	}
	above := map[string]bool{} // those that have a checkpoint on them: it is the one to squash
	for _, e := range t.Elements {
		if e.Kind == api.KindCheckpoint && under[e.Parent] {
			above[e.Parent] = true
		}
	}
	for _, e := range t.Elements {
		if e.Kind == api.KindCheckpoint && under[e.Parent] && !above[e.Name] {
			list = append(list, e.Name)
		}
	}
	return list
}

func (p Policy) removesCheckpoints() bool { return p.KeepLast > 0 || p.Hourly > 0 || p.Daily > 0 }

// unretained are the checkpoints of one node that the policy does not keep.
func unretained(p Policy, list []api.Element) (remove []removal) {
	if !p.removesCheckpoints() {
		return nil
	}
	slices.SortFunc(list, func(a, b api.Element) int { return b.Created.Compare(a.Created) }) // the newest first
	keep := map[string]bool{}
	for i, e := range list {
		if i < p.KeepLast {
			keep[e.Name] = true
		}
	}
	keepPeriods(list, p.Hourly, "2006-01-02 15", keep)
	keepPeriods(list, p.Daily, "2006-01-02", keep)
	for _, e := range list {
		if !keep[e.Name] {
			remove = append(remove, removal{e.Name, true, "the policy of its disk does not keep it"})
		}
	}
	return remove
}

// keepPeriods keeps the newest checkpoint of each of the last n periods that have any; a period is what has the same time in
// a layout, in UTC.
func keepPeriods(newestFirst []api.Element, n int, layout string, keep map[string]bool) {
	last := ""
	for _, e := range newestFirst {
		period := e.Created.UTC().Format(layout)
		if period == last {
			continue
		}
		if n--; n < 0 {
			return
		}
		last, keep[e.Name] = period, true
	}
}
