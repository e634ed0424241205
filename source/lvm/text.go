package lvm

import (
	"fmt"
	"strconv"
)

// Bounds of a text: those of real ones are far below (docs/spec/lvm2.md §5.2).
const (
	maxText   = 128 << 20
	maxDepth  = 16
	maxTokens = 2 << 20
	maxName   = 127
)

// A SyntaxError is a place in a metadata text at which it can't be read.
type SyntaxError struct {
	Byte, Line int // from 0, from 1
	What       string
}

func (e *SyntaxError) Error() string {
	return fmt.Sprintf("metadata text, line %d (byte %d): %s", e.Line, e.Byte, e.What)
}

// A section is a run of entries of a metadata text, in order.
type section struct {
	names  []string
	values map[string]any // int64, float64, string, []any of those, *section
}

// parse reads a metadata text, of a metadata area (without its NUL) or of a backup file (docs/spec/lvm2.md §5). The error is a
// *SyntaxError.
func parse(text []byte) (s *section, err error) {
	p := &parser{text: text}
	defer func() {
		if failed := recover(); failed != nil {
			e, is := failed.(*SyntaxError)
			if !is {
				panic(failed)
			}
			s, err = nil, e
		}
	}()
	s = p.section(0)
	return s, nil
}

type parser struct {
	text   []byte
	at     int
	tokens int
}

// fail ends the parsing.
func (p *parser) fail(at int, format string, args ...any) {
	line := 1
	for _, c := range p.text[:min(at, len(p.text))] {
		if c == '\n' {
			line++
		}
	}
	panic(&SyntaxError{at, line, fmt.Sprintf(format, args...)})
}

// next skips white space and comments and returns the byte that follows, 0 at the end.
func (p *parser) next() byte {
	for p.at < len(p.text) {
		switch c := p.text[p.at]; c {
		case ' ', '\t', '\r', '\n':
			p.at++
		case '#':
			for p.at < len(p.text) && p.text[p.at] != '\n' {
				p.at++
			}
		case 0:
			p.fail(p.at, "a NUL byte")
		default:
			return c
		}
	}
	return 0
}

func (p *parser) count() {
	if p.tokens++; p.tokens > maxTokens {
		p.fail(p.at, "more than %d names and values", maxTokens)
	}
}

// section reads entries up to the closing brace, or, at depth 0, to the end.
func (p *parser) section(depth int) *section {
	if depth > maxDepth {
		p.fail(p.at, "sections are nested deeper than %d", maxDepth)
	}
	s := &section{values: map[string]any{}}
	for {
		switch c := p.next(); {
		case c == 0 && depth > 0:
			p.fail(p.at, "the text ends inside a section: a } is missing")
		case c == 0:
			return s
		case c == '}' && depth > 0:
			p.at++
			return s
		case !isName(c):
			p.fail(p.at, "%q where a name must be", c)
		}
		p.count()
		start := p.at
		for p.at < len(p.text) && isName(p.text[p.at]) {
			p.at++
		}
		name := string(p.text[start:p.at])
		if _, twice := s.values[name]; twice {
			p.fail(start, "%.40q is there twice", name)
		}
		var v any
		switch c := p.next(); c {
		case '=':
			p.at++
			v = p.value()
		case '{':
			p.at++
			v = p.section(depth + 1)
		default:
			p.fail(p.at, "= or { must follow the name %.40q", name)
		}
		s.names = append(s.names, name)
		s.values[name] = v
	}
}

// value reads a number, a string or a list.
func (p *parser) value() any {
	if p.next() != '[' {
		return p.scalar()
	}
	p.at++
	list := []any{}
	for {
		switch c := p.next(); c {
		case ']':
			p.at++
			return list
		case 0:
			p.fail(p.at, "the text ends inside a list: a ] is missing")
		case '[':
			p.fail(p.at, "a list inside a list")
		case ',':
			p.at++
		default:
			list = append(list, p.scalar())
		}
	}
}

func (p *parser) scalar() any {
	p.count()
	c := p.next()
	if c == '"' {
		return p.str()
	}
	start := p.at
	for p.at < len(p.text) && isName(p.text[p.at]) {
		p.at++
	}
	word := string(p.text[start:p.at])
	if n, err := strconv.ParseInt(word, 10, 64); err == nil && word[0] != '+' {
		return n
	}
	if isFraction(word) {
		f, _ := strconv.ParseFloat(word, 64) // no use but to be skipped
		return f
	}
	if word == "" {
		p.fail(start, "%q where a value must be", c)
	}
	p.fail(start, "%.40q is no number of 64 bits", word)
	return nil
}

// str reads a string. A backslash stands for the byte behind it.
func (p *parser) str() string {
	start := p.at
	var s []byte
	for p.at++; p.at < len(p.text); p.at++ {
		switch c := p.text[p.at]; c {
		case '"':
			p.at++
			return string(s)
		case 0:
			p.fail(p.at, "a NUL byte")
		case '\\':
			if p.at++; p.at < len(p.text) {
				s = append(s, p.text[p.at])
			}
		default:
			s = append(s, c)
		}
	}
	p.fail(start, "a string without its end")
	return ""
}

func isName(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '.' || c == '+' || c == '-'
}

// isFraction reports whether a word is digits, a point and digits, with an optional minus.
func isFraction(word string) bool {
	digits, points := 0, 0
	for i, c := range word {
		switch {
		case c >= '0' && c <= '9':
			digits++
		case c == '.' && digits > 0:
			points++
		case c == '-' && i == 0:
		default:
			return false
		}
	}
	return points == 1 && word[len(word)-1] != '.'
}

// The getters return an error where a key is there with a value of another kind. ok: it is there.

func (s *section) number(key string) (n int64, ok bool, err error) {
	return get[int64](s, key, "a number")
}

func (s *section) text(key string) (v string, ok bool, err error) {
	return get[string](s, key, "a string")
}

func (s *section) sub(key string) (v *section, ok bool, err error) {
	return get[*section](s, key, "a section")
}

func (s *section) list(key string) (v []any, ok bool, err error) {
	return get[[]any](s, key, "a list")
}

func get[T any](s *section, key, kind string) (v T, ok bool, err error) {
	is, ok := s.values[key]
	if !ok {
		return v, false, nil
	}
	if v, ok = is.(T); !ok {
		return v, false, fmt.Errorf("%s is not %s", key, kind)
	}
	return v, true, nil
}

// words returns a list of strings; none where the key is missing.
func (s *section) words(key string) (words []string, err error) {
	list, _, err := s.list(key)
	for _, v := range list {
		w, is := v.(string)
		if !is {
			return nil, fmt.Errorf("%s holds a value that is not a string", key)
		}
		words = append(words, w)
	}
	return words, err
}

// need is number of a key that must be there and in [low, high].
func (s *section) need(key string, low, high int64) (int64, error) {
	n, ok, err := s.number(key)
	switch {
	case err != nil:
		return 0, err
	case !ok:
		return 0, fmt.Errorf("%s is missing", key)
	case n < low || n > high:
		return 0, fmt.Errorf("%s is %d, must be %d to %d", key, n, low, high)
	}
	return n, nil
}
