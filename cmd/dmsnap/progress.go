package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// progressBar shows how far long work is, on a terminal; in a pipe or a file it shows nothing.
type progressBar struct {
	w       io.Writer // nil: quiet
	width   func() int
	now     func() time.Time
	what    string
	began   time.Time
	first   int64 // bytes that were done when it began
	shown   time.Time
	painted bool
}

// newProgress returns a bar that is drawn on w when that is a terminal.
func newProgress(w io.Writer, what string) *progressBar {
	p := &progressBar{what: what, now: time.Now, width: func() int { return 80 }}
	if f, ok := terminalOf(w); ok {
		p.w = w
		p.width = func() int {
			n, _, err := term.GetSize(int(f.Fd()))
			if err != nil {
				return 80
			}
			return n
		}
	}
	return p
}

// terminalOf returns the terminal that w is, if it is one that understands more than plain text.
func terminalOf(w io.Writer) (*os.File, bool) {
	f, ok := w.(*os.File)
	return f, ok && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb"
}

// show draws the bar for so many bytes of a total, at most ten times a second.
func (p *progressBar) show(done, total int64) {
	if p.w == nil {
		return
	}
	now := p.now()
	if p.began.IsZero() {
		p.began, p.first = now, done
	}
	if p.painted && now.Sub(p.shown) < 100*time.Millisecond && done < total {
		return
	}
	p.shown, p.painted = now, true
	fmt.Fprintf(p.w, "\r\x1b[K%s", p.line(done, total, now))
}

// line is the text of the bar: "merge [#####-----] 50.0 %  64 MiB of 128 MiB  32 MiB/s  2s left".
func (p *progressBar) line(done, total int64, now time.Time) string {
	part := 1.0
	if total > 0 {
		part = float64(done) / float64(total)
	}
	text := fmt.Sprintf(" %5.1f %%  %s of %s", 100*part, bytesText(done), bytesText(total))
	if passed := now.Sub(p.began); passed > 0 && done > p.first {
		rate := float64(done-p.first) / passed.Seconds()
		left := time.Duration(float64(total-done) / rate * float64(time.Second))
		text += fmt.Sprintf("  %s/s  %s left", bytesText(int64(rate)), left.Round(time.Second))
	}
	room := p.width() - len(p.what) - len(text) - 4
	if room < 5 {
		return p.what + text
	}
	room = min(room, 40)
	full := int(part * float64(room))
	return p.what + " [" + strings.Repeat("#", full) + strings.Repeat("-", room-full) + "]" + text
}

// end leaves the last line standing.
func (p *progressBar) end() {
	if p.painted {
		p.painted = false
		fmt.Fprintln(p.w)
	}
}
