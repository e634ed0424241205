package dmsnap_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A wrapper is a struct that embeds a device: its methods are its own and those of the embedded one.
type wrapper struct {
	place    token.Position
	embedded string // "Device", "Forward", "Memory" or "File"
	reason   bool   // a comment at the embedded device says why some methods are not overridden
}

// wrappers returns the structs of the tree that embed a device, by folder, package and name, and their methods.
func wrappers(t *testing.T) (all map[string]wrapper, methods map[string][]string, structs int) {
	t.Helper()
	all, methods = map[string]wrapper{}, map[string][]string{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		in := filepath.ToSlash(filepath.Dir(path)) + " " + file.Name.Name + "."
		note := func(name string, s *ast.StructType) {
			structs++
			for _, field := range s.Fields.List {
				if kind := deviceOf(field.Type, file.Name.Name); kind != "" && len(field.Names) == 0 {
					all[in+name] = wrapper{set.Position(field.Pos()), kind, field.Doc != nil || field.Comment != nil}
				}
			}
		}
		named := map[*ast.StructType]bool{}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.TypeSpec:
				if s, is := n.Type.(*ast.StructType); is {
					named[s] = true
					note(n.Name.Name, s)
				}
			case *ast.StructType:
				if !named[n] {
					note(set.Position(n.Pos()).String(), n)
				}
			case *ast.FuncDecl:
				if n.Recv != nil {
					to := n.Recv.List[0].Type
					if star, is := to.(*ast.StarExpr); is {
						to = star.X
					}
					if id, is := to.(*ast.Ident); is {
						methods[in+id.Name] = append(methods[in+id.Name], n.Name.Name)
					}
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all, methods, structs
}

// deviceOf returns which device a type is, "" for any other.
func deviceOf(e ast.Expr, pkg string) string {
	if star, is := e.(*ast.StarExpr); is {
		e = star.X
	}
	name := ""
	switch e := e.(type) {
	case *ast.SelectorExpr:
		if from, is := e.X.(*ast.Ident); is && from.Name == "block" {
			name = e.Sel.Name
		}
	case *ast.Ident:
		if e.Name == "forward" { // an alias, so that the field is not exported
			return "Forward"
		}
		if pkg == "block" {
			name = e.Name
		}
	}
	if slices.Contains([]string{"Device", "Forward", "Memory", "File"}, name) {
		return name
	}
	return ""
}

// TestWrappers holds all structs that embed a device against two rules.
func TestWrappers(t *testing.T) {
	all, methods, structs := wrappers(t)
	if structs < 1000 || len(all) < 50 {
		t.Errorf("%d structs were looked at, of which %d embed a device", structs, len(all))
	}
	noDeviceIsEmbedded(t, all)
	overrideTogether(t, all, methods)
}

// noDeviceIsEmbedded: a struct that embeds a block.Device hides the optional abilities of the device from the functions of package
// block: holes are read then, for one. A device that wraps another one embeds a block.Forward. A test that needs a device without
// abilities has blocktest.Plain, or says why at the field.
func noDeviceIsEmbedded(t *testing.T, all map[string]wrapper) {
	for _, w := range all {
		test := strings.HasSuffix(w.place.Filename, "_test.go") || strings.HasPrefix(w.place.Filename, "block/blocktest/")
		if w.embedded == "Device" && !(test && w.reason) {
			t.Errorf("%s: embeds a block.Device: embed a block.Forward, use blocktest.Plain, or give it a name", w.place)
		}
	}
}

// overrideTogether: a struct that embeds a device with abilities and changes how it is written or read changes the
// other methods that do the same, too: else a durable write goes past its WriteAt. What does not has the reason at the field.
func overrideTogether(t *testing.T, all map[string]wrapper, methods map[string][]string) {
	together := map[string][]string{
		"WriteAt": {"WriteDurableAt", "WriteLastAt", "ZeroAt"},
		"ReadAt":  {"ReadCached"},
	}
	lacks := map[string][]string{"Memory": {"WriteLastAt", "ReadCached"}, "File": {}, "Forward": {}, "Device": {"WriteDurableAt", "WriteLastAt", "ZeroAt", "ReadCached"}}
	for name, w := range all {
		for changed, others := range together {
			if !slices.Contains(methods[name], changed) {
				continue
			}
			for _, other := range others {
				if !w.reason && !slices.Contains(methods[name], other) && !slices.Contains(lacks[w.embedded], other) {
					t.Errorf("%s: %s has a %s of its own, and not %s of the embedded %s", w.place, name, changed, other, w.embedded)
				}
			}
		}
	}
}
