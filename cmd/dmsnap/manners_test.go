package main

import (
	"encoding/json"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// A calling is a way to call a verb, and what may be expected of it. What the words in capitals stand for is in
// kit.path. TestManners… go through all of them.
type calling struct {
	args   string
	status int    // when all is well
	writes string // those of its inputs that it changes
	shares string // those that may be in use by others
	any    string // those whose content it does not check
	json   bool   // takes --json
	quiet  bool   // prints nothing, or not to standard output
	served bool   // speaks with a server of one origin, behind CONTROL
	fleet  bool   // speaks with the daemon of a fleet, behind CONTROL
	stays  bool   // goes on until a signal ends it

	needs func() error // of the host; nil: nothing
}

// ended reports whether a run ended as it should where all is well.
func (c calling) ended(o outcome) bool { return o.status == c.status && o.stderr == "" }

var callings = []calling{
	{args: "create ORIGIN OUT", shares: "ORIGIN", json: true},
	{args: "status COW", shares: "COW", json: true},
	{args: "status --control CONTROL", served: true, json: true},
	{args: "serve ORIGIN COW --socket SOCKET", writes: "COW", stays: true},
	{args: "serve ORIGIN COW --export-origin --socket SOCKET", writes: "ORIGIN COW", stays: true},
	{args: "serve ORIGIN COW --socket SOCKET --read-only", stays: true},
	{args: "snapshot more OUT --create --control CONTROL", served: true, json: true},
	{args: "grow COW 3MiB", writes: "COW", json: true},
	{args: "grow disk 3MiB --control CONTROL", served: true, json: true},
	{args: "drop disk --control CONTROL", served: true, json: true},
	{args: "export ORIGIN COW OUT", quiet: true},
	{args: "export ORIGIN COW -"},
	{args: "export ORIGIN COW OUT --format qcow2 --backing ORIGIN", quiet: true},
	{args: "import OVERLAY OUT --origin ORIGIN", json: true},
	{args: "send ORIGIN COW --output OUT", json: true},
	{args: "send ORIGIN COW2 --since COW"},
	{args: "send ORIGIN"},
	{args: "receive STREAM COPY", writes: "COPY", shares: "STREAM", json: true},
	{args: "receive STREAM COPY --undo OUT", writes: "COPY", shares: "STREAM", json: true},
	{args: "receive STREAM --origin ORIGIN --cow OUT", shares: "STREAM", json: true},
	{args: "receive --check STREAM", shares: "STREAM", json: true},
	{args: "push ORIGIN COW REF", json: true, needs: tested("TestPushAndPull")},
	{args: "push disk REF --control CONTROL", json: true, fleet: true, needs: tested("TestPushFromADaemon")},
	{args: "pull REF FOLDER", json: true, needs: tested("TestPushAndPull")},
	{args: "cache list --cache-dir FOLDER", json: true},
	{args: "cache prune --cache-dir FOLDER", json: true},
	{args: "diff ORIGIN COW", status: exitNo, json: true},
	{args: "diff --verify ORIGIN COW COW2", status: exitNo, json: true},
	{args: "diff --format ranges ORIGIN COW", status: exitNo},
	{args: "diff --format bitmap ORIGIN COW", status: exitNo},
	{args: "list COW", json: true},
	{args: "map COW", json: true},
	{args: "map --origin ORIGIN COW --svg OUT --png ALSO", shares: "ORIGIN", json: true},
	{args: "inspect COW", shares: "COW", any: "COW", json: true},
	{args: "inspect NOISE", shares: "NOISE", any: "NOISE", status: exitNo, json: true},
	{args: "rescue ORIGIN INVALID OUT --map ALSO", json: true},
	{args: "rescue --dry-run ORIGIN COW", json: true},
	{args: "rescue --revalidate INVALID OUT", json: true},
	{args: "rescue --revalidate INVALID --in-place --undo OUT", writes: "INVALID", json: true},
	{args: "merge ORIGIN COW", writes: "ORIGIN COW", json: true},
	{args: "merge --dry-run ORIGIN COW", json: true},
	{args: "merge ORIGIN COW --undo OUT", writes: "ORIGIN COW", json: true},
	{args: "merge disk --wait --control CONTROL", served: true, json: true},
	{args: "check COW --origin ORIGIN", shares: "ORIGIN", any: "COW", json: true},
	{args: "check BAD", any: "BAD", status: exitNo, json: true},
	{args: "dump COW", any: "COW", json: true},
	{args: "dump --data BAD --output OUT", any: "BAD", json: true, quiet: true},
	{args: "dump --pack COW --output OUT", any: "COW", quiet: true},
	{args: "restore TEXT OUT", shares: "TEXT", json: true},
	{args: "restore PACK OUT", shares: "PACK", json: true},
	{args: "repair BAD OUT", json: true},
	{args: "repair BAD --in-place --undo OUT", writes: "BAD", json: true},
	{args: "repair FIXED --undo-apply UNDO", writes: "FIXED", shares: "UNDO", json: true},
	{args: "compact COW OUT", json: true},
	{args: "compact COW OUT --drop-unchanged --origin ORIGIN", json: true},
	{args: "compact COW --punch", writes: "COW", json: true},
	{args: "top --once --control CONTROL", served: true, json: true},
	{args: "attach --list", json: true, needs: attachedDevices},
	{args: "detach /dev/nbd0", json: true, needs: tested("test/kernel.TestAttach")},
	{args: "mount ORIGIN COW FOLDER --control CONTROL", writes: "COW", stays: true, needs: tested("TestMountAndUmount")},
	{args: "umount FOLDER", json: true, needs: tested("TestMountAndUmount")},
	{args: "daemon --dir FOLDER --control SOCKET", stays: true},
	{args: "disk add more OTHER --control CONTROL", fleet: true, json: true},
	{args: "disk list --control CONTROL", fleet: true, json: true},
	{args: "disk show base --control CONTROL", fleet: true, json: true},
	{args: "disk remove spare --control CONTROL", fleet: true, json: true},
	{args: "tree --control CONTROL", fleet: true, json: true},
	{args: "fork disk more --control CONTROL", fleet: true, json: true},
	{args: "checkpoint disk --name more --control CONTROL", fleet: true, json: true},
	{args: "rollback disk disk@before --control CONTROL", fleet: true, json: true},
	{args: "squash disk --control CONTROL", fleet: true, json: true},
	{args: "adopt more STORE --disk base --control CONTROL", fleet: true, json: true},
	{args: "policy base keep-last=1 --control CONTROL", fleet: true, json: true},
	{args: "table disk --control CONTROL", fleet: true, json: true},
	{args: "drop disk --control CONTROL", fleet: true, json: true},
	{args: "merge disk --control CONTROL", fleet: true, json: true},
	{args: "status --control CONTROL", fleet: true, json: true},
	{args: "export disk OUT --control CONTROL", fleet: true, quiet: true},
	{args: "send disk --since before --output OUT --control CONTROL", fleet: true, json: true},
	{args: "send disk --output OUT --control CONTROL", served: true, json: true},
	{args: "version", json: true},
	{args: "man FOLDER", quiet: true},
}

var (
	inputNames  = []string{"ORIGIN", "COW", "COW2", "BAD", "INVALID", "FIXED", "NOISE", "TEXT", "PACK", "UNDO", "OVERLAY", "STREAM", "COPY"}
	outputNames = []string{"OUT", "ALSO"}
)

func (c calling) words() []string { return strings.Fields(c.args) }
func (c calling) verb() string    { return c.words()[0] }

func (c calling) names(of []string) (list []string) {
	for _, w := range c.words() {
		if slices.Contains(of, w) {
			list = append(list, w)
		}
	}
	return list
}

func (c calling) inputs() []string  { return c.names(inputNames) }
func (c calling) outputs() []string { return c.names(outputNames) }

func has(list, name string) bool { return slices.Contains(strings.Fields(list), name) }

// option reports whether the verb has an option of this name.
func (c calling) option(name string) bool { return verbNamed(c.verb()).Flags().Lookup(name) != nil }

func verbNamed(name string) *cobra.Command {
	for _, c := range newRoot().Commands() {
		if c.Name() == name {
			return c
		}
	}
	return nil
}

// eachCalling is a subtest for each calling that suits.
func eachCalling(t *testing.T, suits func(calling) bool, f func(t *testing.T, c calling)) {
	for _, c := range callings {
		if suits == nil || suits(c) {
			t.Run(c.args, func(t *testing.T) {
				if c.needs != nil {
					if err := c.needs(); err != nil {
						t.Skip("SKIPPED: ", err)
					}
				}
				t.Parallel() // most of the time goes into waiting for the disk
				f(t, c)
			})
		}
	}
}

// Every verb is called by some calling, each of its ways to make, refuse and print too.
func TestMannersAreOfEveryVerb(t *testing.T) {
	for _, v := range newRoot().Commands() {
		var args strings.Builder
		asJSON := false
		for _, c := range callings {
			if c.verb() == v.Name() {
				args.WriteString(c.args + " ")
				asJSON = asJSON || c.json
			}
		}
		if args.Len() == 0 {
			t.Errorf("%s: no calling: give it one", v.Name())
		}
		if got := v.Flags().Lookup("json") != nil; got != asJSON {
			t.Errorf("%s: has --json %v, a calling with it %v", v.Name(), got, asJSON)
		}
		for _, name := range []string{"control", "output", "undo", "undo-apply", "in-place", "origin", "map", "svg", "png", "dry-run", "punch", "revalidate", "pack", "verify"} {
			if v.Flags().Lookup(name) != nil && !strings.Contains(args.String(), "--"+name) && !(v.Name() == "serve" && name == "control") {
				t.Errorf("%s: no calling with --%s: give it one", v.Name(), name)
			}
		}
	}
	for _, c := range callings {
		if verbNamed(c.verb()) == nil {
			t.Errorf("%s: no such verb", c.args)
		}
	}
}

// Help goes to standard output, names every option, and has an example.
func TestMannersOfHelp(t *testing.T) {
	for _, v := range newRoot().Commands() {
		text := mustRun(t, v.Name(), "--help")
		if v.Short == "" || !strings.Contains(v.Example, "dmsnap "+v.Name()) || !strings.Contains(text, v.Example) {
			t.Errorf("%s: no summary, no example, or not in its help:\n%s", v.Name(), text)
		}
		v.InitDefaultHelpFlag()
		v.Flags().VisitAll(func(f *pflag.Flag) {
			if !strings.Contains(text, " --"+f.Name) || f.Usage == "" {
				t.Errorf("%s: --%s is not in its help:\n%s", v.Name(), f.Name, text)
			}
		})
		if again := mustRun(t, "help", v.Name()); again != text {
			t.Errorf("help %s says something else:\n%s", v.Name(), again)
		}
		if again := mustRun(t, v.Name(), "-h"); again != text {
			t.Errorf("%s -h says something else:\n%s", v.Name(), again)
		}
	}
}

// Options that are none, arguments that are missing and those that are too many are refused.
func TestMannersOfUsage(t *testing.T) {
	eachCalling(t, nil, func(t *testing.T, c calling) {
		k := newKit(t)
		args := k.expand(c.args)
		k.wantRefused(t, append(args, "--frobnicate"), "unknown flag: --frobnicate")
		k.wantRefused(t, append([]string{c.verb(), "-Z"}, args[1:]...), "unknown shorthand flag: 'Z'")
		if c.verb() != "serve" { // which takes any number
			k.wantRefused(t, append(args, "more", "and more"))
		}
		if c.verb() != "version" {
			k.wantRefused(t, []string{c.verb()})
		}
	})
}

// Each form of output is what it says, whatever the answer.
func TestMannersOfJSON(t *testing.T) {
	eachCalling(t, func(c calling) bool { return c.json }, func(t *testing.T, c calling) {
		k := newKit(t)
		k.serve(t, c)
		o := k.call(c.args, "--json")
		if o.status != c.status || o.stderr != "" {
			t.Fatalf("status %d, want %d: %s", o.status, c.status, o.stderr)
		}
		if c.quiet {
			o.out = string(readFile(t, k.path["OUT"]))
		}
		d := json.NewDecoder(strings.NewReader(o.out))
		var v any
		if err := d.Decode(&v); err != nil {
			t.Fatalf("%v: %s", err, o.out)
		}
		if err := d.Decode(&v); err != io.EOF {
			t.Errorf("more than one value (%v): %s", err, o.out)
		}
	})
}
