package main

import (
	"bytes"
	"encoding/json"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/dmsnap/dmsnap/nbd"
	"github.com/dmsnap/dmsnap/snapshot"
)

// FuzzControl has a client of the control API say anything. The server is read-only, so that nothing it asks
// for reaches a file.
func FuzzControl(f *testing.F) {
	dir := f.TempDir()
	origin, cow := filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk.cow")
	if err := os.WriteFile(origin, make([]byte, 64<<10), 0o600); err != nil {
		f.Fatal(err)
	}
	var c creation
	if _, err := c.create(origin, cow); err != nil {
		f.Fatal(err)
	}
	s, err := newServer(origin, true, true, snapshot.Options{}, nbd.Options{Log: func(string) {}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.close() })
	s.uri = func(name string) string { return "nbd:///" + name }
	if err := s.attach(attachment{name: "disk", cow: cow}); err != nil {
		f.Fatal(err)
	}
	routes := s.routes()
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
		if len(s.status().Snapshots) != 1 {
			t.Error("the server's snapshots changed")
		}
	})
}

// FuzzSize: what parseSize takes is never negative, and says the same when it is printed in bytes.
func FuzzSize(f *testing.F) {
	for _, s := range []string{"4KiB", "64M", "16s", "1e3", "-1", "9223372036854775807", "8388608T"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseSize(s)
		if err != nil {
			return
		}
		flag := sizeFlag{n, true}
		if again, err := parseSize(flag.String()); n < 0 || err != nil || again != n {
			t.Errorf("%q is %d bytes, and %q is %d, %v", s, n, flag.String(), again, err)
		}
	})
}
