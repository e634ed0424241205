package dmsnap_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// documentation returns the comments of the package in a folder, without comment markers.
func documentation(t *testing.T, dir string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	var doc *ast.CommentGroup
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		if file.Doc != nil && doc != nil {
			t.Errorf("%s: two comments describe the package", dir)
		}
		if file.Doc != nil {
			doc = file.Doc
		}
	}
	if doc == nil {
		t.Errorf("%s: no comment describes the package", dir)
		return ""
	}
	return doc.Text()
}

// publicPackages returns the packages that other programs may import.
func publicPackages(t *testing.T) (all []string) {
	t.Helper()
	for dir := range imports(t) {
		if !slices.Contains([]string{"internal", "cmd", "test", "bench", "demo", "tools", "."}, strings.Split(dir, "/")[0]) {
			all = append(all, dir)
		}
	}
	slices.Sort(all)
	return all
}

// TestRootListsThePackages: the comment of the root package lists each public package once, and nothing else.
func TestRootListsThePackages(t *testing.T) {
	list, _, _ := strings.Cut(documentation(t, "."), "To embed")
	var listed []string
	for _, m := range regexp.MustCompile(`(?m)^\t([a-z0-9/]+)  +\S`).FindAllStringSubmatch(list, -1) {
		listed = append(listed, m[1])
	}
	slices.Sort(listed)
	all := publicPackages(t)
	for _, dir := range all {
		if !slices.Contains(listed, dir) {
			t.Errorf("doc.go does not list %s", dir)
		}
	}
	for i, dir := range listed {
		if !slices.Contains(all, dir) {
			t.Errorf("doc.go lists %s, which is no public package", dir)
		}
		if i > 0 && listed[i-1] == dir {
			t.Errorf("doc.go lists %s twice", dir)
		}
	}
	if len(all) < 40 {
		t.Errorf("only %d public packages were found", len(all))
	}
}

// TestPackagesAreDescribed: the comment of each public package begins with its purpose, and has a minimal use and guarantees.
func TestPackagesAreDescribed(t *testing.T) {
	for _, dir := range publicPackages(t) {
		text := documentation(t, dir)
		name := path.Base(dir)
		if !strings.HasPrefix(text, "Package "+name+" ") {
			t.Errorf("%s: the comment does not begin with the purpose", dir)
		}
		if !strings.Contains(text, "\n\t") {
			t.Errorf("%s: the comment shows no use", dir)
		}
		if !regexp.MustCompile(`(?m)^# Guarantees$|Guarantees?( of both)?: `).MatchString(text) {
			t.Errorf("%s: the comment gives no guarantees", dir)
		}
	}
}
