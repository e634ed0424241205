package main

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/testhost"
	"github.com/dmsnap/dmsnap/snapshot"
)

// A kit is a folder of inputs and one for outputs, as the callings have them.
type kit struct {
	dir, in, out string
	path         map[string]string
	stop         func() // ends the server that a calling needs
}

// template holds what is in the folder of inputs, made once.
var template = sync.OnceValues(func() (files map[string][]byte, err error) {
	dir, err := os.MkdirTemp(buildFolder, "kit-")
	if err != nil {
		return nil, err
	}
	k := kitIn(dir)
	origin := bytes.Repeat([]byte("origin, "), 8<<10) // 64 KiB
	clear(origin[32<<10 : 40<<10])
	if err := os.WriteFile(k.path["ORIGIN"], origin, 0o600); err != nil {
		return nil, err
	}
	for _, cow := range []string{"COW", "COW2", "INVALID", "BAD"} {
		if err := doneBy(k.call("create ORIGIN " + cow)); err != nil {
			return nil, err
		}
		if err := writeTo(k.path["ORIGIN"], k.path[cow], bytes.Repeat([]byte(cow), 1000), 0, 20_000, 50_000); err != nil {
			return nil, err
		}
	}
	if err := patchFile(k.path["INVALID"], 4, 0); err != nil {
		return nil, err
	}
	// Slot 1 names the chunk of slot 0.
	if err := patchFile(k.path["BAD"], 4096+16+8, 2); err != nil {
		return nil, err
	}
	noise := make([]byte, 16<<10)
	for i := range noise {
		noise[i] = byte(i*i>>8 ^ 0x5a)
	}
	if err := os.WriteFile(k.path["NOISE"], noise, 0o600); err != nil {
		return nil, err
	}
	if err := os.WriteFile(k.path["COPY"], origin, 0o600); err != nil {
		return nil, err
	}
	bad, err := os.ReadFile(k.path["BAD"])
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(k.path["FIXED"], bad, 0o600); err != nil {
		return nil, err
	}
	for _, args := range []string{"dump COW --output TEXT", "dump --pack COW --output PACK", "repair FIXED --in-place --undo UNDO", "export ORIGIN COW OVERLAY --format qcow2 --backing ORIGIN", "send ORIGIN COW --output STREAM"} {
		if err := doneBy(k.call(args)); err != nil {
			return nil, err
		}
	}
	files = map[string][]byte{}
	for _, name := range inputNames {
		if files[name], err = os.ReadFile(k.path[name]); err != nil {
			return nil, err
		}
	}
	return files, nil
})

// doneBy is nil when all went well.
func doneBy(o outcome) error {
	if o.status != exitDone {
		return fmt.Errorf("status %d, %s", o.status, o.stderr)
	}
	return nil
}

// kitIn names the files of a kit and makes its folders.
func kitIn(dir string) *kit {
	k := &kit{dir: dir, in: filepath.Join(dir, "in"), out: filepath.Join(dir, "out"), path: map[string]string{}}
	for _, name := range inputNames {
		folder := k.in
		if name != "ORIGIN" && name != "COW" {
			folder = filepath.Join(k.in, "more") // a merge warns of other stores beside its own
		}
		k.path[name] = filepath.Join(folder, strings.ToLower(name)+".file")
	}
	for _, name := range []string{"OUT", "ALSO", "FOLDER", "SOCKET"} {
		k.path[name] = filepath.Join(k.out, strings.ToLower(name))
	}
	k.path["CONTROL"] = filepath.Join(k.in, "control.sock")
	k.path["OTHER"] = filepath.Join(k.in, "more", "copy.file") // not an input: the daemon opens it
	k.path["STORE"] = filepath.Join(k.in, "more", "cow2.file")
	os.MkdirAll(filepath.Join(k.in, "more"), 0o755)
	os.Mkdir(k.out, 0o755)
	for _, dir := range []string{k.dir, k.in, filepath.Join(k.in, "more"), k.out} {
		os.Chmod(dir, 0o755) // whatever the umask is: see callAs
	}
	return k
}

func newKit(t *testing.T) *kit {
	t.Helper()
	files, err := template()
	if err != nil {
		t.Fatal(err)
	}
	k := kitIn(testhost.ShortDir(t))
	for name, content := range files {
		writeFile(t, k.path[name], content)
	}
	return k
}

// serve starts the server for a calling that needs one.
func (k *kit) serve(t *testing.T, c calling) {
	if c.served {
		k.stop = start(t, pair{dir: k.in, origin: k.path["ORIGIN"], cow: k.path["COW"]}, serveOptions{}, "disk="+k.path["COW"]).stop
	}
	if c.fleet {
		k.serveFleet(t)
	}
}

// end stops the server, if one runs.
func (k *kit) end() {
	if k.stop != nil {
		k.stop()
	}
}

// expand puts paths in the place of the words in capitals.
func (k *kit) expand(args string, more ...string) []string {
	words := append(strings.Fields(args), more...)
	for i, w := range words {
		if p, ok := k.path[w]; ok {
			words[i] = p
		}
	}
	return words
}

func (k *kit) call(args string, more ...string) outcome { return dmsnap(k.expand(args, more...)...) }

// state is all that a command could change: names, modes, sizes, times of change, content.
func (k *kit) state(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.Walk(k.dir, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		all[path] = info.Mode().String()
		if info.Mode().IsRegular() {
			all[path] += fmt.Sprint(" ", info.Size(), " bytes, ", info.ModTime().Format(time.RFC3339Nano))
			if b, err := os.ReadFile(path); err == nil { // else it is one that nobody may read
				all[path] += " " + digest(b)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// wantState wants nothing changed since.
func (k *kit) wantState(t *testing.T, before map[string]string) {
	t.Helper()
	if after := k.state(t); !maps.Equal(before, after) {
		for path, now := range after {
			if before[path] != now {
				t.Errorf("%s: %q before, %q now", path, before[path], now)
			}
		}
		for path := range before {
			if after[path] == "" {
				t.Errorf("%s is gone", path)
			}
		}
	}
}

// wantRefused calls, and wants a refusal in one line with the words in it, and nothing touched.
func (k *kit) wantRefused(t *testing.T, args []string, words ...string) {
	t.Helper()
	before := k.state(t)
	dmsnap(args...).wantRefused(t, words...)
	k.wantState(t, before)
	if t.Failed() {
		t.Fatalf("dmsnap %q", args)
	}
}

// callAs runs the command as a user for whom file modes apply, unlike root.
func (k *kit) callAs(t *testing.T, args ...string) outcome {
	t.Helper()
	if os.Geteuid() != 0 {
		return dmsnap(args...)
	}
	const nobody = 65534
	for _, dir := range []string{filepath.Dir(k.dir), buildFolder, program(t)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(program(t), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Skipf("SKIPPED: no process of another user: %v", err)
	}
	return outcome{cmd.ProcessState.ExitCode(), out.String(), stderr.String()}
}

// writeTo writes to the snapshot of a pair of files.
func writeTo(originPath, cowPath string, what []byte, offs ...int64) (err error) {
	origin, err := block.Open(originPath, block.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	defer origin.Close()
	cow, err := block.Open(cowPath, block.Options{})
	if err != nil {
		return err
	}
	defer cow.Close()
	snap, err := snapshot.NewOrigin(origin).Attach(cow, snapshot.Options{})
	if err != nil {
		return err
	}
	for _, off := range offs {
		if _, err := snap.WriteAt(what, off); err != nil {
			return err
		}
	}
	return snap.Close()
}

// patchFile changes bytes of a file.
func patchFile(path string, off int64, b ...byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(b, off)
	return err
}
