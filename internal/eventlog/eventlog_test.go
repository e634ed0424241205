package eventlog

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
)

func TestEvent(t *testing.T) {
	var lines, records strings.Builder
	logger := slog.New(slog.NewTextHandler(&records, &slog.HandlerOptions{Level: slog.LevelInfo,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}}))
	both := Log{func(line string) { lines.WriteString(line + "\n") }, logger}
	attrs := make([]slog.Attr, 1, 4) // an error is not appended in the caller's array
	attrs[0] = slog.String("export", "vm1")
	both.Event(slog.LevelWarn, "vm1: flush: no disk", "flush failed", errors.New("no disk"), attrs...)
	both.Event(slog.LevelDebug, "vm1: detail", "detail", nil)
	if attrs[:2][1].Key != "" {
		t.Error("the error is in the caller's attributes")
	}
	if got, want := lines.String(), "vm1: flush: no disk\nvm1: detail\n"; got != want {
		t.Errorf("lines %q, want %q", got, want)
	}
	if got, want := records.String(), "level=WARN msg=\"flush failed\" export=vm1 error=\"no disk\"\n"; got != want {
		t.Errorf("records %q, want %q", got, want)
	}
	Log{}.Event(slog.LevelError, "x", "x", nil) // silent
	Log{Logger: logger}.Event(slog.LevelError, "x", "only a record", nil)
	Log{Line: both.Line}.Event(slog.LevelError, "only a line", "x", nil)
	if !strings.HasSuffix(records.String(), "msg=\"only a record\"\n") || !strings.HasSuffix(lines.String(), "\nonly a line\n") {
		t.Errorf("lines %q, records %q", lines.String(), records.String())
	}
}
