package dmsnap_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// privateWords are words and phrases that plain technical English has usual words for, and those.
var privateWords = map[string]string{
	"in hand, keep the turn, keeps the turn, lend the turn, lends the turn, reclaim the turn, reclaims the turn": "executed inline; arm and disarm the watchdog",
	"get its turn, gets its turn, get their turn, have their turn, have its turn, has its turn":                  "is executed, is used",
	"loses step, lose step, lost step, out of step, be in step, is in step":                                      "violates the protocol; in sync",
	"hang up, hangs up, hung up, hanging up":                                                                     "disconnects, closes the connection",
	"goodbye, good bye":                                                                                          "EOF between requests",
	"patience, patience ended":                                                                                   "timeout, no wait",
	"let held go, leaving held, write held":                                                                      "flush, write back",
	"lives, lived, living":                                                                                       "is in; lasts; runs",
	"come alive, comes alive, came alive":                                                                        "become valid",
	"stay dead, stays dead, dead clients":                                                                        "void, closed, disconnected",
	"fare, fares, fared":                                                                                         "status",
	"hear, hears, heard, hearing":                                                                                "is called for, receives",
	"mend, mends, mended, mending, mendable":                                                                     "repair, repairable",
	"what helps, helps next, helps with, verb helps, verb that helps":                                            "remedy",
	"befall, befalls, befell, befallen":                                                                          "fails, happens",
	"hold up, holds up, held up, holding up, hold it up, hold them up":                                           "delay, block",
	"nobody's, somebody's, anybody's, asks nobody, ask nobody":                                                   "not in use, has no",
	"tie, ties":                            "undo label, link",
	"law, laws":                            "invariant",
	"whoever":                              "a program that",
	"bear, bears, can't bear, cannot bear": "allow, exclude",
	"is done without, are done without, be done without": "ignored, without",
	"can be had": "available",
	"get out of, gets out of, getting out of": "recover from",
	"becomes of, become of":                   "result",
	"tell, tells, telling, told":              "report, log, distinguish",
	"for good":                                "permanently",
	"heed, heeds, heeded, heeding":            "respect",
	"aloud":                                   "with SKIPPED",
	"victim, victims":                         "the one that fails",
	"vouch, vouches, vouched":                 "guarantee",
	"believe, believes, believed, believing":  "trust, use",
	"thence, hitherto, henceforth, heretofore, thereof, hereby, betwixt, lest, nought, amid": "a word of this century",
}

// standardWords are phrases with such a word that are terms of the field, by the word that stands before or the file.
var standardWords = []struct{ file, word, why string }{
	{"words_test.go", "", "the list itself"},
	{"docs/spec/", "", "handed in as they are"},
	{"CHANGELOG.md", "", "has former names"},
	{"cmd/dmsnap/exit.go", "hang up", "SIGHUP"},
	{"cmd/dmsnap/exit.go", "hung up", "SIGHUP"},
	{"cmd/dmsnap/process_test.go", "hang up", "SIGHUP"},
	{"cmd/dmsnap/process_test.go", "hung up", "SIGHUP"},
}

// privateMessages is about texts in programs: what is missing is required, and a help text begins with a verb.
var privateMessages = regexp.MustCompile(`"[^"]*\b([A-Z]{2,} is needed|Tell |Get out)`)

// A phrase is a private word, or several.
type phrase struct {
	words []string
	usual string
}

// phrases returns all private phrases by their first word.
func phrases() map[string][]phrase {
	all := make(map[string][]phrase)
	for list, usual := range privateWords {
		for p := range strings.SplitSeq(list, ", ") {
			words := strings.Fields(p)
			all[words[0]] = append(all[words[0]], phrase{words, usual})
		}
	}
	return all
}

// private returns the private phrase with which words begin.
func private(all map[string][]phrase, path string, words []string) (found, usual string) {
	for _, p := range all[words[0]] {
		if len(words) < len(p.words) || !slices.Equal(words[:len(p.words)], p.words) {
			continue
		}
		found = strings.Join(p.words, " ")
		if !slices.ContainsFunc(standardWords, func(s struct{ file, word, why string }) bool {
			return strings.HasPrefix(path, s.file) && (s.word == "" || s.word == found)
		}) {
			return found, p.usual
		}
	}
	return "", ""
}

// wordsOf returns an identifier as words: "readTie2" as "read", "tie" and "2".
func wordsOf(name string) (words []string) {
	runes, from := []rune(name), 0
	for i, r := range runes {
		switch {
		case i == from:
		case r == '_', unicode.IsDigit(r) != unicode.IsDigit(runes[i-1]),
			unicode.IsUpper(r) && (!unicode.IsUpper(runes[i-1]) || i+1 < len(runes) && unicode.IsLower(runes[i+1])):
			words, from = append(words, strings.ToLower(string(runes[from:i]))), i
		}
		if r == '_' {
			from = i + 1
		}
	}
	if from < len(runes) {
		words = append(words, strings.ToLower(string(runes[from:])))
	}
	return words
}

// walkOurs calls f with the path and the text of each file that people of the project write.
func walkOurs(t *testing.T, f func(path, text string)) {
	t.Helper()
	kinds := []string{".go", ".md", ".sh", ".yml", ".yaml", ".service", ".timer", ".js", ".html", ".css"}
	others := []string{"Makefile", "contrib/dmsnap-backup", ".ci/run"}
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name := d.Name(); d.IsDir() && (name == "testdata" || name == "dist" || name == "bin" || strings.HasPrefix(name, ".") && len(name) > 1 && name != ".ci") {
			return fs.SkipDir
		}
		path := filepath.ToSlash(p)
		if d.IsDir() || !slices.Contains(kinds, filepath.Ext(path)) && !slices.Contains(others, path) {
			return nil
		}
		text, err := os.ReadFile(p)
		if err == nil {
			f(path, string(text))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestPlainWords refuses private words in pages, comments and texts. A phrase is found where a line ends in it, too.
func TestPlainWords(t *testing.T) {
	all, files := phrases(), 0
	apart := func(r rune) bool { return !unicode.IsLetter(r) && r != '\'' && r != '_' }
	walkOurs(t, func(path, text string) {
		files++
		var words, lines []string
		var numbers []int
		n := 0
		for line := range strings.Lines(text) {
			n++
			if m := privateMessages.FindString(line); m != "" && path != "words_test.go" {
				t.Errorf("%s:%d: %s: what is missing is required; a help text begins with Show, List, Recover, Check", path, n, m)
			}
			for _, word := range strings.FieldsFunc(strings.ToLower(line), apart) {
				words, numbers, lines = append(words, strings.Trim(word, "'")), append(numbers, n), append(lines, line)
			}
		}
		for i := range words {
			if found, usual := private(all, path, words[i:]); found != "" {
				t.Errorf("%s:%d: %q is not plain, but: %s: %s", path, numbers[i], found, usual, strings.TrimSpace(lines[i]))
			}
		}
	})
	if files < 900 {
		t.Errorf("%d files were looked at", files)
	}
}

// TestPlainNames refuses private words in the names that programs and tests declare.
func TestPlainNames(t *testing.T) {
	all, names := phrases(), 0
	walkOurs(t, func(path, text string) {
		if filepath.Ext(path) != ".go" {
			return
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, text, parser.SkipObjectResolution)
		if err != nil {
			t.Error(err)
			return
		}
		check := func(e ast.Expr) {
			id, is := e.(*ast.Ident)
			if !is {
				return
			}
			names++
			words := wordsOf(id.Name)
			for i := range words {
				if found, usual := private(all, path, words[i:]); found != "" {
					t.Errorf("%s: %s: %q is not plain, but: %s", set.Position(id.Pos()), id.Name, found, usual)
				}
			}
		}
		idents := func(list []*ast.Ident) {
			for _, id := range list {
				check(id)
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				check(n.Name)
			case *ast.TypeSpec:
				check(n.Name)
			case *ast.ValueSpec:
				idents(n.Names)
			case *ast.Field:
				idents(n.Names)
			case *ast.AssignStmt:
				if n.Tok == token.DEFINE {
					for _, e := range n.Lhs {
						check(e)
					}
				}
			case *ast.RangeStmt:
				if n.Tok == token.DEFINE {
					check(n.Key)
					check(n.Value)
				}
			}
			return true
		})
	})
	if names < 10_000 {
		t.Errorf("%d names were looked at", names)
	}
}

// TestWordsOf: names are split where their words begin, and a phrase is found in them.
func TestWordsOf(t *testing.T) {
	for name, want := range map[string]string{"readTie": "read tie", "TestTieIs": "test tie is", "HTTPServer": "http server",
		"store2": "store 2", "no_room": "no room", "patienceEnded": "patience ended", "_": "", "TestC046Reads": "test c 046 reads"} {
		if got := strings.Join(wordsOf(name), " "); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	for text, want := range map[string]string{"hangs up": "hangs up", "hangs": "", "tie": "tie", "properties": ""} {
		if got, _ := private(phrases(), "x.go", strings.Fields(text)); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}
