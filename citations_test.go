package dmsnap_test

import (
	"fmt"
	"go/parser"
	"go/token"
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
	hazards  map[string]bool // "H4"
	points   int             // of its conformance checklist: numbered from 1 on
}

var (
	heading = regexp.MustCompile(`(?m)^#{2,4} (\d+(?:\.\d+)*)\.? `)
	point   = regexp.MustCompile(`(?m)^(?:\| )?(\d+)(?:\.| \|) `)
	row     = regexp.MustCompile(`(?m)^\| (H\d+) \|`)

	// docs/spec/lvm2.md §7.4, and after that, or in a package about one format, §7.4 alone
	byPage = regexp.MustCompile(`docs/spec/([a-z0-9-]+)\.md|§ ?(\d+(?:\.\d+)*)`)
	// specification 5.7, 7.5: of the page about exception stores
	byWord = regexp.MustCompile(`\b[Ss]pecification(?:, sections?)? (\d+(?:\.\d+)*(?:(?:, | and |[–-])\d+(?:\.\d+)*)*)`)
	byList = regexp.MustCompile(`\b[Cc]heck(?:list)? (\d+(?:(?:, | and |[–-])\d+)*)`)
	hazard = regexp.MustCompile(`\bH\d+\b`)
	number = regexp.MustCompile(`\d+(?:\.\d+)*`)
	bare   = regexp.MustCompile(`\((\d\.\d{1,2}(?:\.\d+)?)[,;)]`) // (3.2), which names no document
)

// pageOf is the page that a citation without one refers to, by the beginning of a file's path.
var pageOf = map[string]string{
	"vhost/": "vhost-user-blk", "source/lvm/": "lvm2", "source/partition/": "lvm2", "source/qcow2/": "qcow2",
	"docs/qcow2.md": "qcow2", "docs/lvm": "lvm2", "docs/vhost": "vhost-user-blk",
}

// passages are the parts of a file that can cite: the comments of a program, the paragraphs of a page.
func passages(path string) (all []string, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if filepath.Ext(path) == ".md" {
		return strings.Split(string(b), "\n\n"), nil
	}
	file, err := parser.ParseFile(token.NewFileSet(), path, b, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	for _, c := range file.Comments {
		all = append(all, c.Text())
	}
	return all, nil
}

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
		s := specification{sections: map[string]bool{}, hazards: map[string]bool{}}
		for _, m := range heading.FindAllSubmatch(b, -1) {
			s.sections[string(m[1])] = true
		}
		for _, m := range row.FindAllSubmatch(b, -1) {
			s.hazards[string(m[1])] = true
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

// A citer resolves the citations of one file.
type citer struct {
	*testing.T
	specs map[string]specification
	path  string
	cited int
}

func (c *citer) section(page, n string) {
	c.cited++
	if !c.specs[page].sections[n] {
		c.Errorf("%s cites section %s of docs/spec/%s.md, which has none", c.path, n, page)
	}
}

// passage resolves what a comment or a paragraph cites.
func (c *citer) passage(text string) {
	page := "dm-snapshot"
	for prefix, p := range pageOf {
		if strings.HasPrefix(c.path, prefix) {
			page = p
		}
	}
	for _, m := range byPage.FindAllStringSubmatch(text, -1) {
		if m[1] == "" {
			c.section(page, m[2])
			continue
		}
		page = m[1]
		if _, known := c.specs[page]; !known {
			c.Errorf("%s cites docs/spec/%s.md, which does not exist", c.path, page)
		}
	}
	for _, m := range byWord.FindAllStringSubmatch(text, -1) {
		for _, n := range number.FindAllString(m[1], -1) {
			c.section("dm-snapshot", n)
		}
	}
	for _, m := range byList.FindAllStringSubmatch(text, -1) {
		for _, n := range number.FindAllString(m[1], -1) {
			c.cited++
			var k int
			if fmt.Sscan(n, &k); k < 1 || k > c.specs["dm-snapshot"].points {
				c.Errorf("%s cites point %s of a checklist with %d points", c.path, n, c.specs["dm-snapshot"].points)
			}
		}
	}
	for _, h := range hazard.FindAllString(text, -1) {
		c.cited++
		if !c.specs["dm-snapshot"].hazards[h] {
			c.Errorf("%s cites hazard %s, which docs/spec/dm-snapshot.md does not have", c.path, h)
		}
	}
	for _, m := range bare.FindAllStringSubmatch(text, -1) {
		c.Errorf("%s: %q names no document: write §%s", c.path, m[0], m[1])
	}
}

// TestCitationsResolve: every section, hazard and point of a checklist that code and documents refer to exists.
func TestCitationsResolve(t *testing.T) {
	specs := specifications(t)
	if n := specs["dm-snapshot"].points; n != 120 {
		t.Errorf("the checklist of exception stores has %d points, want 120", n)
	}
	if n := len(specs["dm-snapshot"].hazards); n != 12 {
		t.Errorf("docs/spec/dm-snapshot.md has %d hazards, want 12", n)
	}
	cited := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && d.Name() != "." || d.Name() == "testdata" || path == "docs/spec") {
			return fs.SkipDir
		}
		if ext := filepath.Ext(path); d.IsDir() || ext != ".go" && ext != ".md" || path == "citations_test.go" {
			return nil
		}
		list, err := passages(path)
		c := citer{T: t, specs: specs, path: filepath.ToSlash(path)}
		for _, text := range list {
			c.passage(text)
		}
		cited += c.cited
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if cited < 200 {
		t.Errorf("only %d citations were found", cited)
	}
	t.Logf("%d citations", cited)
}
