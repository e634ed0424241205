package browser_test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/chromedp/chromedp"

	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/web"
)

// TestThousandNodes shows 1,000 nodes, all of which change with each report: the page answers keys meanwhile.
func TestThousandNodes(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	const nodes = 1000
	var reports atomic.Uint64
	tree := func() (api.Tree, error) {
		n := reports.Add(1)
		list := []api.Element{{Name: "base", Kind: api.KindDisk, Disk: "base", SizeBytes: 1 << 40}}
		for i := range nodes {
			list = append(list, api.Element{Name: fmt.Sprintf("node-%04d", i), Kind: api.KindNode, Parent: "base", Disk: "base", SizeBytes: 1 << 40,
				Figures: &api.Figures{State: api.StateOK, TotalSectors: 1 << 31, SectorsAllocated: n << 20, Percent: 100 * float64(n) / 2048}})
		}
		return api.Tree{Server: api.ServerOfFleet, Elements: list}, nil
	}
	l, err := server.ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r, err := web.Start(ctx, web.Config{Tree: tree, API: http.NotFoundHandler(), Listener: l})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		stop()
		if err := r.Wait(); err != nil {
			t.Error(err)
		}
	}()
	p := open(t, r.URL)
	p.until("document.querySelectorAll('#rows tr').length === 1001")
	before := eval[string](p, "document.querySelector('#rows tr:last-child').textContent")
	p.until(fmt.Sprintf("document.querySelector('#rows tr:last-child').textContent !== %q", before))

	// Rows that are out of sight are not laid out, but screen readers get them.
	if !slices.ContainsFunc(p.accessible(), func(a accessible) bool { return a.role == "row" && strings.HasPrefix(a.name, "node-0999") }) {
		t.Error("the last row is not in the accessibility tree")
	}

	// While reports come, find one of them by its name and open it.
	p.do(chromedp.SendKeys("#find", "0777"))
	p.until("[...document.querySelectorAll('#rows tr')].filter(r => !r.hidden).length === 1")
	p.do(chromedp.Click("#rows tr[data-name=node-0777]"))
	p.until("document.getElementById('details-title').innerText.startsWith('node-0777')")
	p.picture("page-thousand")

	eval[bool](p, "document.getElementById('find').value = '', document.getElementById('find').dispatchEvent(new Event('input'))")
	p.until("[...document.querySelectorAll('#rows tr')].every(r => !r.hidden)")

	// Tasks of the page that take long, and the times between its frames, over five reports.
	eval[float64](p, `window.tasks = [], window.frames = [],
		window.observer = new PerformanceObserver((list) => window.tasks.push(...list.getEntries().map((e) => e.duration))),
		window.observer.observe({ type: "longtask" }),
		requestAnimationFrame(function frame(now) { window.frames.push(now); requestAnimationFrame(frame); })`)
	start := reports.Load()
	for reports.Load() < start+5 {
		p.until("true")
	}
	longest := eval[float64](p, "Math.max(0, ...window.tasks)")
	t.Logf("%.0f tasks of more than 50 ms, the longest of %.0f ms; of %.0f frames the longest took %.0f ms", eval[float64](p, "window.tasks.length"), longest,
		eval[float64](p, "window.frames.length"), eval[float64](p, "Math.max(...window.frames.slice(1).map((now, i) => now - window.frames[i]))"))
	if longest > 2000 { // some ten times what it takes when the machine does nothing else
		t.Errorf("the page was busy for %.0f ms", longest)
	}
}
