package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/internal/testcerts"
	"github.com/dmsnap/dmsnap/internal/testremote"
)

// proxyTo is an HTTP proxy that connects to one address, whatever host it is asked for.
func proxyTo(t *testing.T, address string) (url string) {
	t.Helper()
	return "http://" + testremote.Start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		to, err := net.Dial("tcp", address)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer to.Close()
		from, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer from.Close()
		if r.Method == http.MethodConnect {
			io.WriteString(from, "HTTP/1.1 200 OK\r\n\r\n")
		} else if err := r.Write(to); err != nil { // a request for plain HTTP
			return
		}
		go func() {
			io.Copy(to, from)
			to.(*net.TCPConn).CloseWrite()
		}()
		io.Copy(from, to)
	}))
}

// with runs the program with variables of the environment.
func with(t *testing.T, env []string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(program(t), args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// A registry and a web server with TLS: refused while their authority is unknown, accepted with SSL_CERT_FILE.
func TestRemoteTLS(t *testing.T) {
	k := newKit(t)
	certs := t.TempDir()
	a, err := testcerts.NewAuthority("of the servers")
	if err == nil {
		err = a.Write(certs)
	}
	if err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(certs, name+".pem") }
	origin := readFile(t, k.path["ORIGIN"])
	n := 0
	export := func(name string) (out string) {
		n++
		return name + " " + filepath.Join(k.out, fmt.Sprintf("%d.img", n)) + " --cache-dir=" + t.TempDir()
	}
	// check exports a disk with and without the certificate of the authority.
	check := func(t *testing.T, name string, env ...string) {
		t.Helper()
		args := append([]string{"export"}, strings.Fields(export(name))...)
		begun := time.Now()
		if out, err := with(t, env, args...); err == nil || !strings.Contains(out, "certificate") {
			t.Errorf("%s with an unknown authority: %v, %s", name, err, out)
		}
		if took := time.Since(begun); took > 20*time.Second {
			t.Errorf("an unknown authority was refused after %v", took)
		}
		if out, err := with(t, append(env, "SSL_CERT_FILE="+at("ca-cert")), args...); err != nil || !bytes.Equal(readFile(t, args[2]), origin) {
			t.Errorf("%s: %v, %s", name, err, out)
		}
	}
	t.Run("docker-registry", func(t *testing.T) {
		address, dir := testremote.FreeAddress(t), t.TempDir()
		config := filepath.Join(dir, "config.yml")
		writeFile(t, config, fmt.Appendf(nil, "version: 0.1\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %s, tls: {certificate: %s, key: %s}}\nlog: {level: error}\n",
			dir, address, at("server-cert"), at("server-key")))
		testremote.StartProgram(t, address, "docker-registry", "serve", config)
		ref, env := "oci://registry.test/golden/disk:1", []string{"HTTPS_PROXY=" + proxyTo(t, address)}
		if out, err := with(t, env, "push", k.path["ORIGIN"], ref); err == nil || !strings.Contains(out, "certificate") {
			t.Errorf("push with an unknown authority: %v, %s", err, out)
		}
		if out, err := with(t, append(env, "SSL_CERT_FILE="+at("ca-cert")), "push", k.path["ORIGIN"], ref); err != nil {
			t.Fatalf("%v, %s", err, out)
		}
		check(t, ref, env...)
	})
	t.Run("nginx", func(t *testing.T) {
		address, dir := testremote.FreeAddress(t), t.TempDir()
		writeFile(t, filepath.Join(dir, "disk.img"), origin)
		os.Chmod(dir, 0o755)
		user := ""
		if os.Geteuid() == 0 {
			user = "user root;"
		}
		config := filepath.Join(dir, "nginx.conf")
		writeFile(t, config, fmt.Appendf(nil, `daemon off; master_process off; %s pid %[2]s/pid; error_log stderr; events {} http { access_log off; client_body_temp_path %[2]s/a;
			proxy_temp_path %[2]s/b; fastcgi_temp_path %[2]s/c; uwsgi_temp_path %[2]s/d; scgi_temp_path %[2]s/e;
			server { listen %[3]s ssl; ssl_certificate %[4]s; ssl_certificate_key %[5]s; root %[2]s; } }`, user, dir, address, at("server-cert"), at("server-key")))
		testremote.StartProgram(t, address, "nginx", "-c", config, "-p", dir, "-e", "stderr")
		check(t, "https://"+address+"/disk.img")
		check(t, "https://registry.test/disk.img", "HTTPS_PROXY="+proxyTo(t, address))
	})
	t.Run("plain", func(t *testing.T) { // of another host only where it is allowed
		registry := httptest.NewServer(testremote.NewRegistry())
		defer registry.Close()
		address := strings.TrimPrefix(registry.URL, "http://")
		mustRun(t, "push", k.path["ORIGIN"], address+"/golden/disk:1")
		proxy := proxyTo(t, address)
		env := []string{"HTTPS_PROXY=" + proxy, "HTTP_PROXY=" + proxy}
		args := append([]string{"export"}, strings.Fields(export("oci://registry.test/golden/disk:1"))...)
		if out, err := with(t, env, args...); err == nil || !strings.Contains(out, "--insecure allows") {
			t.Errorf("a registry without TLS: %v, %s", err, out)
		}
		if out, err := with(t, env, append(args, "--insecure")...); err != nil || !bytes.Equal(readFile(t, args[2]), origin) {
			t.Errorf("%v, %s", err, out)
		}
	})
}
