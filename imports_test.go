// Package dmsnap_test holds the tests of the tree as a whole.
package dmsnap_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/dmsnap/dmsnap"

// levels are those of ARCHITECTURE.md: a package imports packages of lower levels only, of its own
// level none.
var levels = map[string]int{
	".":                0, // the page of the module: documentation alone
	"internal/scratch": 0,
	"latency":          0, "notify": 0, "internal/bytesize": 0, "internal/jsonlist": 0, "internal/inline": 0, "internal/lines": 0, "internal/text": 0,
	"layer":         0,
	"source/remote": 1, "source/cache": 1, "source/ondemand": 2,
	"internal/progress": 1, "internal/eventlog": 1,
	"block": 1, "ondisk": 1,
	"block/blocktest": 2,
	"writeback":       2, "activity": 2,
	"internal/chunkmap": 2, "internal/gate": 2,
	"internal/newfile": 2,
	"source/mapped":    2,
	"source/partition": 3,
	"store":            3,
	"snapshot":         4,
	"check":            4, "dump": 4, "diff": 4, "internal/picture": 4, "internal/undo": 4,
	"nbd/wire": 4, "image": 4,
	"source/lvm": 4, "source/qcow2": 4, "source/stack": 4,
	"stream": 5,
	"nbd":    5, "fuse": 5, "vhost": 5, "merge": 5, "rescue": 5, "repair": 5, "compact": 5,
	"server/api": 4,
	"cowfile":    5, "server/figures": 5, "source/address": 5,
	"server": 6, "source": 6, "monitor": 6, "fleet": 6, "nbdkernel": 6, "publish": 6,
	"inspect": 7, "metrics": 7, "web": 7, "top": 7, "fleet/daemon": 7, "offline": 7, "served": 7,
	"cmd/dmsnap": 8,

	// Only tests and demonstrations use these; nothing below may.
	"internal/kernelcase": 5, "internal/model": 1, "internal/testcerts": 1, "internal/testhost": 1, "internal/testremote": 1,
	"bench/load": 5, "demo": 9, "bench": 9,
}

// core packages import the standard library and x/sys alone, so that a user of the library gets no more.
var core = []string{"block", "ondisk", "internal/chunkmap", "internal/gate", "internal/eventlog", "latency", "notify", "activity", "monitor", "writeback", "store", "snapshot", "check", "dump", "diff", "internal/picture", "internal/undo", "repair", "compact", "merge", "nbd", "nbd/wire", "vhost", "image", "cowfile", "server", "server/api", "server/figures", "fleet", "fleet/daemon", "source/mapped", "source/partition", "source/lvm", "source/stack"}

// forbidden: imports that the levels alone would allow, with the reason.
var forbidden = map[[2]string]string{
	{"nbd", "snapshot"}:        "a transport sees block.Device, whatever is behind it",
	{"nbd", "store"}:           "a transport sees block.Device, whatever is behind it",
	{"nbd", "ondisk"}:          "a transport sees block.Device, whatever is behind it",
	{"vhost", "snapshot"}:      "a transport sees block.Device, whatever is behind it",
	{"vhost", "store"}:         "a transport sees block.Device, whatever is behind it",
	{"vhost", "ondisk"}:        "a transport sees block.Device, whatever is behind it",
	{"vhost", "nbd"}:           "a transport needs no other",
	{"nbd/wire", "block"}:      "the protocol's bytes need no device",
	{"nbd/wire", "snapshot"}:   "the protocol's bytes need no device",
	{"merge", "nbd"}:           "merging is not a matter of transport",
	{"server/api", "snapshot"}: "a client needs no engine",
	{"server/api", "store"}:    "a client needs no engine",
	{"server/api", "merge"}:    "a client needs no engine",
	{"server/api", "nbd"}:      "a client needs no engine",
}

// grabBags are names that say nothing.
var grabBags = []string{"util", "utils", "common", "helper", "helpers", "types", "misc"}

// imports returns what the package in each folder imports, tests left out.
func imports(t *testing.T) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name := d.Name(); d.IsDir() && (name == "testdata" || name == "test" || strings.HasPrefix(name, ".") && name != ".") {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), p, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		dir := filepath.ToSlash(filepath.Dir(p))
		found[dir] = append(found[dir], "") // the folder has a package
		for _, i := range file.Imports {
			name, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			found[dir] = append(found[dir], name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestImportsPointDown(t *testing.T) {
	found := imports(t)
	for dir, names := range found {
		level, ok := levels[dir]
		if !ok {
			t.Errorf("package %s has no level: add it here and in ARCHITECTURE.md", dir)
			continue
		}
		for _, name := range names {
			to, ours := strings.CutPrefix(name, module+"/")
			if !ours {
				continue
			}
			if levels[to] >= level {
				t.Errorf("%s (level %d) imports %s (level %d): imports point down", dir, level, to, levels[to])
			}
			if why := forbidden[[2]string{dir, to}]; why != "" {
				t.Errorf("%s imports %s: %s", dir, to, why)
			}
		}
	}
	for dir := range levels {
		if found[dir] == nil {
			t.Errorf("there is no package %s", dir)
		}
	}
}

func TestCoreNeedsNoModules(t *testing.T) {
	found := imports(t)
	for _, dir := range core {
		for _, name := range found[dir] {
			first, _, _ := strings.Cut(name, "/")
			outside := strings.Contains(first, ".") && !strings.HasPrefix(name, module+"/")
			if outside && !strings.HasPrefix(name, "golang.org/x/sys/") {
				t.Errorf("%s imports %s: the library needs the standard library and x/sys alone", dir, name)
			}
			if dir == "ondisk" && (outside || name == "os" || name == "io" || name == "syscall") {
				t.Errorf("ondisk imports %s: it does no I/O", name)
			}
		}
	}
}

// homes are the only packages that import a module; their decision records say why (docs/decisions). Tests may import
// more.
var homes = map[string][]string{
	"github.com/hanwen/go-fuse/": {"fuse"},
	"github.com/mdlayher/":       {"nbdkernel"},
	"github.com/prometheus/":     {"metrics"},
	"github.com/chromedp/":       {},
	"charm.land/":                {"top"},
	"github.com/charmbracelet/":  {"top"},
}

// chosen are packages that programs choose and libraries do not import.
var chosen = []string{"fuse", "metrics", "nbdkernel", "top"}

func TestModulesStayInTheirPackages(t *testing.T) {
	for dir, names := range imports(t) {
		for _, name := range names {
			for prefix, allowed := range homes {
				if strings.HasPrefix(name, prefix) && !slices.Contains(allowed, dir) {
					t.Errorf("%s imports %s: %v alone may", dir, name, allowed)
				}
			}
			if strings.HasPrefix(name, module+"/test/") && dir != "bench" { // it measures in a guest
				t.Errorf("%s imports %s: it is for tests and the benchmark", dir, name)
			}
			if own, ok := strings.CutPrefix(name, module+"/"); ok && slices.Contains(chosen, own) && dir != "cmd/dmsnap" {
				t.Errorf("%s imports %s: programs choose it, libraries don't", dir, name)
			}
		}
	}
}

// TestRegistryClientsAreInOnePackage keeps the clients of registries and object stores out of everything but source/remote: see
// docs/decisions/0012-registries-and-object-stores.md.
func TestRegistryClientsAreInOnePackage(t *testing.T) {
	for dir, names := range imports(t) {
		for _, name := range names {
			for _, client := range []string{"oras.land/", "github.com/minio/", "github.com/opencontainers/"} {
				if strings.HasPrefix(name, client) && dir != "source/remote" {
					t.Errorf("%s imports %s: package source/remote alone does", dir, name)
				}
			}
		}
	}
}

func TestNoGrabBags(t *testing.T) {
	for dir := range imports(t) {
		for _, bad := range grabBags {
			if path.Base(dir) == bad {
				t.Errorf("package %s: name what is in it", dir)
			}
		}
	}
}

// TestPageShowsTheLevels holds the levels of ARCHITECTURE.md against those here.
func TestPageShowsTheLevels(t *testing.T) {
	page, err := os.ReadFile("ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	shown, level := map[string]int{}, -1
	_, list, _ := strings.Cut(string(page), "```\n")
	list, _, _ = strings.Cut(list, "```\n")
	for line := range strings.Lines(list) {
		if line[0] != ' ' {
			level = int(line[0] - '0')
		}
		// Names stand before the first gap that no name follows.
		for _, name := range strings.Fields(line[1:]) {
			if _, known := levels[name]; !known {
				break
			}
			shown[name] = level
		}
	}
	for name, level := range levels {
		if at, there := shown[name]; there && at != level {
			t.Errorf("ARCHITECTURE.md shows %s on level %d, it is on %d", name, at, level)
		} else if !there && !strings.Contains(string(page), "`"+name+"`") && name != "." {
			t.Errorf("ARCHITECTURE.md does not show %s", name)
		}
	}
}

// thin bounds the lines of cmd/dmsnap without tests, by groups of verbs: of those of a disk and its snapshots, which are all
// files that no other group has, and of those that came later, whose libraries are packages of their own.
var thin = []verbGroup{
	{"a disk and its snapshots", nil, 3_340},
	{"fleets, mounts, kernel devices, streams, registries, operators", []string{"attach.go", "mount.go", "daemon.go", "fleet.go", "operate.go", "top.go", "send.go", "receive.go", "push.go", "pull.go", "cache.go"}, 1_510},
}

type verbGroup struct {
	name  string
	files []string
	most  int
}

// TestCommandStaysThin bounds cmd/dmsnap, which parses, prints and wires. The bounds may only be lowered; a new verb may get
// its file into the second group.
func TestCommandStaysThin(t *testing.T) {
	files, err := filepath.Glob("cmd/dmsnap/*.go")
	if err != nil {
		t.Fatal(err)
	}
	lines := make([]int, len(thin))
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		at := max(0, slices.IndexFunc(thin, func(g verbGroup) bool { return slices.Contains(g.files, filepath.Base(name)) }))
		lines[at] += strings.Count(string(text), "\n")
	}
	for i, g := range thin {
		t.Logf("%s: %d lines", g.name, lines[i])
		if lines[i] == 0 || lines[i] > g.most {
			t.Errorf("cmd/dmsnap, %s: %d lines without tests, at most %d are allowed: move logic into a package", g.name, lines[i], g.most)
		}
	}
}
