package machine_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/test/kernel/machine"
)

// The program stops a child under ptrace and sets its extended registers by a buffer that is too short, as user-mode
// Linux does on a processor with AMX. It changes one register in the part that the buffer has and prints the result of
// it, and of the rest of the state.
const shortState = `
#include <elf.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static unsigned char before[1 << 16], after[1 << 16];

int main(void)
{
	pid_t child = fork();
	if (child == 0) {
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		raise(SIGSTOP);
		_exit(0);
	}
	waitpid(child, 0, 0);
	enum { part = 576 + 64, xmm3 = 160 + 3 * 16 };
	struct iovec all = { before, sizeof before }, again = { after, sizeof after }, few;
	if (ptrace(PTRACE_GETREGSET, child, NT_X86_XSTATE, &all) < 0 || all.iov_len <= part) {
		puts("no longer state");
		goto end;
	}
	unsigned char short_state[part];
	few.iov_base = short_state, few.iov_len = part;
	if (ptrace(PTRACE_GETREGSET, child, NT_X86_XSTATE, &few) < 0 || few.iov_len != part || memcmp(short_state, before, part)) {
		puts("part not read");
		goto end;
	}
	memset(short_state + xmm3, 0x5a, 16);
	short_state[512] |= 2; /* SSE state is not in its initial form */
	if (ptrace(PTRACE_SETREGSET, child, NT_X86_XSTATE, &few) < 0) {
		puts("refused");
		goto end;
	}
	ptrace(PTRACE_GETREGSET, child, NT_X86_XSTATE, &again);
	memcpy(before, short_state, part);
	puts(again.iov_len == all.iov_len && !memcmp(before, after, again.iov_len) ? "set, the rest kept" : "wrong state");
end:
	kill(child, SIGKILL);
	waitpid(child, 0, 0);
	return 0;
}
`

func TestShim(t *testing.T) {
	if _, err := exec.LookPath("cc"); err != nil {
		t.Skip("SKIPPED: no C compiler")
	}
	dir := t.TempDir()
	source, program := filepath.Join(dir, "short.c"), filepath.Join(dir, "short")
	if err := os.WriteFile(source, []byte(shortState), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cc", "-o", program, source).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	shim, err := machine.BuildShim(dir)
	if err != nil {
		t.Fatal(err)
	}
	said := func(env ...string) string {
		cmd := exec.Command(program)
		cmd.Env = append(os.Environ(), env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	switch without := said(); without {
	case "refused":
	case "no longer state":
		t.Skip("SKIPPED: this processor's state ends with the header")
	default:
		t.Fatalf("without the shim: %s", without)
	}
	if with := said("LD_PRELOAD=" + shim); with != "set, the rest kept" {
		t.Errorf("with the shim: %s", with)
	}
}
