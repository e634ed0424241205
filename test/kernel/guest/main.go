// Guest is the first process of a guest kernel: it mounts what a system needs, and then does what the
// test on the host sends it, line by line (package job). It is static, so that it runs in user-mode Linux
// over the host's files as well as in an initramfs.
//
// Its parameters are variables of the kernel's command line: DMSNAP_LINE, the device of the line to the host; DMSNAP_SHARE,
// "hostfs:DIR" or "9p:TAG"; DMSNAP_MODULES, the directory with modules.dep, where the modules were not loaded from an
// initramfs; DMSNAP_ROOT, the tag of the host's root directory, where they were.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/test/kernel/job"
)

const (
	shareDir = "/mnt"
	poolDir  = "/run"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "this is the first process of a guest kernel; run the tests in test/kernel instead")
		os.Exit(2)
	}
	if err := run(); err != nil {
		fmt.Println("GUEST:", err)
	}
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {} // the first process must not end before the machine does
}

func run() error {
	os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
	os.Setenv("DM_DISABLE_UDEV", "1")
	os.Setenv("HOME", poolDir)
	if err := leaveInitramfs(); err != nil {
		return err
	}
	if err := mountAll(); err != nil {
		return err
	}
	line, err := openLine(os.Getenv("DMSNAP_LINE"))
	if err != nil {
		return err
	}
	defer line.Close()
	return serve(line)
}

// leaveInitramfs loads the modules that an initramfs brought, in the order it says, and moves to the root directory
// that the host shares under a tag. Without an initramfs there is nothing to leave.
func leaveInitramfs() error {
	order, err := os.ReadFile("/modules/order")
	if err != nil {
		return nil
	}
	for name := range strings.FieldsSeq(string(order)) {
		if err := insert("/modules/"+name, ""); err != nil {
			fmt.Println("GUEST:", err) // one for other hardware, say; what is needed will be missed below
		}
	}
	tag := os.Getenv("DMSNAP_ROOT")
	if err := unix.Mount(tag, "/host", "9p", unix.MS_RDONLY, "trans=virtio,version=9p2000.L,msize=262144,cache=loose"); err != nil {
		return fmt.Errorf("mount the host's root folder: %w", err)
	}
	if err := unix.Mount("devtmpfs", "/host/dev", "devtmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount /dev: %w", err)
	}
	return errors.Join(unix.Chroot("/host"), unix.Chdir("/"))
}

// mountAll makes a system of a kernel that has a root directory and nothing else.
func mountAll() error {
	for _, m := range []struct{ what, where, options string }{
		{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"devtmpfs", "/dev", ""}, {"tmpfs", poolDir, "size=90%"},
	} {
		err := unix.Mount(m.what, m.where, m.what, 0, m.options)
		if err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", m.where, err)
		}
	}
	kind, name, _ := strings.Cut(os.Getenv("DMSNAP_SHARE"), ":")
	var err error
	switch kind {
	case "hostfs":
		err = unix.Mount("none", shareDir, "hostfs", 0, name)
	case "9p":
		err = unix.Mount(name, shareDir, "9p", 0, "trans=virtio,version=9p2000.L,msize=262144")
	default:
		return fmt.Errorf("no share in %q", os.Getenv("DMSNAP_SHARE"))
	}
	if err != nil {
		return fmt.Errorf("mount the share: %w", err)
	}
	// Host's /tmp may hold the share and this program; both are open by now.
	if err := unix.Mount("tmpfs", "/tmp", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount /tmp: %w", err)
	}
	// Tools that keep state do so in memory.
	return os.MkdirAll(poolDir+"/lock", 0o755)
}

// openLine opens the line to the host and turns everything off that a terminal would do to bytes.
func openLine(path string) (*os.File, error) {
	fd := -1
	var err error
	for range 200 { // a port appears a moment after its driver was loaded
		if fd, err = unix.Open(path, unix.O_RDWR|unix.O_NOCTTY, 0); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	if t, err := unix.IoctlGetTermios(fd, unix.TCGETS); err == nil {
		t.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
		t.Oflag &^= unix.OPOST
		t.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
		t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
		if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
			return nil, err
		}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// serve does the operations of one line after the other until the host asks for the end or goes away.
func serve(line *os.File) error {
	if _, err := line.WriteString("\nREADY\n"); err != nil {
		return err
	}
	in := bufio.NewReaderSize(line, 1<<16)
	for {
		text, err := in.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("line to the host: %w", err)
		}
		if string(text) == "END\n" {
			return nil
		}
		// Long lists come through the share: a terminal's buffer is short.
		if name, ok := strings.CutPrefix(strings.TrimSpace(string(text)), "@"); ok {
			if text, err = os.ReadFile(filepath.Join(shareDir, name)); err != nil {
				return err
			}
		}
		var ops []job.Op
		if err := json.Unmarshal(text, &ops); err != nil {
			return fmt.Errorf("what the host says: %w", err)
		}
		results := make([]job.Result, 0, len(ops))
		for _, op := range ops {
			results = append(results, do(op))
		}
		reply, err := json.Marshal(results)
		if err != nil {
			return err
		}
		if _, err := line.Write(append(reply, '\n')); err != nil {
			return err
		}
	}
}

// refusal is how an error is reported: errno's name alone, since the two sides' paths differ.
func refusal(err error) string {
	if err == nil {
		return ""
	}
	if no := syscall.Errno(0); errors.As(err, &no) {
		return unix.ErrnoName(no)
	}
	return err.Error()
}
