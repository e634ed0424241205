package block_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
)

// notAbilities are the exported interfaces that devices don't implement: what a Forward asks, and an error.
var notAbilities = []string{"Holder", "RetryLater"}

// Every other exported interface of the package is an ability of devices, and a Forward has its methods.
func TestForwardHasEveryAbility(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	forward, found := reflect.TypeFor[block.Forward](), 0
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok || !spec.Name.IsExported() || slices.Contains(notAbilities, spec.Name.Name) {
				return true
			}
			methods, ok := spec.Type.(*ast.InterfaceType)
			if !ok {
				return true
			}
			for _, m := range methods.Methods.List {
				for _, name := range m.Names {
					found++
					if _, ok := forward.MethodByName(name.Name); !ok {
						t.Errorf("Forward lacks %s of %s", name.Name, spec.Name.Name)
					}
				}
			}
			return true
		})
	}
	if found < 13 {
		t.Errorf("only %d methods were found", found)
	}
}

// uncomparable is a device whose type can't be compared.
type uncomparable struct {
	block.Device // only how it is compared matters
	tags         []string
}

// holding compares only at run time.
type holding struct {
	block.Device // only how it is compared matters
	value        any
}

type named struct {
	block.Device // only how it is compared matters
	name         string
}

func (n named) Identity() string { return n.name }

func TestSame(t *testing.T) {
	a, b := block.NewMemory(512), block.NewMemory(512)
	var none *block.File
	for _, c := range []struct {
		name string
		a, b block.Device
		want bool
	}{
		{"itself", a, a, true},
		{"two", a, b, false},
		{"under a forward", block.NewForward(a), a, true},
		{"under two forwards", block.NewForward(block.NewForward(a)), block.NewForward(a), true},
		{"forwards to two", block.NewForward(a), block.NewForward(b), false},
		{"one identity", named{a, "disk"}, named{b, "disk"}, true},
		{"two identities", named{a, "disk"}, named{b, "other"}, false},
		{"no identity", named{a, ""}, named{b, ""}, false},
		{"an identity, forwarded", block.NewForward(named{a, "disk"}), named{b, "disk"}, true},
		{"uncomparable", uncomparable{a, nil}, uncomparable{a, nil}, false},
		{"uncomparable, forwarded", block.NewForward(uncomparable{a, nil}), block.NewForward(uncomparable{b, nil}), false},
		{"uncomparable at run time", holding{a, []int{1}}, holding{a, []int{1}}, false},
		{"comparable at run time", holding{a, 1}, holding{a, 1}, true},
		{"pointer to uncomparable", &uncomparable{a, nil}, &uncomparable{a, nil}, false},
		{"no device", nil, a, false},
		{"no file", none, a, false},
	} {
		if got := block.Same(c.a, c.b); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
		if got := block.Same(c.b, c.a); got != c.want {
			t.Errorf("%s, exchanged: %v", c.name, got)
		}
	}
	u := &uncomparable{a, nil}
	if !block.Same(u, u) || !block.Same(block.NewForward(u), u) {
		t.Error("a pointer is not the same as itself")
	}
}
