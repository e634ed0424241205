package browser_test

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/dmsnap/dmsnap/block"
)

func write(t *testing.T, dev block.Device, off int64, n int) {
	t.Helper()
	if _, err := dev.WriteAt(bytes.Repeat([]byte{7}, n), off); err != nil {
		t.Fatal(err)
	}
}

// TestOrigin looks at a server of one origin and uses each action, by keyboard and by mouse.
func TestOrigin(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	d := serve(t)
	p := open(t, d.url)
	p.until("document.querySelectorAll('#rows tr').length === 2")
	if url := eval[string](p, "location.href"); strings.Contains(url, "token") {
		t.Errorf("the token stays in the URL: %s", url)
	}
	vm1 := d.dial(t, "vm1")
	write(t, vm1, 32<<20, 8<<20)

	// By keyboard: the second row, its details.
	p.do(chromedp.Focus("#rows tr"))
	p.keys(kb.ArrowDown)
	p.keys("\r")
	p.until("document.getElementById('details-title').innerText.startsWith('vm1')")
	p.until("document.getElementById('figures').innerText.includes('2048 exceptions')")
	p.until("document.getElementById('map-text').innerText.startsWith('12.5 %')")
	if got := p.text("actions"); !strings.Contains(got, "Merge") || !strings.Contains(got, "Drop") {
		t.Errorf("actions %q", got)
	}
	write(t, vm1, 33<<20, 4096)
	p.until("document.getElementById('map-text').innerText.includes('written in the last second')")
	p.picture("page-origin")

	// A dialog that is cancelled changes nothing, and the focus is where it was.
	p.do(chromedp.Click("#action-drop"), chromedp.WaitVisible("#dialog"))
	if got := p.text("dialog-text"); !strings.Contains(got, "Its file") || !strings.Contains(got, "loses the snapshot") {
		t.Errorf("a drop says %q", got)
	}
	p.picture("page-drop")
	p.keys(kb.Escape)
	p.until("!document.getElementById('dialog').open")
	if len(d.Status().Snapshots) != 1 {
		t.Fatal("a cancelled drop dropped")
	}

	// A snapshot, by the disk's action; a path that can't be is refused with the server's words.
	p.do(chromedp.Click("#rows tr:first-child"))
	p.do(chromedp.Click("#action-snapshot"), chromedp.WaitVisible("#dialog"))
	p.do(chromedp.SendKeys("#dialog input[name=name]", "before"), chromedp.SendKeys("#dialog input[name=cow]", filepath.Join(d.dir, "no", "before.cow")))
	p.keys("\r")
	p.until("document.getElementById('dialog-error').innerText.includes('no such file')")
	p.do(chromedp.SetValue("#dialog input[name=cow]", filepath.Join(d.dir, "before.cow")), chromedp.Click("#dialog-ok"))
	p.until("document.querySelectorAll('#rows tr').length === 3")
	write(t, d.dial(t, "origin"), 0, 1<<20)

	// A merge: it says what is lost, runs, and the other snapshot keeps the past.
	p.do(chromedp.Click("#rows tr[data-name=vm1]"), chromedp.Click("#action-merge"), chromedp.WaitVisible("#dialog"))
	if got := p.text("dialog-text"); !strings.Contains(got, "is lost") || !strings.Contains(got, "8.0 MiB in 2048 chunks") && !strings.Contains(got, "MiB in 2048 chunks") {
		t.Errorf("a merge says %q", got)
	}
	p.do(chromedp.Click("#dialog-ok"))
	p.until("document.getElementById('merge-text').innerText.includes('done')")
	p.picture("page-merged")
	got := make([]byte, 16)
	if _, err := d.Origin().ReadAt(got, 32<<20); err != nil || got[0] != 7 {
		t.Errorf("after the merge the origin has %v, %v", got, err)
	}
	before, err := d.Device("before")
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 32 << 20} {
		if _, err := before.ReadAt(got, off); err != nil || got[0] != 0 {
			t.Errorf("the other snapshot shows %v at byte %d, %v", got[0], off, err)
		}
	}

	// A drop.
	p.do(chromedp.Click("#rows tr[data-name=before]"), chromedp.Click("#action-drop"), chromedp.WaitVisible("#dialog"), chromedp.Click("#dialog-ok"))
	p.until("document.querySelectorAll('#rows tr').length === 2")
	if len(d.Status().Snapshots) != 1 {
		t.Error("it is served still")
	}

	// Dark, and narrow: nothing is wider than the window.
	p.dark(true)
	p.picture("page-dark")
	p.do(chromedp.EmulateViewport(360, 740))
	p.until("document.documentElement.scrollWidth <= 360")
	p.picture("page-narrow")
}
