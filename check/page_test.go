package check_test

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/check"
)

var update = flag.Bool("update", false, "write docs/problems.md and the golden outputs again")

// page is docs/problems.md.
func page() string {
	var b strings.Builder
	b.WriteString(`# Problems of exception stores

What ` + "`dmsnap check`" + ` can find, by code. This page is made from the table in ` + "`check/problems.go`" + ` by ` + "`make docs`" + `; the
codes never change their meaning.

An **error** means that the store can't be loaded, or that its content is wrong or missing somewhere. A **warning** means
that the content is correct now, but that a later operation may damage it. A **note** means lost space, or no loss at all.

| code | problem | severity | repairable |
| --- | --- | --- | --- |
`)
	for _, p := range check.Problems() {
		fmt.Fprintf(&b, "| [%v](#%s) | %s | %v | %s |\n", p.Code, strings.ToLower(p.Code.String()), p.Name, p.Severity, p.Repair)
	}
	for _, p := range check.Problems() {
		fmt.Fprintf(&b, "\n## %v\n\n**%s.** %s\n\n- Linux: %s\n- Remedy: %s\n", p.Code, p.Name, p.Means, p.Kernel, p.Remedy)
	}
	return b.String()
}

// TestProblemsPage: the page in the documents is the table's.
func TestProblemsPage(t *testing.T) {
	const path = "../docs/problems.md"
	if *update {
		if err := os.WriteFile(path, []byte(page()), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil || string(b) != page() {
		t.Errorf("%s is not what the table says (%v): make docs", path, err)
	}
}

// Every row is whole, and a code is its place in the table.
func TestTableIsWhole(t *testing.T) {
	for i, p := range check.Problems() {
		if int(p.Code) != i+1 || p.Name == "" || p.Severity == 0 || p.Repair == "" {
			t.Errorf("row %d: %+v", i+1, p)
		}
		for _, s := range []string{p.Means, p.Kernel, p.Remedy} {
			if !strings.HasSuffix(s, ".") {
				t.Errorf("%v: %q is no sentence", p.Code, s)
			}
		}
	}
}
