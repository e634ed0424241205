package browser_test

import (
	"context"
	"fmt"
	"net/http"
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
	before := eval[string](p, "document.querySelector('#rows tr:last-child').innerText")
	p.until(fmt.Sprintf("document.querySelector('#rows tr:last-child').innerText !== %q", before))

	// While reports come, find one of them by its name and open it.
	p.do(chromedp.SendKeys("#find", "0777"))
	p.until("[...document.querySelectorAll('#rows tr')].filter(r => !r.hidden).length === 1")
	p.do(chromedp.Click("#rows tr[data-name=node-0777]"))
	p.until("document.getElementById('details-title').innerText.startsWith('node-0777')")
	p.picture("page-thousand")

	// The longest time that the page's own work kept it from answering, over five seconds.
	eval[float64](p, "window.longest = 0, window.last = performance.now(), window.timer = setInterval(() => { const now = performance.now(); window.longest = Math.max(window.longest, now - window.last); window.last = now; }, 10), 0")
	start := reports.Load()
	for reports.Load() < start+5 {
		p.until("true")
	}
	longest := eval[float64](p, "clearInterval(window.timer), window.longest")
	t.Logf("the page was busy for %.0f ms at most", longest)
	if longest > 2000 { // some ten times what it takes when the machine does nothing else
		t.Errorf("the page was busy for %.0f ms", longest)
	}
}
