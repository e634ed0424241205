package kernel_test

import (
	"strconv"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// TestIOFlusher: with --io-flusher every thread of the server is one, and without it none is.
func TestIOFlusher(t *testing.T) {
	need(t)
	m := boot(t)
	k := newKernelOf(t, m)
	putProgram(t, m)
	k.sh("truncate -s 8M /run/disk.img")
	for flag, want := range map[string]bool{"--io-flusher": true, "--io-flusher=false": false} {
		p := k.spawn("server.log", "/mnt/dmsnap", "serve", "/run/disk.img", "a=/run/a.cow", "--create", "--socket", "/run/flusher.sock", flag)
		k.must(job.Op{Do: job.Until, Argv: []string{"ls", "/run"}, Stdin: "flusher.sock"})
		threads := strings.Fields(k.sh("cat /proc/$(pidof dmsnap)/task/*/stat | sed 's/.*) //' | cut -d ' ' -f 7"))
		for _, text := range threads {
			const noIO = 1 << 19 // PF_MEMALLOC_NOIO of Linux 6.1
			if flags, err := strconv.ParseUint(text, 10, 64); err != nil || (flags&noIO != 0) != want {
				t.Errorf("%s: a thread has flags %s (%v)", flag, text, err)
			}
		}
		if len(threads) < 2 {
			t.Errorf("%s: threads %v", flag, threads)
		}
		k.sh("kill $(pidof dmsnap)")
		k.reap(p)
	}
}
