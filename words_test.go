package dmsnap_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// privateWords are turns that plain technical English has a usual word for.
var privateWords = regexp.MustCompile(`(?i)\b(whoever|befalls?|fares|goodbye|mended|can be had|vouch(es)?|hung up)\b`)

// allowedWords are lines with a quotation, a standard term or a former name.
var allowedWords = []string{"words_test.go:", "docs/spec/", "CHANGELOG.md:", `"hung up"`}

// TestPlainWords refuses private words in pages, comments and texts.
func TestPlainWords(t *testing.T) {
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name := d.Name(); d.IsDir() && (name == "testdata" || strings.HasPrefix(name, ".") && name != ".") {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(p, ".md") && !strings.HasSuffix(p, ".go") {
			return nil
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		n := 0
		for line := range strings.Lines(string(text)) {
			n++
			place := filepath.ToSlash(p) + ": " + line
			allowed := false
			for _, a := range allowedWords {
				allowed = allowed || strings.Contains(place, a)
			}
			if word := privateWords.FindString(line); word != "" && !allowed {
				t.Errorf("%s:%d: %q is not plain: %s", p, n, word, strings.TrimSpace(line))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
