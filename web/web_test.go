package web

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/notify"
	"github.com/dmsnap/dmsnap/server/api"
)

func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }

const token = "correct-token"

func testHandler(metrics bool) http.Handler {
	o := Options{Token: token, Hosts: []string{"snap.example"}, API: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "api") }),
		Watcher: monitor.NewWatcher(func() (api.Tree, error) { return api.Tree{}, nil }, monitor.WatchOptions{})}
	if metrics {
		o.Metrics = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "metrics") })
	}
	return Handler(o)
}

// TestWhoIsLetIn has a row for each way in, and for each attempt of a foreign page.
func TestWhoIsLetIn(t *testing.T) {
	h := testHandler(true)
	good := http.Header{"Authorization": {"Bearer " + token}}
	with := func(base http.Header, pairs ...string) http.Header {
		c := base.Clone()
		if c == nil {
			c = http.Header{}
		}
		for i := 0; i < len(pairs); i += 2 {
			c.Set(pairs[i], pairs[i+1])
		}
		return c
	}
	cookie := "dmsnap-8080=" + (&handler{Options: Options{Token: token}}).cookie()
	for name, q := range map[string]struct {
		method, url, from string
		header            http.Header
		want              int
	}{
		"page without token":                 {"GET", "http://127.0.0.1:8080/", "", nil, 401},
		"script without token":               {"GET", "http://127.0.0.1:8080/static/page.js", "", nil, 401},
		"API without token":                  {"GET", "http://127.0.0.1:8080/v1/tree", "", nil, 401},
		"stream without token":               {"GET", "http://127.0.0.1:8080/live", "", nil, 401},
		"wrong token":                        {"GET", "http://127.0.0.1:8080/?token=other", "", nil, 401},
		"wrong bearer":                       {"GET", "http://127.0.0.1:8080/v1/tree", "", http.Header{"Authorization": {"Bearer x"}}, 401},
		"right cookie and wrong bearer":      {"GET", "http://127.0.0.1:8080/v1/tree", "", http.Header{"Authorization": {"Bearer x"}, "Cookie": {cookie}}, 401},
		"the token as a cookie":              {"GET", "http://127.0.0.1:8080/v1/tree", "", http.Header{"Cookie": {"dmsnap-8080=" + token}}, 401},
		"token in the URL of the API":        {"GET", "http://127.0.0.1:8080/v1/tree?token=" + token, "", nil, 401},
		"right token":                        {"GET", "http://127.0.0.1:8080/?token=" + token, "", nil, 200},
		"bearer":                             {"GET", "http://127.0.0.1:8080/v1/tree", "", good, 200},
		"cookie":                             {"GET", "http://127.0.0.1:8080/", "", http.Header{"Cookie": {cookie}}, 200},
		"cookie of another port":             {"GET", "http://127.0.0.1:8081/", "", http.Header{"Cookie": {cookie}}, 401},
		"script":                             {"GET", "http://127.0.0.1:8080/static/page.js", "", good, 200},
		"style":                              {"GET", "http://127.0.0.1:8080/static/style.css", "", good, 200},
		"no such file":                       {"GET", "http://127.0.0.1:8080/static/none", "", good, 404},
		"no such page":                       {"GET", "http://127.0.0.1:8080/none", "", good, 404},
		"localhost":                          {"GET", "http://localhost:8080/", "", good, 200},
		"IPv6":                               {"GET", "http://[::1]:8080/", "", good, 200},
		"without a port":                     {"GET", "http://127.0.0.1/", "", good, 200},
		"a name that is allowed":             {"GET", "http://snap.example:8080/", "", good, 200},
		"foreign host":                       {"GET", "http://evil.example:8080/", "", good, 403},
		"foreign host, metrics":              {"GET", "http://evil.example:8080/metrics", "", nil, 403},
		"a host that begins like an address": {"GET", "http://127.0.0.1.evil.example:8080/", "", good, 403},
		"foreign origin":                     {"POST", "http://127.0.0.1:8080/v1/fork", "", with(good, "Origin", "http://evil.example"), 403},
		"origin of another port":             {"POST", "http://127.0.0.1:8080/v1/fork", "", with(good, "Origin", "http://127.0.0.1:9"), 403},
		"origin null":                        {"POST", "http://127.0.0.1:8080/v1/fork", "", with(good, "Origin", "null"), 403},
		"own origin":                         {"POST", "http://127.0.0.1:8080/v1/fork", "", with(good, "Origin", "http://127.0.0.1:8080"), 200},
		"cross-site by fetch metadata":       {"GET", "http://127.0.0.1:8080/v1/tree", "", with(good, "Sec-Fetch-Site", "cross-site"), 403},
		"same-site is not same-origin":       {"POST", "http://127.0.0.1:8080/v1/fork", "", with(good, "Sec-Fetch-Site", "same-site"), 403},
		"a link to the page":                 {"GET", "http://127.0.0.1:8080/?token=" + token, "", with(nil, "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate"), 200},
		"a link to the API":                  {"GET", "http://127.0.0.1:8080/v1/tree", "", with(good, "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate"), 403},
		"metrics on loopback":                {"GET", "http://127.0.0.1:8080/metrics", "127.0.0.1:5", nil, 200},
		"metrics on loopback, IPv6":          {"GET", "http://[::1]:8080/metrics", "[::1]:5", nil, 200},
		"metrics from elsewhere":             {"GET", "http://10.0.0.1:8080/metrics", "10.0.0.9:5", nil, 401},
		"metrics from elsewhere with token":  {"GET", "http://10.0.0.1:8080/metrics", "10.0.0.9:5", good, 200},
		"posting metrics":                    {"POST", "http://127.0.0.1:8080/metrics", "127.0.0.1:5", nil, 401},
	} {
		r := httptest.NewRequest(q.method, q.url, nil)
		if q.header != nil {
			r.Header = q.header
		}
		if q.from != "" {
			r.RemoteAddr = q.from
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != q.want {
			t.Errorf("%s: %d, want %d: %s", name, w.Code, q.want, w.Body)
		}
		if got := w.Header(); got.Get("Content-Security-Policy") != policy || got.Get("X-Content-Type-Options") != "nosniff" || w.Code != 404 && got.Get("Cache-Control") != "no-store" || got.Get("Referrer-Policy") != "no-referrer" {
			t.Errorf("%s: headers %v", name, got)
		}
		if strings.Contains(w.Body.String(), token) || w.Code >= 400 && strings.Contains(w.Body.String(), "api") {
			t.Errorf("%s: body %s", name, w.Body)
		}
	}
	w := httptest.NewRecorder()
	testHandler(false).ServeHTTP(w, httptest.NewRequest("GET", "http://127.0.0.1/metrics", nil))
	if w.Code != 401 {
		t.Errorf("metrics of a server without them: %d", w.Code)
	}
}

// The cookie is the one that is accepted, and can't be read or sent by other pages.
func TestCookie(t *testing.T) {
	h := testHandler(false)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "http://127.0.0.1:8080/?token="+token, nil))
	list := w.Result().Cookies()
	if len(list) != 1 || !list[0].HttpOnly || list[0].SameSite != http.SameSiteStrictMode || list[0].Value == token {
		t.Fatalf("cookies %v", list)
	}
	r := httptest.NewRequest("GET", "http://127.0.0.1:8080/", nil)
	r.AddCookie(list[0])
	w = httptest.NewRecorder()
	if h.ServeHTTP(w, r); w.Code != 200 || !strings.Contains(w.Body.String(), "<title>dmsnap</title>") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// The page has no script or style of its own, no handler in an attribute, and names nothing elsewhere: the policy would
// stop it.
func TestPageKeepsThePolicy(t *testing.T) {
	for _, name := range []string{"index.html", "page.js", "actions.js", "format.js", "style.css"} {
		b, err := static.ReadFile("static/" + name)
		if err != nil {
			t.Fatal(err)
		}
		for _, bad := range []string{"http:", "https:", "//cdn", " onclick=\"", " style=\"", "<script>", "<style", "innerHTML", "eval(", "javascript:", "@import"} {
			if strings.Contains(string(b), bad) {
				t.Errorf("%s has %s", name, bad)
			}
		}
	}
}

func TestChanges(t *testing.T) {
	var c changes
	element := func(name string, percent float64) monitor.Element {
		return monitor.Element{Element: api.Element{Name: name, Kind: api.KindNode, Figures: &api.Figures{Percent: percent, SectorsAllocated: 8}}}
	}
	names := func(u update) (list []string) {
		for _, e := range u.Elements {
			list = append(list, e.Name)
		}
		return list
	}
	u := c.next(monitor.Report{Elements: []monitor.Element{element("a", 1), element("b", 2)}, FileSystems: []monitor.FileSystem{{Path: "/"}}}, nil)
	if fmt.Sprint(names(u), u.Order) != "[a b] [a b]" || u.Elements[0].Allocated != 4096 || len(u.FileSystems) != 1 {
		t.Errorf("first %+v", u)
	}
	u = c.next(monitor.Report{Elements: []monitor.Element{element("a", 1), element("b", 3)}, FileSystems: []monitor.FileSystem{{Path: "/"}}}, nil)
	if fmt.Sprint(names(u), u.Order) != "[b] []" || u.Order != nil || u.FileSystems != nil {
		t.Errorf("a change %+v", u)
	}
	u = c.next(monitor.Report{Elements: []monitor.Element{element("b", 3)}, Error: "full"}, nil)
	if fmt.Sprint(names(u), u.Order) != "[] [b]" || u.Error != "full" {
		t.Errorf("one less %+v", u)
	}
	u = c.next(monitor.Report{}, errors.New("away"))
	if text, err := json.Marshal(u); err != nil || !strings.Contains(string(text), `"order":[]`) || u.Error != "away" {
		t.Errorf("none %s, %v", text, err)
	}
}

// TestStart runs a page over a listener: the stream brings reports and ends with the context; an alert is delivered.
func TestStart(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var full atomic.Bool
	tree := func() (api.Tree, error) {
		return api.Tree{Server: api.ServerOfOne, Elements: []api.Element{{Name: "vm1", Kind: api.KindNode, Figures: &api.Figures{State: api.StateOK, Full: full.Load()}}}}, nil
	}
	var mu sync.Mutex
	var delivered []string
	hook := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		delivered = append(delivered, string(b))
	}))
	defer hook.Close()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	r, err := Start(ctx, Config{Tree: tree, API: http.NotFoundHandler(), Listener: l, Notify: notify.Options{URL: hook.URL}})
	if err != nil {
		t.Fatal(err)
	}
	base, tok, _ := strings.Cut(r.URL, "?token=")
	q, _ := http.NewRequestWithContext(t.Context(), "GET", base+"live", nil)
	q.Header.Set("Authorization", "Bearer "+tok)
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	answer, err := client.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	lines := bufio.NewScanner(answer.Body)
	if !lines.Scan() || !strings.Contains(lines.Text(), `"name":"vm1"`) || !strings.HasPrefix(lines.Text(), "data: {") {
		t.Fatalf("%s, %v", lines.Text(), lines.Err())
	}
	full.Store(true)
	for lines.Scan() && !strings.Contains(lines.Text(), `"full":true`) {
	}
	stop()
	for lines.Scan() {
	}
	if err := r.Wait(); err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(delivered) != 1 || !strings.Contains(delivered[0], `"kind":"full"`) || !strings.Contains(delivered[0], `"name":"vm1"`) {
		t.Errorf("delivered %q", delivered)
	}
}

func TestURL(t *testing.T) {
	for addr, want := range map[string]string{"127.0.0.1:80": "http://127.0.0.1:80/?token=x", "0.0.0.0:80": "http://127.0.0.1:80/?token=x",
		"[::]:80": "http://127.0.0.1:80/?token=x", "192.0.2.1:80": "http://192.0.2.1:80/?token=x"} {
		a, err := net.ResolveTCPAddr("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if got := urlOf(a, "x"); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
}

func Example() {
	w := monitor.NewWatcher(func() (api.Tree, error) { return api.Tree{}, nil }, monitor.WatchOptions{})
	h := Handler(Options{Token: "t", API: http.NotFoundHandler(), Watcher: w})
	for _, url := range []string{"http://127.0.0.1/", "http://127.0.0.1/?token=t", "http://elsewhere.example/?token=t"} {
		a := httptest.NewRecorder()
		h.ServeHTTP(a, httptest.NewRequest("GET", url, nil))
		fmt.Println(a.Code)
	}
	// Output:
	// 401
	// 200
	// 403
}

// TestEveryRouteAsksForTheToken asks for each path of the page and of the API of a daemon and of a server without the token, from a foreign
// host, and from a page of another origin: the API is never reached.
func TestEveryRouteAsksForTheToken(t *testing.T) {
	var d struct {
		Paths map[string]map[string]json.RawMessage
	}
	b, err := os.ReadFile("../fleet/daemon/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &d); err != nil || len(d.Paths) < 20 {
		t.Fatalf("%d paths, %v", len(d.Paths), err)
	}
	var reached atomic.Int64
	h := Handler(Options{Token: token, API: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Add(1) }),
		Metrics: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}),
		Watcher: monitor.NewWatcher(func() (api.Tree, error) { return api.Tree{}, nil }, monitor.WatchOptions{})})
	ask := func(method, path, host, from string, header http.Header) int {
		q := httptest.NewRequest(strings.ToUpper(method), "http://"+host+path, nil)
		q.RemoteAddr = from
		q.Header = header
		w := httptest.NewRecorder()
		h.ServeHTTP(w, q)
		return w.Code
	}
	check := func(method, path string) {
		path = strings.NewReplacer("{", "", "}", "").Replace(path)
		bearer := http.Header{"Authorization": {"Bearer " + token}}
		foreign := http.Header{"Authorization": {"Bearer " + token}, "Origin": {"http://evil.example"}}
		for name, got := range map[string]int{
			"without the token":    ask(method, path, "127.0.0.1:8080", "127.0.0.1:5", http.Header{}),
			"of a foreign host":    ask(method, path, "evil.example", "127.0.0.1:5", bearer),
			"from a foreign page":  ask(method, path, "127.0.0.1:8080", "127.0.0.1:5", foreign),
			"from elsewhere":       ask(method, path, "10.0.0.1:8080", "10.0.0.9:5", http.Header{}),
			"with an empty bearer": ask(method, path, "127.0.0.1:8080", "127.0.0.1:5", http.Header{"Authorization": {"Bearer "}}),
		} {
			loopbackMetrics := path == "/metrics" && method == "get" && (name == "without the token" || name == "with an empty bearer")
			if refused := got == http.StatusUnauthorized || got == http.StatusForbidden; refused == loopbackMetrics {
				t.Errorf("%s %s %s: %d", method, path, name, got)
			}
		}
	}
	for path, methods := range d.Paths {
		for method := range methods {
			check(method, path)
		}
	}
	for _, path := range []string{"/", "/live", "/static/page.js", "/static/none", "/none", "/v1", "/v1/", "/v1/snapshots", "/v1/merge", "/metrics", "/metrics/", "//v1/tree", "/static/../v1/tree", "/debug/pprof/"} {
		for _, method := range []string{"get", "head", "post", "put", "delete", "options"} {
			if path == "/metrics" && method == "head" {
				continue
			}
			check(method, path)
		}
	}
	if n := reached.Load(); n > 0 {
		t.Errorf("the API was reached %d times", n)
	}
}
