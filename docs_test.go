package dmsnap_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
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
	described := make(map[string]bool)
	for _, n := range name.FindAllString(string(page), -1) {
		described[n] = true
	}
	for n := range names {
		if !described[n] {
			t.Errorf("docs/nbd.md says nothing of %s", n)
		}
	}
}

// TestReadmeSnippetIsAnExample: the Go code in README.md is that of a runnable example, without its indentation.
func TestReadmeSnippetIsAnExample(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile("snapshot/example_files_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, snippet, _ := strings.Cut(string(readme), "```go\n")
	snippet, _, found := strings.Cut(snippet, "```")
	if code := regexp.MustCompile(`(?m)^\t`).ReplaceAllString(string(example), ""); !found || !strings.Contains(code, snippet) {
		t.Errorf("the code in README.md is not in snapshot/example_files_test.go:\n%s", snippet)
	}
	if n := strings.Count(string(readme), "\n"); n > 150 {
		t.Errorf("README.md has %d lines, want at most 150", n)
	}
}

// TestDecisionsAreNumbered: the pages in docs/decisions are numbered from 1 on, each number once, with the number in the
// title; the pages that are named elsewhere exist.
func TestDecisionsAreNumbered(t *testing.T) {
	pages, err := filepath.Glob("docs/decisions/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatalf("%v, %v", pages, err)
	}
	index, err := os.ReadFile("docs/README.md")
	if err != nil {
		t.Fatal(err)
	}
	for i, page := range pages { // sorted
		if !strings.Contains(string(index), "(decisions/"+filepath.Base(page)+")") {
			t.Errorf("%s is not in docs/README.md", page)
		}
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("%04d-", i+1); !strings.HasPrefix(filepath.Base(page), want) {
			t.Errorf("%s: want number %s", page, want)
		}
		if want := fmt.Sprintf("# %d. ", i+1); !strings.HasPrefix(string(b), want) {
			t.Errorf("%s: the title does not begin with %q", page, want)
		}
	}
	named := regexp.MustCompile(`decisions/\d{4}-[a-z-]+\.md`)
	err = filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if ext := filepath.Ext(path); err != nil || d.IsDir() || ext != ".go" && ext != ".md" {
			return err
		}
		b, err := os.ReadFile(path)
		for _, name := range named.FindAllString(string(b), -1) {
			if _, err := os.Stat(filepath.Join("docs", name)); err != nil {
				t.Errorf("%s names %s: %v", path, name, err)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestLinksResolve: relative links in the documents name files that exist.
func TestLinksResolve(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:]+)(?:#[^)]*)?\)`)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if path == "dist" { // what make packages has built
			return fs.SkipDir
		}
		if err != nil || d.IsDir() || filepath.Ext(path) != ".md" {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range link.FindAllStringSubmatch(string(b), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), m[1])); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestPackagesOfContributors: CONTRIBUTING.md names the Debian packages that .ci/run installs.
func TestPackagesOfContributors(t *testing.T) {
	packages := func(file, begin, end string) []string {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, list, found := strings.Cut(string(b), begin)
		list, _, ended := strings.Cut(list, end)
		if !found || !ended {
			t.Fatalf("%s has no list of packages", file)
		}
		return strings.Fields(strings.ReplaceAll(list, "\\", ""))
	}
	page, ci := packages("CONTRIBUTING.md", "apt-get install ", "\n\n"), packages(".ci/run", "packages=(", ")")
	if !slices.Equal(page, ci) || len(ci) < 10 {
		t.Errorf("CONTRIBUTING.md has %q, .ci/run %q", page, ci)
	}
}
