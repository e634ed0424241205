// Package jsonlist writes a JSON list as its elements come, one to a line: lists of exceptions are too long to hold.
package jsonlist

import (
	"encoding/json"
	"io"
)

// A Writer writes a list.
type Writer struct {
	w     io.Writer
	begun bool
	line  []byte
}

// New returns a writer of a list to w.
func New(w io.Writer) *Writer { return &Writer{w: w} }

// Add writes one element.
func (l *Writer) Add(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	l.line = append(append(l.line[:0], l.separator()...), b...)
	_, err = l.w.Write(l.line)
	return err
}

func (l *Writer) separator() string {
	if l.begun {
		return ",\n"
	}
	l.begun = true
	return "[\n"
}

// End completes the list; one without elements is empty.
func (l *Writer) End() error {
	text := "\n]\n"
	if !l.begun {
		text = "[]\n"
	}
	_, err := io.WriteString(l.w, text)
	return err
}
