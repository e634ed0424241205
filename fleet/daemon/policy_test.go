package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server/api"
)

func TestParsePolicy(t *testing.T) {
	got, err := ParsePolicy(map[string]string{"on-full": "pause", "quota": "10GiB", "node-quota": "1GiB", "grow": "1MiB", "max-nodes": "100", "idle-drop": "36h",
		"keep-last": "3", "hourly": "24", "daily": "7", "read-iops": "100", "write-iops": "200", "read-bytes": "1MiB", "write-bytes": "2MiB"})
	want := Policy{FullPause, 10 << 30, 1 << 30, 1 << 20, 100, 36 * time.Hour, 3, 24, 7, 100, 200, 1 << 20, 2 << 20}
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	for key, value := range map[string]string{"on-full": "ignore", "quota": "-1", "node-quota": "0", "max-nodes": "x", "idle-drop": "0s", "keep-last": "0", "read-iops": "", "other": "1"} {
		if _, err := ParsePolicy(map[string]string{key: value}); err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("%s=%s: %v", key, value, err)
		}
	}
	all, err := ParsePolicyDefaults(strings.NewReader("# all\n* keep-last=3\ndebian quota=1GiB  daily=7\n"))
	if err != nil || all["*"]["keep-last"] != "3" || all["debian"]["daily"] != "7" || len(all) != 2 {
		t.Errorf("%v, %v", all, err)
	}
	if _, err := ParsePolicyDefaults(strings.NewReader("*\n* what")); err == nil || !strings.Contains(err.Error(), "line 2") {
		t.Error(err)
	}
}

// A disk's own keys come before its defaults, and those before the ones of all disks.
func TestPolicyOf(t *testing.T) {
	s := newFakeServer(t)
	text := map[string]map[string]string{"*": {"keep-last": "1", "daily": "1", "hourly": "1"}, "base": {"daily": "2", "hourly": "2"}}
	s.daemon.opts.PolicyDefaults = func() (map[string]map[string]string, error) { return text, nil }
	if err := s.daemon.Reload(); err != nil {
		t.Fatal(err)
	}
	if p := s.daemon.policyOf(api.Disk{Name: "base", Policy: map[string]string{"hourly": "3"}}); p.KeepLast != 1 || p.Daily != 2 || p.Hourly != 3 {
		t.Errorf("%+v", p)
	}
	text = map[string]map[string]string{"*": {"keep-last": "none"}}
	if err := s.daemon.Reload(); err == nil {
		t.Error("a bad default was accepted")
	}
	if p := s.daemon.policyOf(api.Disk{Name: "other"}); p.KeepLast != 1 {
		t.Errorf("the former defaults are gone: %+v", p)
	}
	if status, body := s.do(t, "PUT", "/v1/disks/base/policy", `{"set":{"quota":"much"}}`); status != 400 || !strings.Contains(string(body), "quota") {
		t.Errorf("status %d, %s", status, body)
	}
	if status, body := s.do(t, "PUT", "/v1/disks/base/policy", `{"set":{"max-nodes":"2"}}`); status != 200 {
		t.Fatalf("status %d, %s", status, body)
	}
	for i, want := range []int{200, api.CodeQuota.HTTPStatus()} {
		if status, body := s.do(t, "POST", "/v1/fork", fmt.Sprintf(`{"from":"base","name":"n%d"}`, i)); status != want {
			t.Errorf("fork %d: status %d, %s, want %d", i, status, body, want)
		}
	}
}

func names(list []removal) (all []string) {
	for _, r := range list {
		all = append(all, r.name)
	}
	return all
}

func TestRetention(t *testing.T) {
	noon := time.Date(2026, 5, 10, 12, 30, 0, 0, time.UTC)
	tree := api.Tree{Elements: []api.Element{{Name: "base", Kind: api.KindDisk, Disk: "base"}}}
	add := func(name string, ago time.Duration, unnamed bool) {
		tree.Elements = append(tree.Elements, api.Element{Name: name, Kind: api.KindCheckpoint, Disk: "base", Unnamed: unnamed, Created: noon.Add(-ago)})
	}
	for i := range 5 {
		add(fmt.Sprintf("a@min%d", i), time.Duration(i)*10*time.Minute, false) // 12:30, 12:20, 12:10, 12:00, 11:50
	}
	add("a@h3", 3*time.Hour, false)
	add("a@d1", 24*time.Hour, false)
	add("a@d2", 48*time.Hour, false)
	add("a@~9", 100*time.Hour, true)
	add("b@only", 1000*time.Hour, false)
	plan := func(p Policy) string {
		return strings.Join(names(makePlan(noon, tree, func(string) Policy { return p }, map[string]time.Time{}).remove), " ")
	}
	for _, c := range []struct {
		policy Policy
		want   string
	}{
		{Policy{}, ""},
		{Policy{KeepLast: 2}, "a@d1 a@d2 a@h3 a@min2 a@min3 a@min4"},
		{Policy{Hourly: 2}, "a@d1 a@d2 a@h3 a@min1 a@min2 a@min3"},
		{Policy{Daily: 2}, "a@d2 a@h3 a@min1 a@min2 a@min3 a@min4"},
		{Policy{KeepLast: 2, Hourly: 3, Daily: 9}, "a@min2 a@min3"},
	} {
		if got := plan(c.policy); got != c.want {
			t.Errorf("%+v: removes %s, want %s", c.policy, got, c.want)
		}
	}
}

func TestSquashable(t *testing.T) {
	c := func(name, parent string, children int, unnamed bool) api.Element {
		return api.Element{Name: name, Kind: api.KindCheckpoint, Parent: parent, Disk: "base", Children: children, Unnamed: unnamed}
	}
	tree := api.Tree{Elements: []api.Element{{Name: "base", Kind: api.KindDisk, Disk: "base"},
		c("a@~1", "base", 1, true), c("a@~2", "a@~1", 1, true), c("a@x", "a@~2", 1, false), // a run below a name
		c("a@~3", "a@x", 2, true), c("a@~4", "a@~3", 1, true), c("a@~5", "a@~4", 2, true), // below one that two need
		c("a@~6", "a@~3", 1, true), {Name: "a", Kind: api.KindNode, Parent: "a@~6", Disk: "base"}, // below a node
	}}
	if got := squashable(tree, func(string) Policy { return Policy{KeepLast: 1} }); !slices.Equal(got, []string{"a@x", "a@~5"}) {
		t.Errorf("%q", got)
	}
	if got := squashable(tree, func(string) Policy { return Policy{MaxNodes: 1} }); got != nil {
		t.Errorf("without retention: %q", got)
	}
}

// What a policy does not keep of a node in use is removed, with its layers, and the node shows the same.
func TestRetentionOfARunningNode(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	s := serve(t, nil)
	ctx := t.Context()
	if _, err := s.Fork(ctx, api.ForkRequest{From: "base", Name: "vm"}); err != nil {
		t.Fatal(err)
	}
	c, err := nbd.Dial(ctx, s.uri("vm"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := range 8 {
		if _, err := c.WriteAt(fmt.Appendf(nil, "state %d", i), int64(i)*4096); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Checkpoint(ctx, api.CheckpointRequest{Nodes: []string{"vm"}, Name: fmt.Sprint("c", i)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.SetPolicy(ctx, "base", map[string]string{"keep-last": "2"}); err != nil {
		t.Fatal(err)
	}
	var left []string
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		tree, err := s.Tree(ctx)
		if err != nil {
			t.Fatal(err)
		}
		left = nil
		for _, e := range tree.Elements {
			left = append(left, e.Name)
		}
		if len(left) == 4 {
			break
		}
	}
	if !slices.Equal(left, []string{"base", "vm@c6", "vm@c7", "vm"}) {
		t.Errorf("left are %q", left)
	}
	for i := range 8 {
		got := make([]byte, 7)
		if _, err := c.ReadAt(got, int64(i)*4096); err != nil || string(got) != fmt.Sprintf("state %d", i) {
			t.Errorf("%q, %v", got, err)
		}
	}
	s.wantSound(t)
}

// A quota binds at the write that needs a chunk too many: the client gets "no space", or waits, until the quota is larger.
// Writes to chunks that are there, reads and flushes go on.
func TestQuotaOfARunningNode(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	s := serve(t, nil)
	ctx := t.Context()
	if _, err := s.Fork(ctx, api.ForkRequest{From: "base", Name: "vm"}); err != nil {
		t.Fatal(err)
	}
	set := func(keys map[string]string) {
		t.Helper()
		if _, err := s.SetPolicy(ctx, "base", keys); err != nil {
			t.Fatal(err)
		}
	}
	set(map[string]string{"node-quota": "128KiB"})
	c, err := nbd.Dial(ctx, s.uri("vm"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	write := func(chunk int64) error {
		_, err := c.WriteAt(bytes.Repeat([]byte{1}, 4096), chunk*4096)
		return err
	}
	next := int64(0)
	fill := func(quota int64) {
		t.Helper()
		for ; err == nil; next++ {
			err = write(next)
		}
		next--
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		tree, err := s.Tree(ctx)
		// The map of a file that was fragmented when it was written out is 4 KiB on ext4, and in no quota (docs/fleet.md).
		if e := tree.Elements[len(tree.Elements)-1]; err != nil || e.AllocatedBytes > quota+4096 || e.Figures.State != api.StateOK {
			t.Errorf("%d chunks use %d bytes, %+v, %v", next, e.AllocatedBytes, e.Figures, err)
		}
	}
	fill(128 << 10)
	if next < 20 || next > 30 { // of 32 two are the store's own; tmpfs and others may allocate more at once
		t.Errorf("%d chunks of 4 KiB in 128 KiB", next)
	}
	if err := write(0); err != nil {
		t.Errorf("a chunk that is there: %v", err)
	}
	if _, err := c.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Errorf("read: %v", err)
	}
	if err := c.Flush(); err != nil {
		t.Errorf("flush: %v", err)
	}
	set(map[string]string{"node-quota": "256KiB"})
	if err = write(next); err != nil {
		t.Errorf("after the quota was raised: %v", err)
	}
	fill(256 << 10)
	set(map[string]string{"on-full": "pause"})
	waited := make(chan error)
	go func() { waited <- write(next) }()
	select {
	case err := <-waited:
		t.Fatalf("the write did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	begin := time.Now()
	set(map[string]string{"node-quota": "", "on-full": ""})
	if err := <-waited; err != nil {
		t.Errorf("the write that waited: %v", err)
	}
	if took := time.Since(begin); took > block.RetryInterval*3/4 {
		t.Logf("the write that waited was only tried again after %v", took)
	}
	s.wantSound(t)
}

func TestIdleDrop(t *testing.T) {
	now := time.Date(2026, 5, 10, 12, 0, 0, 0, time.UTC)
	tree := api.Tree{Elements: []api.Element{{Name: "a", Kind: api.KindNode, Disk: "base"}, {Name: "b", Kind: api.KindNode, Disk: "base", Connections: 1}}}
	used := map[string]time.Time{}
	policy := func(string) Policy { return Policy{IdleDrop: time.Hour} }
	for _, c := range []struct {
		after time.Duration
		want  string
	}{{0, ""}, {59 * time.Minute, ""}, {time.Hour, "a"}} {
		if got := strings.Join(names(makePlan(now.Add(c.after), tree, policy, used).remove), " "); got != c.want {
			t.Errorf("after %v: removes %q, want %q", c.after, got, c.want)
		}
	}
	tree.Elements[1].Connections = 0 // from an hour on
	if got := names(makePlan(now.Add(90*time.Minute), tree, policy, used).remove); !slices.Equal(got, []string{"a"}) {
		t.Errorf("removes %q", got)
	}
	tree.Elements = tree.Elements[1:]
	if got := names(makePlan(now.Add(2*time.Hour), tree, policy, used).remove); !slices.Equal(got, []string{"b"}) {
		t.Errorf("removes %q", got)
	}
	if got := slices.Collect(maps.Keys(used)); !slices.Equal(got, []string{"b"}) {
		t.Errorf("remembers %q", got)
	}
}

// What a killed program left to be read is dropped without a policy.
func TestTemporaryNodes(t *testing.T) {
	s := newFakeServer(t)
	now := time.Now()
	s.daemon.step(t.Context(), now)
	if status, body := s.do(t, "POST", "/v1/fork", `{"from":"base","name":"export.1.2"}`); status != 200 {
		t.Fatalf("status %d, %s", status, body)
	}
	for after, want := range []int{0, 0, 1} {
		s.daemon.step(t.Context(), now.Add(time.Duration(after)*50*time.Second))
		if len(s.fleet.dropped) != want {
			t.Errorf("step %d: dropped %q", after, s.fleet.dropped)
		}
	}
}

// A step removes what a policy does not keep, and sets limits.
func TestStep(t *testing.T) {
	s := newFakeServer(t)
	var limits Limits
	s.daemon.opts.Limits = &limits
	limits.Wrap("a", block.NewMemory(1<<20))
	now := time.Now()
	s.daemon.step(t.Context(), now)
	s.fleet.policy = map[string]string{"idle-drop": "1m", "node-quota": "1", "write-iops": "7", "on-full": "pause"}
	s.daemon.step(t.Context(), now)
	if len(s.fleet.dropped) > 0 {
		t.Errorf("dropped %q", s.fleet.dropped)
	}
	if rate := limits.nodes["a"].writes.rate.Load(); rate != 7 {
		t.Errorf("rate %d", rate)
	}
	s.daemon.applySpace()
	if want := (fleet.Space{Node: 1, Pause: true}); s.fleet.space != want {
		t.Errorf("space %+v", s.fleet.space)
	}
	s.daemon.step(t.Context(), now.Add(time.Minute))
	if !slices.Equal(s.fleet.dropped, []string{"a"}) {
		t.Errorf("dropped %q", s.fleet.dropped)
	}
	s.fleet.policy = nil // what was limited is not any more
	s.daemon.step(t.Context(), now.Add(2*time.Minute))
	if rate := limits.nodes["a"].writes.rate.Load(); rate != 0 {
		t.Errorf("rate %d without a policy", rate)
	}
}

// Rates of nodes that are gone are forgotten, and those of nodes that were not seen yet are not.
func TestLimitsOfGoneNodes(t *testing.T) {
	var limits Limits
	limits.Wrap("a", block.NewMemory(4096))
	limits.set(nil)
	if len(limits.nodes) != 1 {
		t.Error("a node that is being made has no limit any more")
	}
	limits.set(map[string]Policy{"a": {ReadIOPS: 1}})
	if got := limits.nodes["a"].reads.rate.Load(); got != 1 {
		t.Errorf("rate %d", got)
	}
	limits.set(nil)
	if len(limits.nodes) != 0 {
		t.Errorf("nodes that are gone: %v", limits.nodes)
	}
}

func TestBucket(t *testing.T) {
	var b bucket
	b.set(1000)
	now := time.Now()
	if d := b.takeAt(now, 100, 1000); d != 0 {
		t.Errorf("a burst waits %v", d)
	}
	if d := b.takeAt(now, 100, 1000); d != 100*time.Millisecond {
		t.Errorf("waits %v", d)
	}
	if d := b.takeAt(now.Add(time.Second), 500, 1000); d != 400*time.Millisecond {
		t.Errorf("waits %v", d)
	}
	b.set(0)
	if d := b.take(1 << 40); d != 0 {
		t.Errorf("without a rate it waits %v", d)
	}
}

// Clients that ask for as much as they get have the rate together, each its share, and none waits longer than for what was in
// flight before.
func TestBucketIsFair(t *testing.T) {
	const rate, clients, seconds = 1000, 10, 20
	var b bucket
	begin := time.Unix(1000, 0)
	at, got, longest := [clients]time.Time{}, [clients]int{}, time.Duration(0)
	for i := range at {
		at[i] = begin.Add(time.Duration(i) * time.Microsecond)
	}
	for { // the client whose request is done first asks again
		i := 0
		for k := range at {
			if at[k].Before(at[i]) {
				i = k
			}
		}
		if at[i].Sub(begin) > seconds*time.Second {
			break
		}
		n := int64(1 + i%2) // some have larger requests
		wait := b.takeAt(at[i], n, rate)
		longest = max(longest, wait)
		at[i] = at[i].Add(wait + time.Microsecond)
		got[i]++
	}
	tokens := 0
	for i, n := range got {
		tokens += n * (1 + i%2)
		if n < got[0]-got[0]/20-1 || n > got[0]+got[0]/20+1 {
			t.Errorf("client %d had %d requests, the first %d", i, n, got[0])
		}
	}
	if want := rate * (seconds + burst.Seconds()); float64(tokens) < want*0.99 || float64(tokens) > want*1.01 {
		t.Errorf("%d tokens, want %.0f", tokens, want)
	}
	if longest > 20*time.Millisecond { // 15 tokens
		t.Errorf("a request waited %v", longest)
	}
}

// No request waits longer than maxDelay, and what is owed does not delay what is asked for later.
func TestBucketForgives(t *testing.T) {
	var b bucket
	now := time.Unix(1000, 0)
	for i := range 1000 {
		if d := b.takeAt(now, 1<<40, 1+int64(i)%2); d > maxDelay {
			t.Fatalf("a request waits %v", d)
		}
	}
	if d := b.takeAt(now.Add(maxDelay+burst), 1, 100); d != 0 {
		t.Errorf("a request after a pause waits %v", d)
	}
}

// A limited device passes on everything.
func TestLimitedDevice(t *testing.T) {
	var limits Limits
	blocktest.RunForward(t, func(_ *testing.T, dev block.Device) block.Device { return limits.Wrap("a", dev) })
}
