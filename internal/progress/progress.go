// Package progress draws how far long work is, on a terminal, as a bar of one line. In a pipe or a file it draws nothing:
//
//	bar := progress.New(os.Stderr, "merge")
//	bar.Show(done, total) // as often as it is known
//	bar.End()
package progress

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/dmsnap/dmsnap/internal/bytesize"
)

// A Bar shows how far long work is. Its methods are for one goroutine.
type Bar struct {
	w       io.Writer // nil: quiet
	width   func() int
	now     func() time.Time
	what    string
	began   time.Time
	first   int64 // bytes that were done when it began
	shown   time.Time
	painted bool
}

// New returns a bar that is drawn on w when that is a terminal.
func New(w io.Writer, what string) *Bar {
	p := &Bar{what: what, now: time.Now, width: func() int { return 80 }}
	if f, ok := Terminal(w); ok {
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

// Terminal returns the terminal that w is, if it is one that understands more than plain text.
func Terminal(w io.Writer) (*os.File, bool) {
	f, ok := w.(*os.File)
	return f, ok && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb"
}

// Show draws the bar for so many bytes of a total, at most ten times a second.
func (p *Bar) Show(done, total int64) {
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
func (p *Bar) line(done, total int64, now time.Time) string {
	part := 1.0
	if total > 0 {
		part = float64(done) / float64(total)
	}
	text := fmt.Sprintf(" %5.1f %%  %s of %s", 100*part, bytesize.Text(done), bytesize.Text(total))
	if passed := now.Sub(p.began); passed > 0 && done > p.first {
		rate := float64(done-p.first) / passed.Seconds()
		left := time.Duration(float64(total-done) / rate * float64(time.Second))
		text += fmt.Sprintf("  %s/s  %s left", bytesize.Text(int64(rate)), left.Round(time.Second))
	}
	room := p.width() - len(p.what) - len(text) - 4
	if room < 5 {
		return p.what + text
	}
	room = min(room, 40)
	full := int(part * float64(room))
	return p.what + " [" + strings.Repeat("#", full) + strings.Repeat("-", room-full) + "]" + text
}

// End leaves the last line standing.
func (p *Bar) End() {
	if p.painted {
		p.painted = false
		fmt.Fprintln(p.w)
	}
}
