// Package browser_test clicks through the page of a server in a headless Chromium, against real disks
// (docs/decisions/0014-browser-tests.md). DMSNAP_SCREENSHOTS=DIR keeps pictures of it.
package browser_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/metrics"
	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/web"
)

// A page is a page of a server, shown by a browser.
type page struct {
	t   *testing.T
	ctx context.Context
}

// open opens a URL in a new browser.
func open(t *testing.T, url string) *page {
	t.Helper()
	var program string
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			program = path
			break
		}
	}
	if program == "" {
		t.Skip("SKIPPED: no Chromium (Debian: chromium)")
	}
	ctx, stop := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(stop)
	opts := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(program), chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-background-networking", true), chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-sync", true),
		chromedp.WindowSize(1280, 900), chromedp.UserDataDir(t.TempDir()))
	alloc, stopAlloc := chromedp.NewExecAllocator(ctx, opts...)
	t.Cleanup(stopAlloc)
	tab, stopTab := chromedp.NewContext(alloc)
	if err := chromedp.Do(tab); err != nil { // starts the browser, which would end with a shorter context
		t.Fatal(err)
	}
	messages, done := chromedp.Console(tab), make(chan struct{})
	var bad []string
	go func() {
		defer close(done)
		for m, err := range messages {
			if err != nil {
				return
			}
			// A refused request is written by the browser itself; tests cause some on purpose.
			if (m.Type == "error" || m.IsException()) && !strings.Contains(m.Text, "the server responded with a status of 4") {
				bad = append(bad, m.Text)
			}
		}
	}()
	t.Cleanup(func() {
		stopTab()
		<-done
		for _, text := range bad {
			t.Errorf("console of the page: %s", text)
		}
	})
	p := &page{t: t, ctx: tab}
	p.do(chromedp.Navigate(url))
	return p
}

// do runs steps, and fails the test with a picture of the page when they fail.
func (p *page) do(steps ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	ctx, stop := context.WithTimeout(p.ctx, 60*time.Second)
	defer stop()
	if err := chromedp.Do(ctx, steps...); err != nil {
		p.picture("failed-" + p.t.Name())
		p.t.Fatal(err)
	}
}

// picture keeps a picture of the page, if that was asked for.
func (p *page) picture(name string) {
	p.t.Helper()
	dir := os.Getenv("DMSNAP_SCREENSHOTS")
	if dir == "" {
		return
	}
	png, err := chromedp.Run(p.ctx, chromedp.CaptureScreenshot())
	if err != nil {
		p.t.Error(err)
		return
	}
	if err := os.WriteFile(filepath.Join(dir, strings.ReplaceAll(name, "/", "-")+".png"), png, 0o644); err != nil {
		p.t.Error(err)
	}
}

// dark sets the colours that the user prefers.
func (p *page) dark(dark bool) {
	p.t.Helper()
	value := map[bool]string{false: "light", true: "dark"}[dark]
	p.do(chromedp.Func(func(ctx context.Context, _ *chromedp.Target) error {
		_, err := chromedp.Call(ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: value}}})
		return err
	}))
}

// eval returns the value of an expression.
func eval[T any](p *page, expression string) T {
	p.t.Helper()
	v, err := chromedp.Run(p.ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		p.t.Fatalf("%s: %v", expression, err)
	}
	return v
}

// until waits until an expression is true.
func (p *page) until(expression string) {
	p.t.Helper()
	for end := time.Now().Add(60 * time.Second); !p.holds(expression); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			p.picture("failed-" + p.t.Name())
			p.t.Fatalf("not in time: %s\n%s", expression, eval[string](p, "document.body.innerText"))
		}
	}
}

// holds reports whether an expression is true. On a busy machine the browser may still exchange the page for the one that was navigated to, and
// then cancels the question.
func (p *page) holds(expression string) bool {
	p.t.Helper()
	v, err := chromedp.Run(p.ctx, chromedp.Evaluate[bool](expression))
	if err != nil && !strings.Contains(err.Error(), "Inspected target navigated or closed") {
		p.t.Fatalf("%s: %v", expression, err)
	}
	return err == nil && v
}

// text is what an element shows.
func (p *page) text(id string) string {
	p.t.Helper()
	return eval[string](p, "document.getElementById('"+id+"').innerText")
}

func (p *page) keys(keys string) { p.t.Helper(); p.do(chromedp.KeyEvent(keys)) }

// disk is a server of one origin with a page.
type disk struct {
	*server.Server
	dir, url string
	client   *api.Client // of a fleet
}

// serve serves an origin of 64 MiB with the snapshot vm1.
func serve(t *testing.T) disk {
	t.Helper()
	dir := testhost.ShortDir(t)
	origin := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(origin, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(origin, 64<<20); err != nil {
		t.Fatal(err)
	}
	s, err := server.Open(origin, server.Options{Observe: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.ExportOrigin(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Attach(api.AttachRequest{Name: "vm1", COW: filepath.Join(dir, "vm1.cow"), Create: true}); err != nil {
		t.Fatal(err)
	}
	l, err := server.ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	exports, err := server.ListenUnix(filepath.Join(dir, "nbd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	wait := s.Start(ctx, exports, nil)
	r, err := web.Start(ctx, web.Config{Tree: func() (api.Tree, error) { return s.Tree(), nil }, API: s.Handler(), Listener: l, Metrics: metrics.Handler})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		if err := r.Wait(); err != nil {
			t.Error(err)
		}
		if err := wait(); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		stores, _ := filepath.Glob(filepath.Join(dir, "*.cow"))
		for _, path := range stores {
			checkStore(t, path)
		}
	})
	return disk{Server: s, dir: dir, url: r.URL}
}

// dial connects a client to an export.
func (d disk) dial(t *testing.T, export string) *nbd.Client {
	t.Helper()
	c, err := nbd.Dial(t.Context(), "nbd+unix:///"+export+"?socket="+filepath.Join(d.dir, "nbd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// checkStore checks a store.
func checkStore(t *testing.T, path string) {
	t.Helper()
	cow, err := cowfile.OpenDevice(path, block.Options{ReadOnly: true})
	if err != nil {
		t.Error(err)
		return
	}
	defer cow.Close()
	if r, err := check.Run(context.Background(), cow, check.Options{}); err != nil || r.Worst() >= check.Error {
		t.Errorf("%s: %v, %+v", path, err, r)
	}
}
