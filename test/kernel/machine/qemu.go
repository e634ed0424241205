package machine

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// What a guest in qemu loads before it can see the host's directories, and what tests want beyond [Wanted] that
// user-mode Linux has built in.
var qemuModules = []string{"virtio_pci", "virtio_console", "virtio_blk", "9pnet_virtio", "9p", "crc32c_generic", "crc32c_intel", "ext4", "xfs"}

// HaveQEMU returns why a kernel in qemu can't be had here, or nil.
func HaveQEMU() error {
	for _, tool := range []string{"qemu-system-x86_64", "dmsetup", "losetup", "xz"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w (Debian: apt-get install qemu-system-x86 dmsetup xz-utils)", err)
		}
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("the guest uses the host's files as they are, and dmsetup wants root")
	}
	_, _, err := qemuKernel()
	return err
}

// qemuKernel finds the kernel's image and its modules: in the directory DMSNAP_KERNEL_IMAGE, into which a kernel's
// package was unpacked, or where an installed one is.
func qemuKernel() (image, modules string, err error) {
	root := os.Getenv("DMSNAP_KERNEL_IMAGE")
	images, err := filepath.Glob(root + "/boot/vmlinuz-*")
	if err != nil || len(images) == 0 {
		return "", "", fmt.Errorf("no vmlinuz in %s/boot; DMSNAP_KERNEL_IMAGE names a folder into which a kernel was unpacked "+
			"(Debian: apt-get download linux-image-VERSION-amd64 && dpkg -x linux-image-*.deb FOLDER)", root)
	}
	image = images[len(images)-1]
	release := strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
	for _, lib := range []string{"/lib/modules/", "/usr/lib/modules/"} {
		if _, err := os.Stat(root + lib + release + "/kernel"); err == nil {
			return image, root + lib + release, nil
		}
	}
	return "", "", fmt.Errorf("no modules for %s in %s", release, root)
}

// QEMU boots a distribution's kernel with two CPUs, without the help of hardware. Its root directory is the host's,
// read-only. What the guest wrote to a disk, and what was acknowledged, is in the host's file.
func QEMU(c Config) (*Machine, error) {
	image, modules, err := qemuKernel()
	if err != nil {
		return nil, err
	}
	share := filepath.Join(c.Dir, "share")
	if err := os.MkdirAll(share, 0o755); err != nil {
		return nil, err
	}
	initramfs := filepath.Join(c.Dir, "initramfs")
	if err := writeInitramfs(initramfs, c.Guest, modules); err != nil {
		return nil, err
	}
	socket := filepath.Join(c.Dir, "line")
	args := []string{
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", fmt.Sprint(memory(c)), "-nodefaults", "-no-reboot", "-display", "none",
		"-serial", "stdio", "-kernel", image, "-initrd", initramfs,
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable DMSNAP_LINE=/dev/vport0p1 DMSNAP_SHARE=9p:share DMSNAP_ROOT=root",
		"-chardev", "socket,id=line,path=" + socket + ",server=on,wait=off",
		"-device", "virtio-serial-pci,id=serial", "-device", "virtserialport,bus=serial.0,nr=1,chardev=line",
		"-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
		"-virtfs", "local,path=" + share + ",mount_tag=share,security_model=none",
	}
	for _, d := range c.Disks {
		args = append(args, "-drive", "if=virtio,format=raw,file="+d)
	}
	for i, path := range c.VhostUser {
		args = append(args, "-chardev", fmt.Sprintf("socket,id=vhost%d,path=%s,reconnect=1", i, path),
			"-device", fmt.Sprintf("vhost-user-blk-pci,chardev=vhost%d,num-queues=2", i))
	}
	if len(c.VhostUser) > 0 { // they see the guest's memory
		args = append(args, "-object", fmt.Sprintf("memory-backend-memfd,id=mem,size=%dM,share=on", memory(c)), "-machine", "memory-backend=mem")
	}
	cmd := exec.Command("qemu-system-x86_64", args...)
	return boot(line{cmd: cmd, disk: "/dev/vd", connect: func() (io.WriteCloser, io.Reader, error) {
		conn, err := dialSoon(socket)
		return conn, conn, err
	}}, share)
}

// dialSoon connects to a socket that is about to appear.
func dialSoon(path string) (conn net.Conn, err error) {
	for range 500 {
		if conn, err = net.Dial("unix", path); err == nil {
			return conn, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil, err
}

// writeInitramfs makes an archive of the guest's program and of the modules it needs before it sees the host's
// directories, with the order in which to load them.
func writeInitramfs(path, guest, modules string) error {
	program, err := os.ReadFile(guest)
	if err != nil {
		return err
	}
	var a archive
	for _, dir := range []string{"dev", "proc", "sys", "run", "mnt", "tmp", "host", "modules"} {
		a.add(dir, fs.ModeDir|0o755, nil)
	}
	a.add("init", 0o755, program)
	b := bundle{paths: map[string]string{}, done: map[string]bool{}, archive: &a}
	if err := b.index(modules); err != nil {
		return err
	}
	for _, name := range append(qemuModules[:len(qemuModules):len(qemuModules)], wanted...) {
		if err := b.add(name); err != nil {
			return err
		}
	}
	a.add("modules/order", 0o644, []byte(strings.Join(b.order, "\n")))
	a.add("TRAILER!!!", 0, nil)
	return os.WriteFile(path, a.Bytes(), 0o644)
}

// A bundle gathers modules with those they need.
type bundle struct {
	paths   map[string]string // a module's name → its file
	done    map[string]bool
	order   []string
	archive *archive
}

func (b *bundle) index(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok {
			b.paths[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
}

// add adds a module after what it needs. One without a file is part of the kernel itself.
func (b *bundle) add(name string) error {
	path, ok := b.paths[name]
	if !ok || b.done[name] {
		return nil
	}
	b.done[name] = true
	content, err := os.ReadFile(path)
	if err == nil && strings.HasSuffix(path, ".xz") {
		content, err = exec.Command("xz", "-dc", path).Output()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, need := range needs(content) {
		if err := b.add(need); err != nil {
			return err
		}
	}
	b.archive.add("modules/"+name+".ko", 0o644, content)
	b.order = append(b.order, name+".ko")
	return nil
}

// needs reads the names of the modules that a module needs out of its own description.
func needs(module []byte) []string {
	const key = "\x00depends="
	_, text, ok := bytes.Cut(module, []byte(key))
	if !ok {
		return nil
	}
	text, _, _ = bytes.Cut(text, []byte{0})
	return strings.FieldsFunc(strings.ReplaceAll(string(text), "-", "_"), func(r rune) bool { return r == ',' })
}

// An archive is a cpio archive in the form that the kernel unpacks.
type archive struct {
	bytes.Buffer
	inode int
}

func (a *archive) add(name string, mode fs.FileMode, content []byte) {
	const directory, regular = 0o040000, 0o100000
	kind := uint32(regular)
	if mode.IsDir() {
		kind = directory
	}
	a.inode++
	fmt.Fprintf(a, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", a.inode, kind|uint32(mode.Perm()), 0, 0, 1, 0,
		len(content), 0, 0, 0, 0, len(name)+1, 0)
	a.WriteString(name + "\x00")
	a.pad()
	a.Write(content)
	a.pad()
}

func (a *archive) pad() {
	for a.Len()%4 != 0 {
		a.WriteByte(0)
	}
}
