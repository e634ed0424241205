package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

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
	any    string // those whose bytes it does not judge
	json   bool   // takes --json
	quiet  bool   // prints nothing, or not to standard output
	served bool   // speaks with a server, behind CONTROL
	stays  bool   // goes on until a signal ends it
}

var callings = []calling{
	{args: "create ORIGIN OUT", shares: "ORIGIN", json: true},
	{args: "status COW", shares: "COW", json: true},
	{args: "status --control CONTROL", served: true, json: true},
	{args: "serve ORIGIN COW --socket SOCKET", writes: "ORIGIN COW", stays: true},
	{args: "serve ORIGIN COW --socket SOCKET --read-only", stays: true},
	{args: "snapshot more OUT --create --control CONTROL", served: true, json: true},
	{args: "grow COW 3MiB", writes: "COW", json: true},
	{args: "grow disk 3MiB --control CONTROL", served: true, json: true},
	{args: "drop disk --control CONTROL", served: true, json: true},
	{args: "export ORIGIN COW OUT", quiet: true},
	{args: "export ORIGIN COW -"},
	{args: "diff ORIGIN COW", status: exitNo, json: true},
	{args: "diff --verify ORIGIN COW COW2", status: exitNo, json: true},
	{args: "diff --format ranges ORIGIN COW", status: exitNo},
	{args: "list COW", json: true},
	{args: "map COW", json: true},
	{args: "map --origin ORIGIN COW --svg OUT --png ALSO", shares: "ORIGIN", json: true},
	{args: "inspect COW", shares: "COW", any: "COW", json: true},
	{args: "inspect NOISE", shares: "NOISE", any: "NOISE", status: exitNo, json: true},
	{args: "rescue ORIGIN INVALID OUT --map ALSO", json: true},
	{args: "rescue --dry-run ORIGIN COW", json: true},
	{args: "rescue --revalidate INVALID OUT", json: true},
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
	{args: "version", json: true},
	{args: "man FOLDER", quiet: true},
}

var (
	inputNames  = []string{"ORIGIN", "COW", "COW2", "BAD", "INVALID", "FIXED", "NOISE", "TEXT", "PACK", "UNDO"}
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

// A kit is a folder of inputs and one for outputs, as the callings have them.
type kit struct {
	dir, in, out string
	path         map[string]string
	run          *running // serves COW to those that need a server
}

// template holds what is in the folder of inputs, made once.
var template = sync.OnceValues(func() (files map[string][]byte, err error) {
	dir, err := os.MkdirTemp(buildFolder, "kit-")
	if err != nil {
		return nil, err
	}
	k := kitIn(dir)
	origin := bytes.Repeat([]byte("origin, "), 16<<10) // 128 KiB
	clear(origin[32<<10 : 48<<10])
	if err := os.WriteFile(k.path["ORIGIN"], origin, 0o600); err != nil {
		return nil, err
	}
	for _, cow := range []string{"COW", "COW2", "INVALID", "BAD"} {
		if err := doneBy(k.call("create ORIGIN " + cow)); err != nil {
			return nil, err
		}
		if err := writeTo(k.path["ORIGIN"], k.path[cow], cow, 0, 20_000, 60_000); err != nil {
			return nil, err
		}
	}
	if err := patchFile(k.path["INVALID"], 4, 0); err != nil {
		return nil, err
	}
	// Slot 1 names the chunk of slot 0.
	if err := patchFile(k.path["BAD"], 4096+16+8, 2); err != nil {
		return nil, err
	}
	noise := make([]byte, 64<<10)
	for i := range noise {
		noise[i] = byte(i*i>>8 ^ 0x5a)
	}
	if err := os.WriteFile(k.path["NOISE"], noise, 0o600); err != nil {
		return nil, err
	}
	bad, err := os.ReadFile(k.path["BAD"])
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(k.path["FIXED"], bad, 0o600); err != nil {
		return nil, err
	}
	for _, args := range []string{"dump COW --output TEXT", "dump --pack COW --output PACK", "repair FIXED --in-place --undo UNDO"} {
		if err := doneBy(k.call(args)); err != nil {
			return nil, err
		}
	}
	files = map[string][]byte{}
	for _, name := range inputNames {
		if files[name], err = os.ReadFile(k.path[name]); err != nil {
			return nil, err
		}
	}
	return files, nil
})

// doneBy is nil when all went well.
func doneBy(o outcome) error {
	if o.status != exitDone {
		return fmt.Errorf("status %d, %s", o.status, o.stderr)
	}
	return nil
}

// kitIn names the files of a kit and makes its folders.
func kitIn(dir string) *kit {
	k := &kit{dir: dir, in: filepath.Join(dir, "in"), out: filepath.Join(dir, "out"), path: map[string]string{}}
	for _, name := range inputNames {
		k.path[name] = filepath.Join(k.in, strings.ToLower(name)+".file")
	}
	for _, name := range []string{"OUT", "ALSO", "FOLDER", "SOCKET"} {
		k.path[name] = filepath.Join(k.out, strings.ToLower(name))
	}
	k.path["CONTROL"] = filepath.Join(k.in, "control.sock")
	os.Mkdir(k.in, 0o755)
	os.Mkdir(k.out, 0o755)
	return k
}

func newKit(t *testing.T) *kit {
	t.Helper()
	files, err := template()
	if err != nil {
		t.Fatal(err)
	}
	k := kitIn(t.TempDir())
	for name, content := range files {
		writeFile(t, k.path[name], content)
	}
	return k
}

// serve starts the server for a calling that needs one.
func (k *kit) serve(t *testing.T, c calling) {
	if c.served {
		k.run = start(t, pair{dir: k.in, origin: k.path["ORIGIN"], cow: k.path["COW"]}, serveOptions{}, "disk="+k.path["COW"])
	}
}

// end stops the server, if one runs.
func (k *kit) end() {
	if k.run != nil {
		k.run.stop()
	}
}

// expand puts paths in the place of the words in capitals.
func (k *kit) expand(args string, more ...string) []string {
	words := append(strings.Fields(args), more...)
	for i, w := range words {
		if p, ok := k.path[w]; ok {
			words[i] = p
		}
	}
	return words
}

func (k *kit) call(args string, more ...string) outcome { return dmsnap(k.expand(args, more...)...) }

// state is all that a command could change: names, modes, sizes, times of change, content.
func (k *kit) state(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.Walk(k.dir, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		all[path] = info.Mode().String()
		if info.Mode().IsRegular() {
			all[path] += fmt.Sprint(" ", info.Size(), " bytes, ", info.ModTime().Format(time.RFC3339Nano))
			if b, err := os.ReadFile(path); err == nil { // else it is one that nobody may read
				all[path] += " " + digest(b)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// wantState wants nothing changed since.
func (k *kit) wantState(t *testing.T, before map[string]string) {
	t.Helper()
	if after := k.state(t); !maps.Equal(before, after) {
		for path, now := range after {
			if before[path] != now {
				t.Errorf("%s: %q before, %q now", path, before[path], now)
			}
		}
		for path := range before {
			if after[path] == "" {
				t.Errorf("%s is gone", path)
			}
		}
	}
}

// wantRefused calls, and wants a refusal in one line with the words in it, and nothing touched.
func (k *kit) wantRefused(t *testing.T, args []string, words ...string) {
	t.Helper()
	before := k.state(t)
	dmsnap(args...).wantRefused(t, words...)
	k.wantState(t, before)
	if t.Failed() {
		t.Fatalf("dmsnap %q", args)
	}
}

// eachCalling is a subtest for each calling that suits.
func eachCalling(t *testing.T, suits func(calling) bool, f func(t *testing.T, c calling)) {
	for _, c := range callings {
		if suits == nil || suits(c) {
			t.Run(c.args, func(t *testing.T) { f(t, c) })
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
	k := newKit(t)
	eachCalling(t, nil, func(t *testing.T, c calling) {
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

// callAs calls as somebody who may do only what modes of files allow, which root does not.
func (k *kit) callAs(t *testing.T, args ...string) outcome {
	t.Helper()
	if os.Geteuid() != 0 {
		return dmsnap(args...)
	}
	const nobody = 65534
	for _, dir := range []string{filepath.Dir(k.dir), buildFolder, program(t)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(program(t), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Skipf("SKIPPED: no process of another user: %v", err)
	}
	return outcome{cmd.ProcessState.ExitCode(), out.String(), stderr.String()}
}
