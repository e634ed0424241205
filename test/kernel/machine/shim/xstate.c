/*
 * A shim for user-mode Linux (LD_PRELOAD): it lets ptrace(2) take an extended register state that is shorter than
 * the processor's.
 *
 * User-mode Linux gets and sets a process's extended registers (NT_X86_XSTATE) in a buffer of a fixed size. On a
 * processor with AMX the state is longer than that buffer, PTRACE_SETREGSET refuses a part of it, and user-mode Linux
 * panics at its first process. The state's layout begins alike on all processors:
 *
 *     0        512         576                  caller's length        processor's length
 *     | legacy | header    | components ...     |  components ...      |
 *     |<--------- the caller's part ----------->|<-- kept as it is --->|
 *
 * So a state is read whole, the caller's part is laid over it, and the whole is written back. The shim is used on every
 * processor; where the caller's buffer is long enough it changes nothing.
 *
 * The buffer is static: user-mode Linux has small stacks, traces from one thread, and doesn't trace in signal handlers.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>

enum { getregset = 0x4204, setregset = 0x4205, x86_xstate = 0x202 };

static long (*next_ptrace)(int, ...);
static unsigned char whole[1 << 16];

__attribute__((constructor)) static void resolve(void)
{
	next_ptrace = (long (*)(int, ...))dlsym(RTLD_NEXT, "ptrace");
}

long ptrace(int request, ...)
{
	va_list args;
	va_start(args, request);
	pid_t pid = va_arg(args, pid_t);
	void *addr = va_arg(args, void *);
	void *data = va_arg(args, void *);
	va_end(args);

	if ((request != getregset && request != setregset) || addr != (void *)(long)x86_xstate)
		return next_ptrace(request, pid, addr, data);

	struct iovec *part = data;
	struct iovec all = { whole, sizeof whole };
	long result = next_ptrace(getregset, pid, addr, &all);
	if (result < 0)
		return result;
	if (part->iov_len > all.iov_len)
		part->iov_len = all.iov_len;
	if (request == getregset) {
		memcpy(part->iov_base, whole, part->iov_len);
		return result;
	}
	memcpy(whole, part->iov_base, part->iov_len);
	return next_ptrace(setregset, pid, addr, &all);
}
