package dmsnap_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// TestNoDeviceIsEmbedded: a struct that embeds a block.Device hides the optional abilities of the device from the functions of package
// block: holes are read then, for one. A device that wraps another one embeds a block.Forward.
func TestNoDeviceIsEmbedded(t *testing.T) {
	structs := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasPrefix(path, "block/blocktest/") {
			return err
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			s, is := n.(*ast.StructType)
			if !is {
				return true
			}
			structs++
			for _, field := range s.Fields.List {
				if isDevice(field.Type) && len(field.Names) == 0 {
					t.Errorf("%s: embeds a block.Device: embed a block.Forward, or give it a name", set.Position(field.Pos()))
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if structs < 500 {
		t.Errorf("%d structs were looked at", structs)
	}
}

// isDevice reports whether a type is the interface block.Device.
func isDevice(e ast.Expr) bool {
	s, is := e.(*ast.SelectorExpr)
	if !is {
		return false
	}
	pkg, is := s.X.(*ast.Ident)
	return is && pkg.Name == "block" && s.Sel.Name == "Device"
}
