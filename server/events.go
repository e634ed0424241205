package server

import (
	"log/slog"
	"strings"

	"github.com/dmsnap/dmsnap/snapshot"
)

// eventText is a line of the log: the text of the event, with its cause where the text does not contain it.
func eventText(e snapshot.Event) string {
	if e.Err != nil && (e.Kind == snapshot.EventInvalid || e.Kind == snapshot.EventFull || e.Kind == snapshot.EventMergeFailed) {
		return strings.TrimSuffix(e.Text, ".") + ". Cause: " + strings.ReplaceAll(e.Err.Error(), "\n", "; ")
	}
	return e.Text
}

// eventLevel is the log level of an event.
func eventLevel(k snapshot.EventKind) slog.Level {
	switch k {
	case snapshot.EventInvalid, snapshot.EventMergeFailed:
		return slog.LevelError
	case snapshot.EventFull, snapshot.EventOverflow:
		return slog.LevelWarn
	}
	return slog.LevelInfo
}
