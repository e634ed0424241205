package browser_test

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"

	"github.com/dmsnap/dmsnap/fleet"
	"github.com/dmsnap/dmsnap/fleet/daemon"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/metrics"
	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/web"
)

// serveFleet serves a fleet with the disk golden, of size bytes, with a page.
func serveFleet(t *testing.T, size int64) disk {
	t.Helper()
	dir := testhost.ShortDir(t)
	d := disk{dir: dir}
	golden := filepath.Join(dir, "golden.img")
	if err := os.WriteFile(golden, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(golden, size); err != nil {
		t.Fatal(err)
	}
	l, err := server.ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ready := make(chan string, 1)
	config := daemon.Config{Dir: filepath.Join(dir, "fleet"), Socket: filepath.Join(dir, "nbd.sock"), Control: filepath.Join(dir, "control.sock"), AllowPaths: []string{dir}, Group: -1}
	config.Beside = func(ctx context.Context, d *daemon.Daemon, control http.Handler) (func() error, error) {
		events := monitor.NewEvents() // as when a daemon logs what it did
		requests := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			control.ServeHTTP(w, r)
			if r.Method != http.MethodGet {
				events.Happened()
			}
		})
		r, err := web.Start(ctx, web.Config{Tree: func() (api.Tree, error) { return d.Tree(), nil }, API: requests, Listener: l, Metrics: metrics.Handler, Events: events})
		if err != nil {
			return nil, err
		}
		ready <- r.URL
		return r.Wait, nil
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- config.Serve(ctx, nil, fleet.Options{Observe: true}, nil) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
		stores, _ := filepath.Glob(filepath.Join(dir, "fleet", "layers", "*.cow"))
		for _, path := range stores {
			checkStore(t, path)
		}
	})
	select {
	case d.url = <-ready:
	case err := <-served:
		served <- nil
		t.Fatal(err)
	}
	d.client = api.NewClient(config.Control)
	if _, err := d.client.AddDisk(t.Context(), api.AddDiskRequest{Name: "golden", Source: golden, Raw: true}); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestFleet forks, checkpoints, rolls back, squashes and drops by the page.
func TestFleet(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	d := serveFleet(t, 16<<20)
	p := open(t, d.url)
	act := func(name, action string, fields ...string) {
		t.Helper()
		p.until("!document.getElementById('dialog').open")
		p.do(chromedp.Click("#rows tr[data-name='"+name+"']"), chromedp.Click("#action-"+action), chromedp.WaitVisible("#dialog"))
		for i := 0; i < len(fields); i += 2 {
			p.do(chromedp.SendKeys("#dialog [name="+fields[i]+"]", fields[i+1]))
		}
	}
	confirm := func() { p.do(chromedp.Click("#dialog-ok")) }
	row := func(name string) string { return "document.querySelector(\"#rows tr[data-name='" + name + "']\")" }

	p.until(row("golden") + " !== null")
	act("golden", "fork", "name", "vm1")
	confirm()
	p.until(row("vm1") + " !== null")

	// A name that can't be is refused by the page, one that is taken by the server.
	act("golden", "fork", "name", "vm1")
	confirm()
	p.until("document.getElementById('dialog-error').innerText.includes('vm1')")
	p.do(chromedp.Click("#dialog-cancel"))

	c := d.dial(t, "vm1")
	write(t, c, 0, 4096)
	act("vm1", "checkpoint", "name", "clean")
	confirm()
	p.until(row("vm1@clean") + " !== null")
	write(t, c, 0, 1<<20)
	write(t, c, 8<<20, 2<<20)
	act("vm1@clean", "fork", "name", "vm2")
	confirm()
	p.until(row("vm2") + "?.getAttribute('aria-level') === '3'")
	p.do(chromedp.Click("#rows tr[data-name=vm1]"))
	p.until("document.getElementById('map-text').innerText.startsWith('18.8 %')")
	p.until("document.getElementById('figures').innerText.includes('768 exceptions')")
	p.picture("page-fleet")

	// A rollback says what is lost, and that clients are disconnected.
	act("vm1", "rollback")
	if text := p.text("dialog-text"); !strings.Contains(text, "lost") || !strings.Contains(text, "in 768 chunks") || !strings.Contains(text, "1 client will be disconnected") {
		t.Errorf("a rollback says %q", text)
	}
	confirm()
	p.until("!document.getElementById('dialog').open")
	p.until("document.getElementById('figures').innerText.includes(' 0 exceptions')")
	c = d.dial(t, "vm1")
	got := make([]byte, 8)
	if _, err := c.ReadAt(got, 8<<20); err != nil || got[0] != 0 {
		t.Errorf("after the rollback the node shows %v, %v", got, err)
	}
	if _, err := c.ReadAt(got, 0); err != nil || got[0] != 7 {
		t.Errorf("after the rollback the checkpoint's byte is %v, %v", got[0], err)
	}

	act("vm1", "squash")
	confirm()
	p.until("!document.getElementById('dialog').open")

	// A checkpoint with a child is not dropped.
	act("vm1@clean", "drop")
	confirm()
	p.until("document.getElementById('dialog-error').innerText !== ''")
	p.do(chromedp.Click("#dialog-cancel"))
	// A merge: the disk shows what the node does, and the other node what it did.
	vm2 := d.dial(t, "vm2")
	write(t, c, 12<<20, 64<<10)
	act("vm1", "merge")
	if text := p.text("dialog-text"); !strings.Contains(text, "golden is overwritten") || !strings.Contains(text, "preserved first") {
		t.Errorf("a merge says %q", text)
	}
	confirm()
	p.until("document.getElementById('merge-text').innerText.includes('golden: done')")
	image, err := os.ReadFile(filepath.Join(d.dir, "golden.img"))
	if err != nil || image[12<<20] != 7 || image[0] != 7 {
		t.Errorf("the disk has %d and %d, %v", image[12<<20], image[0], err)
	}
	if _, err := vm2.ReadAt(got, 12<<20); err != nil || got[0] != 0 {
		t.Errorf("the other node shows %v, %v", got[0], err)
	}
	vm2.Close()

	act("vm2", "drop")
	if text := p.text("dialog-text"); !strings.Contains(text, "deleted") {
		t.Errorf("a drop says %q", text)
	}
	confirm()
	p.until(row("vm2") + " === null")
}
