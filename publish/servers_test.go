package publish_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
	"github.com/dmsnap/dmsnap/internal/testremote"
	"github.com/dmsnap/dmsnap/publish"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source/cache"
	"github.com/dmsnap/dmsnap/source/ondemand"
	"github.com/dmsnap/dmsnap/source/remote"
	"github.com/dmsnap/dmsnap/store"
)

// made is a disk with a store over it, and what is seen.
func made(t *testing.T) (base *block.Memory, st *store.Store, shown []byte) {
	t.Helper()
	shown = append(blocktest.Pattern(1<<20, 1), make([]byte, 2<<20)...)
	shown = append(shown, bytes.Repeat([]byte("golden image "), 100_000)...)
	shown = shown[:len(shown)/512*512]
	base = block.NewMemory(int64(len(shown)))
	if _, err := base.WriteAt(shown, 0); err != nil {
		t.Fatal(err)
	}
	cow := block.NewMemory(4 << 20)
	snap, err := snapshot.NewOrigin(base).Attach(cow, snapshot.Options{ChunkSectors: 16})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		p := blocktest.Pattern(9000, uint64(i))
		if _, err := snap.WriteAt(p, int64(i)*150_000); err != nil {
			t.Fatal(err)
		}
		copy(shown[i*150_000:], p)
	}
	if err := snap.Close(); err != nil {
		t.Fatal(err)
	}
	if st, err = store.OpenToRead(cow); err != nil {
		t.Fatal(err)
	}
	return base, st, shown
}

// roundTrip pushes a disk, reads it on demand, pulls it, and pushes it again.
func roundTrip(t *testing.T, ref string) {
	t.Helper()
	base, st, shown := made(t)
	repo, err := remote.Open(ref, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	pushed, err := publish.Push(context.Background(), repo, base, []*store.Store{st}, publish.Options{Temp: t.TempDir()})
	if err != nil || pushed.Written == 0 {
		t.Fatalf("%+v, %v", pushed, err)
	}
	c, err := cache.Open(t.TempDir(), cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	d, err := ondemand.Open(context.Background(), ref, ondemand.Options{Cache: c})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got := make([]byte, len(shown))
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, shown) || d.ID() != pushed.Digest {
		t.Fatalf("%v, or other bytes", err)
	}
	files, err := publish.Pull(context.Background(), d, t.TempDir(), publish.Options{Cache: c})
	if err != nil || len(files) != 2 {
		t.Fatalf("%+v, %v", files, err)
	}
	raw, err := block.Open(files[0].Path, block.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	cow, err := block.Open(files[1].Path, block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer cow.Close()
	pulled, err := store.Open(cow)
	if err != nil {
		t.Fatal(err)
	}
	again, err := publish.Push(context.Background(), repo, raw, []*store.Store{pulled}, publish.Options{Temp: t.TempDir()})
	if err != nil || again.Digest != pushed.Digest || again.Written != 0 {
		t.Errorf("%+v, %v", again, err)
	}
	if _, err := ondemand.Open(context.Background(), ref+"-missing", ondemand.Options{Cache: c}); !errors.Is(err, remote.ErrNotFound) {
		t.Error(err)
	}
}

// A blob that is refused ends a push with the reason, also while others are written, and the reference names nothing.
func TestPushRefused(t *testing.T) {
	base, st, _ := made(t)
	for refused := range int32(5) { // two layers, each with an index, and the index of both
		registry := testremote.NewRegistry()
		var puts atomic.Int32
		address := testremote.Start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut && puts.Add(1) == refused+1 {
				w.WriteHeader(http.StatusForbidden)
				return
			}
			registry.ServeHTTP(w, r)
		}))
		repo, err := remote.Open(address+"/golden/disk:1", remote.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := publish.Push(context.Background(), repo, base, []*store.Store{st}, publish.Options{Temp: t.TempDir()}); !errors.Is(err, remote.ErrDenied) {
			t.Errorf("blob %d: %v", refused, err)
		}
		if _, err := repo.Description(context.Background()); !errors.Is(err, remote.ErrNotFound) {
			t.Errorf("blob %d: the reference: %v", refused, err)
		}
	}
}

// TestS3 runs against gofakes3, whose answers are S3's.
func TestS3(t *testing.T) {
	backend := s3mem.New()
	if err := backend.CreateBucket("images"); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(gofakes3.New(backend).Server())
	defer server.Close()
	t.Setenv("AWS_ENDPOINT_URL", server.URL)
	t.Setenv("AWS_ACCESS_KEY_ID", "someone")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
	roundTrip(t, "s3://images/golden/disk1")
	objects, err := backend.ListBucket("images", &gofakes3.Prefix{HasPrefix: true, Prefix: "golden/blobs/sha256/"}, gofakes3.ListBucketPage{})
	if err != nil || len(objects.Contents) != 5 { // two layers, and the index of both
		t.Errorf("%d blobs, %v", len(objects.Contents), err)
	}
}

// startRegistry runs Debian's docker-registry.
func startRegistry(t *testing.T) string {
	t.Helper()
	address, dir := testremote.FreeAddress(t), t.TempDir()
	config := fmt.Sprintf("version: 0.1\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %s}\nlog: {level: error}\n", dir, address)
	path := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	testremote.StartProgram(t, address, "docker-registry", "serve", path)
	return address
}

func TestDockerRegistry(t *testing.T) {
	roundTrip(t, "oci://"+startRegistry(t)+"/golden/disk:1")
}

// Faults between a real registry and its client.
func TestDockerRegistryFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	address := startRegistry(t)
	base, st, shown := made(t)
	repo, err := remote.Open(address+"/golden/disk:1", remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := publish.Push(context.Background(), repo, base, []*store.Store{st}, publish.Options{Temp: t.TempDir()}); err != nil {
		t.Fatal(err)
	}
	faults := &testremote.Faults{Next: httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: address})}
	proxy := testremote.Start(t, faults)
	for _, fault := range []testremote.Fault{testremote.Cut, testremote.Busy, testremote.Wrong, testremote.Whole} {
		c, err := cache.Open(t.TempDir(), cache.Options{})
		if err != nil {
			t.Fatal(err)
		}
		d, err := ondemand.Open(context.Background(), "oci://"+proxy+"/golden/disk:1", ondemand.Options{Cache: c})
		if err != nil {
			t.Fatal(err)
		}
		faults.Set(fault, 0.2)
		got := make([]byte, 10_000)
		for off := 0; off < len(shown)-len(got); off += 33_333 {
			if _, err := d.ReadAt(got, int64(off)); err != nil && fault != testremote.Wrong || err == nil && !bytes.Equal(got, shown[off:off+len(got)]) {
				t.Errorf("%s, byte %d: %v, or other bytes", fault, off, err)
			}
		}
		faults.Set("", 0)
		if err := errors.Join(d.Close(), c.Close()); err != nil {
			t.Error(err)
		}
	}
}

// TestNginx reads a file by ranges from nginx.
func TestNginx(t *testing.T) {
	address, dir := testremote.FreeAddress(t), t.TempDir()
	_, _, shown := made(t)
	if err := os.WriteFile(filepath.Join(dir, "disk.img"), shown, 0o644); err != nil {
		t.Fatal(err)
	}
	os.Chmod(dir, 0o755)
	user := ""
	if os.Geteuid() == 0 {
		user = "user root;"
	}
	config := fmt.Sprintf("daemon off; master_process off; %s pid %[2]s/pid; error_log stderr; events {} http { access_log off; client_body_temp_path %[2]s/a; proxy_temp_path %[2]s/b; fastcgi_temp_path %[2]s/c; uwsgi_temp_path %[2]s/d; scgi_temp_path %[2]s/e; server { listen %[3]s; root %[2]s; } }", user, dir, address)
	path := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	testremote.StartProgram(t, address, "nginx", "-c", path, "-p", dir, "-e", "stderr")
	c, err := cache.Open(t.TempDir(), cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	name := "http://" + address + "/disk.img"
	d, err := ondemand.Open(context.Background(), name, ondemand.Options{Cache: c})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got := make([]byte, 1<<20)
	if _, err := d.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, shown[1<<20:2<<20]) {
		t.Errorf("%v, or other bytes", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "disk.img"), append(shown, make([]byte, 512)...), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(got, 0); !errors.Is(err, remote.ErrChanged) {
		t.Error(err)
	}
}

// Credentials come from the files of containers' programs, are not in errors, and no program is run without permission.
func TestCredentials(t *testing.T) {
	registry := testremote.NewRegistry()
	registry.User, registry.Password = "someone", "s3cr3t"
	address := testremote.Start(t, registry)
	dir := t.TempDir()
	t.Setenv("HOME", dir)
	t.Setenv("XDG_RUNTIME_DIR", dir)
	t.Setenv("REGISTRY_AUTH_FILE", "")
	t.Setenv("DOCKER_CONFIG", dir)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	helper := fmt.Sprintf("#!/bin/sh\ntouch %s/run\necho '{\"ServerURL\":\"%s\",\"Username\":\"someone\",\"Secret\":\"s3cr3t\"}'\n", dir, address)
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-test"), []byte(helper), 0o755); err != nil {
		t.Fatal(err)
	}
	ref := "oci://" + address + "/private/disk"
	for _, c := range []struct {
		what, config string
		helpers      bool
		want         error
	}{
		{"none", `{}`, false, remote.ErrDenied},
		{"in the file", `{"auths":{"` + address + `":{"auth":"c29tZW9uZTpzM2NyM3Q="}}}`, false, remote.ErrNotFound},
		{"wrong", `{"auths":{"` + address + `":{"auth":"c29tZW9uZTpzM2NyM3R4"}}}`, false, remote.ErrDenied},
		{"a program that may not run", `{"credsStore":"test"}`, false, remote.ErrDenied},
		{"a program that may run", `{"credsStore":"test"}`, true, remote.ErrNotFound},
	} {
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(c.config), 0o600); err != nil {
			t.Fatal(err)
		}
		repo, err := remote.Open(ref, remote.Options{Helpers: c.helpers})
		if err != nil {
			t.Fatal(err)
		}
		if _, err = repo.Description(context.Background()); !errors.Is(err, c.want) || strings.Contains(err.Error(), "s3cr3t") || strings.Contains(err.Error(), "c29tZ") {
			t.Errorf("%s: %v, not %v", c.what, err, c.want)
		}
		if _, err := os.Stat(filepath.Join(dir, "run")); (err == nil) != c.helpers {
			t.Errorf("%s: the program was run: %v", c.what, err == nil)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"auths": s3cr3t`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := remote.Open(ref, remote.Options{}); err == nil || strings.Contains(err.Error(), "s3cr3t") {
		t.Error(err)
	}
}

func TestReferencesRefused(t *testing.T) {
	for _, ref := range []string{"", "oci://", "oci://host", "oci://host/UPPER", "s3://bucket", "s3://bucket/", "s3://bucket/a/../b", "s3://b/key", "ftp://user:s3cr3t@host/x?k=s3cr3t"} {
		if _, err := remote.Open(ref, remote.Options{}); err == nil || strings.Contains(err.Error(), "s3cr3t") {
			t.Errorf("%q: %v", ref, err)
		}
	}
	for _, name := range []string{"http://example.com/disk", "https:///x"} {
		if _, err := remote.OpenFile(context.Background(), name, remote.Options{}); err == nil {
			t.Errorf("%q was opened", name)
		}
	}
	t.Setenv("AWS_ENDPOINT_URL", "http://example.com")
	if _, err := remote.Open("s3://bucket/key", remote.Options{}); err == nil {
		t.Error("an object store without TLS")
	}
}
