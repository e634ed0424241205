package web

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/internal/testremote"
)

// TestBehindAProxy: a proxy on the same host connects from a loopback address, so that it has to refuse /metrics, as the example in
// docs/operations.md does.
func TestBehindAProxy(t *testing.T) {
	h := httptest.NewServer(testHandler(true))
	t.Cleanup(h.Close)
	target, err := url.Parse(h.URL)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		start   func(t *testing.T) (address string)
		metrics int
	}{
		"a proxy that passes on everything": {func(t *testing.T) string {
			p := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target); r.SetXForwarded() }})
			t.Cleanup(p.Close)
			return p.Listener.Addr().String()
		}, 200},
		"nginx, as documented": {func(t *testing.T) string { return startNginx(t, target.Host) }, 403},
	} {
		t.Run(name, func(t *testing.T) {
			address := c.start(t)
			for _, q := range []struct {
				path, host, auth string
				want             int
			}{
				{"/metrics", "snap.example", "", c.metrics},
				{"/%6detrics", "snap.example", "", c.metrics},
				{"/metrics?x=1", "snap.example", "", c.metrics},
				{"/metrics/", "snap.example", "", 401},
				{"/v1/tree", "snap.example", "", 401},
				{"/v1/tree", "snap.example", "Bearer " + token, 200},
				{"/", "snap.example", "", 401},
				{"/", "other.example", "Bearer " + token, 403},
			} {
				r, err := http.NewRequest("GET", "http://"+address+q.path, nil)
				if err != nil {
					t.Fatal(err)
				}
				r.Header.Set("X-Forwarded-For", "192.0.2.1")
				if r.Host = q.host; q.auth != "" {
					r.Header.Set("Authorization", q.auth)
				}
				answer, err := http.DefaultTransport.RoundTrip(r)
				if err != nil {
					t.Fatal(err)
				}
				io.Copy(io.Discard, answer.Body)
				answer.Body.Close()
				// The first proxy names the server by its address, which is always known.
				if want := q.want; answer.StatusCode != want && !(q.host == "other.example" && c.metrics == 200) {
					t.Errorf("%s of %s, token %v: %d, want %d", q.path, q.host, q.auth != "", answer.StatusCode, want)
				}
			}
			http.DefaultTransport.(*http.Transport).CloseIdleConnections()
		})
	}
}

// startNginx starts nginx with the example in docs/operations.md.
func startNginx(t *testing.T, server string) (address string) {
	t.Helper()
	if _, err := exec.LookPath("nginx"); err != nil {
		t.Skip("SKIPPED: no nginx here (Debian: apt-get install nginx)")
	}
	page, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, example, _ := strings.Cut(string(page), "```nginx\n")
	example, _, found := strings.Cut(example, "```")
	if !found || !strings.Contains(example, "127.0.0.1:8080") {
		t.Fatalf("docs/operations.md has no example: %q", example)
	}
	dir := t.TempDir()
	address = testremote.FreeAddress(t)
	config := filepath.Join(dir, "nginx.conf")
	text := "daemon off; master_process off; pid " + dir + "/pid; error_log stderr;\nevents {}\nhttp { access_log off; client_body_temp_path " + dir + "/b; proxy_temp_path " + dir +
		"/p; fastcgi_temp_path " + dir + "/f; uwsgi_temp_path " + dir + "/u; scgi_temp_path " + dir + "/s;\nserver { listen " + address + ";\n" +
		strings.ReplaceAll(example, "127.0.0.1:8080", server) + "} }\n"
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	testremote.StartProgram(t, address, "nginx", "-c", config, "-p", dir, "-e", "stderr")
	return address
}
