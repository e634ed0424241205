package server

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/server/api"
)

// The API's own manners: codes, bounds, strictness.
func TestControlAPI(t *testing.T) {
	p := newPair(t)
	s := p.open(t, Options{})
	socket, control := filepath.Join(p.dir, "nbd.sock"), filepath.Join(p.dir, "control.sock")
	l, err := ListenUnix(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctl, err := ListenUnix(control)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	wait := s.Start(ctx, l, ctl)
	defer func() {
		cancel()
		if err := wait(); err != nil {
			t.Error(err)
		}
	}()
	for _, path := range []string{socket, control} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v, want mode 0600", path, info.Mode(), err)
		}
	}
	var d net.Dialer
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return d.DialContext(ctx, "unix", control)
	}}}
	for _, q := range []struct {
		method, path, body string
		status             int
		code               api.Code
	}{
		{"GET", "/v1/status", "", 200, ""},
		{"GET", "/v1/snapshots/disk", "", 200, ""},
		{"GET", "/v1/snapshots/nobody", "", 404, "no_such_snapshot"},
		{"GET", "/v1/snapshots/a%2Fb", "", 404, "no_such_snapshot"},
		{"GET", "/v2/status", "", 404, "no_such_request"},
		{"PUT", "/v1/status", "", 404, "no_such_request"},
		{"GET", "/v1/merge", "", 404, "no_merge"},
		{"POST", "/v1/merge/pause", "", 404, "no_merge"},
		{"POST", "/v1/merge/resume", "", 404, "no_merge"},
		{"POST", "/v1/merge", `{"name":"nobody"}`, 404, "no_such_snapshot"},
		{"POST", "/v1/merge", `{"name":"disk","now":true}`, 400, "bad_request"},
		{"POST", "/v1/merge", ``, 400, "bad_request"},
		{"POST", "/v1/merge", `{"name":"disk"}{}`, 400, "bad_request"},
		{"POST", "/v1/merge", `[]`, 400, "bad_request"},
		{"POST", "/v1/merge", `{"name":"` + strings.Repeat("x", api.MaxBody) + `"}`, 413, "too_large"},
		{"POST", "/v1/snapshots", `{"name":"disk","cow":"x"}`, 409, "name_taken"},
		{"POST", "/v1/snapshots", `{"name":"","cow":"x"}`, 400, "bad_name"},
		{"POST", "/v1/snapshots", `{"name":"..","cow":"x"}`, 400, "bad_name"},
		{"POST", "/v1/snapshots", `{"name":"/","cow":"x"}`, 400, "bad_name"},
		{"POST", "/v1/snapshots", `{"name":"new"}`, 400, "bad_request"},
		{"POST", "/v1/snapshots", "{\"name\":\"new\",\"cow\":\"\xff\",\"create\":true}", 400, "bad_request"},
		{"POST", "/v1/snapshots", `{"name":"new","cow":"x","cow_base64":"/w=="}`, 400, "bad_request"},
		{"POST", "/v1/snapshots", `{"name":"new","cow":"x","chunk_size":7}`, 400, "bad_request"},
		{"POST", "/v1/snapshots", `{"name":"new","cow":"x","store":"Q"}`, 400, "bad_request"},
		{"POST", "/v1/snapshots", `{"name":"new","cow":"/nowhere/x","create":true}`, 422, "failed"},
		{"DELETE", "/v1/snapshots/nobody", "", 404, "no_such_snapshot"},
		{"POST", "/v1/merge?wait=x", `{"name":"disk"}`, 400, "bad_request"},
		{"GET", "/v1/merge?wait=61", "", 400, "bad_request"},
		{"GET", "/v1/merge?wait=60", "", 200, ""},
	} {
		req, err := http.NewRequest(q.method, "http://dmsnap"+q.path, strings.NewReader(q.body))
		if err != nil {
			t.Fatal(err)
		}
		got, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(got.Body)
		got.Body.Close()
		var e api.ErrorReply
		if err := json.Unmarshal(body, &e); err != nil || got.StatusCode != q.status || e.Error.Code != q.code || (q.code == "") != (e.Error.Message == "") {
			t.Errorf("%s %s %.60s: %d %s, want %d %q", q.method, q.path, q.body, got.StatusCode, body, q.status, q.code)
		}
		if strings.Contains(string(body), "--") {
			t.Errorf("%s %s: %s names a flag of the command line", q.method, q.path, body)
		}
	}
}

// FuzzControl has a client of the control API say anything. The server is read-only, so that nothing it asks
// for reaches a file.
func FuzzControl(f *testing.F) {
	s := newPair(f).open(f, Options{ReadOnly: true})
	routes := s.Handler()
	f.Add("GET", "/v1/status", "")
	f.Add("GET", "/v1/snapshots/disk", "")
	f.Add("POST", "/v1/snapshots", `{"name":"x","cow":"/nowhere","create":true,"chunk_size":65536,"store":"P"}`)
	f.Add("POST", "/v1/snapshots/disk/grow", `{"size":-1}`)
	f.Add("DELETE", "/v1/snapshots/x", "")
	f.Add("POST", "/v1/merge", `{"name":"disk"}`)
	f.Add("GET", "/v1/merge?wait=60", "")
	f.Fuzz(func(t *testing.T, method, target, body string) {
		u, err := url.ParseRequestURI(target)
		if err != nil || u.Host != "" || method == "" || method == "CONNECT" || method == "DELETE" && u.Path == "/v1/snapshots/disk" {
			return
		}
		for _, c := range method {
			if c < 'A' || c > 'Z' {
				return // no request that Go's server would hand on
			}
		}
		r := httptest.NewRequest("GET", "/", bytes.NewReader([]byte(body)))
		r.Method, r.URL, r.RequestURI = method, u, target
		w := httptest.NewRecorder()
		routes.ServeHTTP(w, r)
		if w.Code >= 500 {
			t.Errorf("%s %s: status %d, %s", method, target, w.Code, w.Body)
		}
		var answer map[string]any
		if w.Code == 200 && json.Unmarshal(w.Body.Bytes(), &answer) != nil {
			t.Errorf("%s %s: status 200 with %q", method, target, w.Body)
		}
		if len(s.Status().Snapshots) != 1 {
			t.Error("the server's snapshots changed")
		}
	})
}
