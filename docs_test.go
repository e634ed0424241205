package dmsnap_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// testNames returns every test and fuzz target of the module.
func testNames(t *testing.T) map[string]bool {
	t.Helper()
	names := make(map[string]bool)
	declared := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w+)\(`)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range declared.FindAllSubmatch(b, -1) {
			names[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// TestDocumentsNameTestsThatExist: a statement in the documents that names its test has it.
func TestDocumentsNameTestsThatExist(t *testing.T) {
	tests := testNames(t)
	named := regexp.MustCompile("`((?:Test|Fuzz|Benchmark)[A-Z]\\w*)`")
	pages, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, page := range append(pages, "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md") {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range named.FindAllSubmatch(b, -1) {
			found++
			if !tests[string(m[1])] {
				t.Errorf("%s names %s, which is nowhere", page, m[1])
			}
		}
	}
	if found < 120 {
		t.Errorf("only %d tests are named", found)
	}
}

// TestChecklistComplete: every point of the specification's checklist stands in docs/kernel-parity.md with
// a test of its number.
func TestChecklistComplete(t *testing.T) {
	b, err := os.ReadFile("docs/kernel-parity.md")
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= 120; n++ {
		row := regexp.MustCompile(fmt.Sprintf("(?m)^\\| %d \\| .* \\| .* \\| .*`TestC%03d[A-Z]\\w*`.* \\|$", n, n))
		if !row.Match(b) {
			t.Errorf("point %d has no row with a test of its own", n)
		}
	}
}

// TestProtocolTableComplete: docs/nbd.md speaks of every name of the protocol that the code has.
func TestProtocolTableComplete(t *testing.T) {
	page, err := os.ReadFile("docs/nbd.md")
	if err != nil {
		t.Fatal(err)
	}
	name := regexp.MustCompile(`NBD_[A-Z_]+[A-Z]`)
	code, err := filepath.Glob("nbd/wire/*.go")
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]bool)
	for _, file := range code {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range name.FindAllString(string(b), -1) {
			names[n] = true
		}
	}
	if len(names) < 60 {
		t.Errorf("only %d names", len(names))
	}
	told := make(map[string]bool)
	for _, n := range name.FindAllString(string(page), -1) {
		told[n] = true
	}
	for n := range names {
		if !told[n] {
			t.Errorf("docs/nbd.md says nothing of %s", n)
		}
	}
}
