// Package eventlog logs an event as one line of text, as a record with attributes, as both, or not at all.
package eventlog

import (
	"context"
	"log/slog"
	"slices"
)

// A Log is where events go. The zero value is silent.
type Log struct {
	Line   func(line string)
	Logger *slog.Logger
}

// Event logs an event: line has everything, message is without what attrs say. An err that is not nil becomes the
// attribute "error".
func (l Log) Event(level slog.Level, line, message string, err error, attrs ...slog.Attr) {
	if l.Line != nil {
		l.Line(line)
	}
	if l.Logger == nil {
		return
	}
	if err != nil {
		attrs = append(slices.Clip(attrs), slog.Any("error", err))
	}
	l.Logger.LogAttrs(context.Background(), level, message, attrs...)
}
