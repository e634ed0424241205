package machine

import (
	_ "embed"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

// umlModules is where Debian's package keeps the modules, a directory a version.
const umlModules = "/usr/lib/uml/modules"

// A Config says how a machine is to be.
type Config struct {
	Guest  string   // the program of test/kernel/guest
	Shim   string   // for UML: what BuildShim made, or empty
	Dir    string   // an empty directory for the machine's use; Dir/share is seen by both
	Memory int      // MiB; 0 means 1024
	Disks  []string // files of the host that the guest gets as disks, in order

	VhostUser []string // sockets of vhost-user-blk back-ends, which the guest gets as /dev/vda, …
}

// Modules that every guest loads.
var wanted = []string{"loop", "dm_mod", "dm_snapshot", "dm_flakey", "dm_delay", "dm_log_writes", "dm_zero", "nbd"}

// Wanted returns the modules that tests may rely on.
func Wanted() []string { return wanted }

// HaveUML returns why user-mode Linux can't be used here, or nil.
func HaveUML() error {
	for _, tool := range []string{"linux.uml", "dmsetup", "losetup"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w (Debian: apt-get install user-mode-linux dmsetup)", err)
		}
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("the guest uses the host's files as they are, and dmsetup wants root")
	}
	_, err := umlModuleDir()
	return err
}

func umlModuleDir() (string, error) {
	found, err := filepath.Glob(umlModules + "/*/modules.dep")
	if err != nil || len(found) == 0 {
		return "", fmt.Errorf("no modules in %s", umlModules)
	}
	return filepath.Dir(found[len(found)-1]), nil
}

//go:embed shim/xstate.c
var shimSource []byte

// BuildShim compiles the shim without which user-mode Linux does not run on processors with AMX (see shim/xstate.c) in
// dir, and returns its path for [Config].
func BuildShim(dir string) (string, error) {
	source, shim := filepath.Join(dir, "xstate.c"), filepath.Join(dir, "xstate.so")
	if err := os.WriteFile(source, shimSource, 0o644); err != nil {
		return "", err
	}
	if out, err := exec.Command("cc", "-shared", "-fPIC", "-O2", "-o", shim, source).CombinedOutput(); err != nil {
		return "", fmt.Errorf("cc: %w\n%s", err, out)
	}
	return shim, nil
}

// UML boots Debian's user-mode Linux over the host's root directory, read-only. Disks appear as /dev/ubda, /dev/ubdb, …
// ([Machine.Disk]): what the guest wrote to one is in the host's file, flushed or not.
func UML(c Config) (*Machine, error) {
	modules, err := umlModuleDir()
	if err != nil {
		return nil, err
	}
	share := filepath.Join(c.Dir, "share")
	if err := os.MkdirAll(share, 0o755); err != nil {
		return nil, err
	}
	toGuest, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	out, fromGuest, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	args := []string{
		fmt.Sprintf("mem=%dM", memory(c)), "rootfstype=hostfs", "rootflags=/", "ro", "init=" + c.Guest,
		"uml_dir=" + c.Dir + "/", "umid=guest", "con=null", "con0=null,fd:1", "ssl=null", "ssl0=fd:3,fd:4",
		"panic=-1",
		"DMSNAP_LINE=/dev/ttyS0", "DMSNAP_SHARE=hostfs:" + share, "DMSNAP_MODULES=" + modules,
	}
	for i, d := range c.Disks {
		args = append(args, fmt.Sprintf("ubd%d=%s", i, d))
	}
	for _, socket := range c.VhostUser {
		args = append(args, "virtio_uml.device="+socket+":2") // 2: a block device
	}
	cmd := exec.Command("linux.uml", args...)
	cmd.ExtraFiles = []*os.File{toGuest, fromGuest}
	cmd.Env = append(os.Environ(), "TMPDIR="+c.Dir)
	if c.Shim != "" {
		cmd.Env = append(cmd.Env, "LD_PRELOAD="+c.Shim)
	}
	return boot(line{cmd: cmd, disk: "/dev/ubd", connect: func() (io.WriteCloser, io.Reader, error) {
		toGuest.Close()
		fromGuest.Close()
		return in, out, nil
	}}, share)
}

func memory(c Config) int {
	if c.Memory == 0 {
		return 1024
	}
	return c.Memory
}
