package main

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/dmsnap/dmsnap/internal/testremote"
)

// Credentials and signed URLs are in no error, no warning, no log and no reply of a server, whether they are accepted or not. Names are printed
// as they were given by verbs that print names for the user alone: inspect.
func TestSecretsAreNotLogged(t *testing.T) {
	k := newKit(t)
	registry := testremote.NewRegistry()
	registry.User, registry.Password = "someone", "s3cr3t"
	faults := &testremote.Faults{Next: registry}
	address := testremote.Start(t, faults)
	file := &testremote.File{}
	file.Set(`"1"`, readFile(t, k.path["ORIGIN"]))
	web := testremote.Start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "someone" || password != "s3cr3t" || r.URL.Query().Get("signature") != "s3cr3t" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		file.ServeHTTP(w, r)
	}))
	home := t.TempDir()
	env := []string{"HOME=" + home, "DOCKER_CONFIG=" + home, "REGISTRY_AUTH_FILE=", "XDG_RUNTIME_DIR=" + home, "XDG_CACHE_HOME=" + filepath.Join(home, "cache"),
		"PATH=" + home + ":" + os.Getenv("PATH")}
	secrets := []string{"s3cr3t", "c29tZW9uZTpzM2NyM3Q", "wr0ng", "c29tZW9uZTp3cjBuZw"}
	check := func(what, out string) {
		t.Helper()
		for _, secret := range secrets {
			if strings.Contains(out, secret) {
				t.Errorf("%s: has %q: %s", what, secret, out)
			}
		}
	}
	config := func(text string) { writeFile(t, filepath.Join(home, "config.json"), []byte(text)) }
	// do runs the program, which succeeds or fails with some words.
	do := func(words, args string, more ...string) {
		t.Helper()
		out, err := with(t, env, k.expand(args, more...)...)
		check(args, out)
		if (err == nil) != (words == "") || !strings.Contains(out, words) {
			t.Errorf("%s: %v, not %q: %s", args, err, words, out)
		}
	}
	right := `{"auths":{"` + address + `":{"auth":"c29tZW9uZTpzM2NyM3Q="}}}`
	ref, url := "oci://"+address+"/golden/disk:1", "http://someone:s3cr3t@"+web+"/disk.img?signature=s3cr3t"

	config(right)
	do("", "push ORIGIN", ref)
	faults.Set(testremote.Redirect, 0.3)
	do("", "export", ref, k.path["OUT"])
	faults.Set("", 0)
	do("", "export", url, k.path["ALSO"])
	if !bytes.Equal(readFile(t, k.path["ALSO"]), readFile(t, k.path["ORIGIN"])) {
		t.Error("other bytes")
	}
	for _, bad := range []struct{ words, config, helper string }{
		{"access denied", `{"auths":{"` + address + `":{"auth":"c29tZW9uZTp3cjBuZw=="}}}`, ""},
		{"credentials can't be read", `{"auths": s3cr3t`, ""},
		{"can't be read", `{"credsStore":"test"}`, "echo s3cr3t; exit 1"},
		{"access denied", `{"credsStore":"test"}`, `echo '{"ServerURL":"x","Username":"someone","Secret":"wr0ng"}'`},
	} {
		config(bad.config)
		if err := os.WriteFile(filepath.Join(home, "docker-credential-test"), []byte("#!/bin/sh\n"+bad.helper+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		other := strings.Replace(ref, ":1", ":2", 1) // of which the cache knows nothing
		do(bad.words, "export", other, k.path["SOCKET"], "--allow-credential-helpers")
		do(bad.words, "push ORIGIN", other, "--allow-credential-helpers")
	}
	config(right)
	do("access denied", "export", strings.Replace(url, "signature=s3cr3t", "signature=wr0ng", 1), k.path["SOCKET"])
	do("disk on another host", "merge", url, k.path["COW"])

	for i, source := range []string{ref, url} {
		for _, format := range []string{"text", "json"} {
			cow := filepath.Join(k.out, fmt.Sprintf("%d-%s.cow", i, format))
			do("", "create", source, cow)
			check("the store", string(readFile(t, cow)))
			server := &process{Cmd: exec.Command(program(t), "serve", source, cow, "--socket", k.path["SOCKET"], "--control", k.path["CONTROL"], "--export-origin", "--log-format", format)}
			server.Env = append(os.Environ(), env...)
			server.run(t)
			started, err := server.stdout.ReadString('\n') // when it serves
			if err != nil {
				t.Fatalf("%v, %s", err, server.stderr.String())
			}
			check("serve", started)
			do("", "status --control CONTROL")
			do("", "status --json --control CONTROL")
			list, err := exec.Command("nbdinfo", "--list", "nbd+unix:///?socket="+k.path["SOCKET"]).CombinedOutput()
			if err == nil {
				check("the list of exports", string(list))
			}
			server.Process.Signal(syscall.SIGTERM)
			server.end(t)
			check("the log of serve", server.stderr.String())
			if !strings.Contains(server.stderr.String(), "the format of the origin is raw") {
				t.Errorf("the log has not the origin: %s", server.stderr.String())
			}
			mustRun(t, "check", cow)
		}
	}
}
