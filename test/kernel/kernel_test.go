package kernel_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/test/kernel/job"
	"github.com/dmsnap/dmsnap/test/kernel/machine"
)

// The pool is a sparse disk in the guest's memory from which devices are cut. Each has its own range, long enough to
// grow in.
const (
	pool      = "/dev/loop0"
	poolBytes = 1 << 42
	stretch   = 1 << 36 / 512 // sectors
)

// A kernel is the guest's device-mapper as one test uses it: devices by name, all gone at the end.
type kernel struct {
	t       testing.TB
	m       *machine.Machine
	devices []string         // mapped devices in the order of their creation
	place   map[string]int64 // first sector in the pool of devices cut from it
	numbers map[string]string
}

// newKernel lends the machine to a test.
func newKernel(t testing.TB, m *machine.Machine) *kernel {
	k := &kernel{t: t, m: m, place: map[string]int64{}, numbers: map[string]string{}}
	t.Cleanup(k.clear)
	return k
}

// clear removes every device, newest first, and empties the pool.
func (k *kernel) clear() {
	for len(k.devices) > 0 {
		if r := k.try(job.Op{Do: job.Remove, Dev: "dm:" + k.devices[len(k.devices)-1]}); r.Err != "" {
			k.t.Errorf("remove %s: %s", k.devices[len(k.devices)-1], r.Err)
			k.m.Kill() // the next test gets another
			return
		}
		k.devices = k.devices[:len(k.devices)-1]
	}
	k.place, k.numbers = map[string]int64{}, map[string]string{}
	k.must(job.Op{Do: job.Pool, Dev: pool, N: poolBytes})
	if c := k.m.Complaints(); len(c) > 0 {
		k.t.Errorf("the kernel complains: %v", c)
		k.m.Kill()
	}
}

// do does operations and returns what came of them.
func (k *kernel) do(ops ...job.Op) []job.Result {
	k.t.Helper()
	r, err := k.m.Do(ops...)
	if err != nil {
		k.t.Fatal(err)
	}
	return r
}

// try does one operation.
func (k *kernel) try(op job.Op) job.Result {
	k.t.Helper()
	return k.do(op)[0]
}

// must does operations of which none may fail.
func (k *kernel) must(ops ...job.Op) []job.Result {
	k.t.Helper()
	r := k.do(ops...)
	for i, x := range r {
		if x.Err != "" || x.Code != 0 {
			k.t.Fatalf("%+v: %s (status %d)\n%s\nlast words:\n%s", ops[i], x.Err, x.Code, x.Out, k.lastWords())
		}
	}
	return r
}

// sh runs a command line that must succeed and returns its output.
func (k *kernel) sh(line string) string {
	k.t.Helper()
	return k.must(job.Op{Do: job.Exec, Argv: []string{"/bin/sh", "-c", line}, Seconds: 120})[0].Out
}

// lastWords is the end of what the kernel said.
func (k *kernel) lastWords() string {
	text := k.m.Console()
	if len(text) > 600 {
		text = text[len(text)-600:]
	}
	return text
}

// disk cuts a device out of the pool.
func (k *kernel) disk(name string, sectors int64) {
	k.t.Helper()
	if _, ok := k.place[name]; !ok {
		k.place[name] = int64(len(k.place)) * stretch
	}
	k.create(name, k.diskTable(name, sectors))
}

func (k *kernel) diskTable(name string, sectors int64) string {
	return fmt.Sprintf("0 %d linear 7:0 %d", sectors, k.place[name])
}

// grow makes a device that was cut from the pool longer, while it is in use.
func (k *kernel) grow(name string, sectors int64) {
	k.t.Helper()
	k.reload(name, k.diskTable(name, sectors))
}

// reload replaces the table of a device.
func (k *kernel) reload(name, table string) {
	k.t.Helper()
	dev := "dm:" + name
	k.must(job.Op{Do: job.Load, Dev: dev, Stdin: table}, job.Op{Do: job.Suspend, Dev: dev}, job.Op{Do: job.Resume, Dev: dev})
}

// create makes a mapped device.
func (k *kernel) create(name, table string) {
	k.t.Helper()
	k.must(job.Op{Do: job.Create, Dev: "dm:" + name, Stdin: table})
	k.devices = append(k.devices, name)
}

// remove removes a mapped device.
func (k *kernel) remove(name string) {
	k.t.Helper()
	k.must(job.Op{Do: job.Remove, Dev: "dm:" + name})
	k.devices = slices.DeleteFunc(k.devices, func(d string) bool { return d == name })
	delete(k.numbers, name)
}

func (k *kernel) status(name string) string {
	k.t.Helper()
	return k.must(job.Op{Do: job.Status, Dev: "dm:" + name})[0].Out
}

func (k *kernel) table(name string) string {
	k.t.Helper()
	return k.must(job.Op{Do: job.Table, Dev: "dm:" + name})[0].Out
}

// number is the device's major:minor, as tables say it.
func (k *kernel) number(name string) string {
	k.t.Helper()
	if k.numbers[name] == "" {
		k.numbers[name] = k.must(job.Op{Do: job.Number, Dev: "dm:" + name})[0].Out
	}
	return k.numbers[name]
}

// get returns n bytes of a device from off on, to the end with n 0.
func (k *kernel) get(name string, off, n int64) []byte {
	k.t.Helper()
	return k.device("dm:"+name, off, n)
}

// device is get for any device by its path in the guest.
func (k *kernel) device(dev string, off, n int64) []byte {
	k.t.Helper()
	file := k.m.Name("get")
	k.must(job.Op{Do: job.Get, Dev: dev, Path: file, Off: off, N: n})
	path := filepath.Join(k.m.Share(), file)
	b, err := os.ReadFile(path)
	if err != nil {
		k.t.Fatal(err)
	}
	os.Remove(path)
	return b
}

// put writes bytes to a device at off.
func (k *kernel) put(name string, off int64, b []byte) {
	k.t.Helper()
	k.putDevice("dm:"+name, off, b)
}

// putDevice is put for any device by its path in the guest.
func (k *kernel) putDevice(dev string, off int64, b []byte) {
	k.t.Helper()
	file := k.m.Name("put")
	path := filepath.Join(k.m.Share(), file)
	if err := os.WriteFile(path, b, 0o644); err != nil {
		k.t.Fatal(err)
	}
	k.must(job.Op{Do: job.Put, Dev: dev, Path: file, Off: off})
	os.Remove(path)
}

// digest is the SHA-256 of a whole device.
func (k *kernel) digest(name string) string {
	k.t.Helper()
	return k.must(job.Op{Do: job.Read, Dev: "dm:" + name})[0].Out
}

// text is the status line without start, length and target.
func statusText(line string) string {
	words := strings.SplitN(line, " ", 4)
	if len(words) < 4 {
		return ""
	}
	return words[3]
}
