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

// A specification is what can be cited of a page in docs/spec.
type specification struct {
	sections map[string]bool // "5.9"
	points   int             // of its conformance checklist: numbered from 1 on
}

var (
	heading = regexp.MustCompile(`(?m)^#{2,4} (\d+(?:\.\d+)*)\.? `)
	point   = regexp.MustCompile(`(?m)^(?:\| )?(\d+)(?:\.| \|) `)

	// docs/spec/lvm2.md §7.4
	byPage = regexp.MustCompile(`docs/spec/([a-z0-9-]+)\.md(?: §+ ?(\d+(?:\.\d+)*)(?:(?:, §?|[–-])(\d+(?:\.\d+)*))*)?`)
	// specification 5.7, 7.5: of the page about exception stores
	byWord = regexp.MustCompile(`\b[Ss]pecification(?:, sections?)? (\d+(?:\.\d+)*(?:(?:, | and |[–-])\d+(?:\.\d+)*)*)`)
	byList = regexp.MustCompile(`\b[Cc]heck(?:list)? (\d+(?:(?:, | and |[–-])\d+)*)`)
	number = regexp.MustCompile(`\d+(?:\.\d+)*`)
)

func specifications(t *testing.T) map[string]specification {
	t.Helper()
	pages, err := filepath.Glob("docs/spec/*.md")
	if err != nil || len(pages) < 4 {
		t.Fatalf("specifications: %v, %v", pages, err)
	}
	all := map[string]specification{}
	for _, page := range pages {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		s := specification{sections: map[string]bool{}}
		for _, m := range heading.FindAllSubmatch(b, -1) {
			s.sections[string(m[1])] = true
		}
		_, list, _ := strings.Cut(string(b), " Conformance")
		for _, m := range point.FindAllStringSubmatch(list, -1) {
			if m[1] == fmt.Sprint(s.points+1) {
				s.points++
			}
		}
		all[strings.TrimSuffix(filepath.Base(page), ".md")] = s
	}
	return all
}

// TestCitationsResolve: every section and every point of a checklist that code and documents refer to exists.
func TestCitationsResolve(t *testing.T) {
	specs := specifications(t)
	if n := specs["dm-snapshot"].points; n != 120 {
		t.Errorf("the checklist of exception stores has %d points, want 120", n)
	}
	cited := 0
	section := func(file, page, n string) {
		cited++
		if !specs[page].sections[n] {
			t.Errorf("%s cites section %s of docs/spec/%s.md, which has none", file, n, page)
		}
	}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && d.Name() != "." || d.Name() == "testdata" || path == "docs/spec") {
			return fs.SkipDir
		}
		if ext := filepath.Ext(path); d.IsDir() || ext != ".go" && ext != ".md" {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		text := string(b)
		for _, m := range byPage.FindAllStringSubmatch(text, -1) {
			if _, known := specs[m[1]]; !known {
				t.Errorf("%s cites docs/spec/%s.md, which is nowhere", path, m[1])
				continue
			}
			_, places, _ := strings.Cut(m[0], "§")
			for _, n := range number.FindAllString(places, -1) {
				section(path, m[1], n)
			}
		}
		for _, m := range byWord.FindAllStringSubmatch(text, -1) {
			for _, n := range number.FindAllString(m[1], -1) {
				section(path, "dm-snapshot", n)
			}
		}
		for _, m := range byList.FindAllStringSubmatch(text, -1) {
			for _, n := range number.FindAllString(m[1], -1) {
				cited++
				var k int
				if fmt.Sscan(n, &k); k < 1 || k > specs["dm-snapshot"].points {
					t.Errorf("%s cites point %s of a checklist with %d points", path, n, specs["dm-snapshot"].points)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if cited < 60 {
		t.Errorf("only %d citations were found", cited)
	}
	t.Logf("%d citations", cited)
}
