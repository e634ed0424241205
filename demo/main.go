// Command demo shows dmsnap's main job end to end, with the built binary and a real file-system image:
// create a snapshot, serve it and its origin over NBD, write to both, look at the status, merge the
// snapshot back while both are served, and check every step by digest. It needs nothing but Go; with
// mke2fs and e2fsck on the machine the image is a real ext4.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd"
)

const (
	imageSize = 64 << 20
	blockSize = 4096
)

func main() {
	binary := flag.String("dmsnap", "bin/dmsnap", "the binary to show")
	flag.Parse()
	if err := run(*binary); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo is one run in a directory of its own.
type demo struct {
	binary   string
	dir      string
	verified []string
}

func run(binary string) error {
	binary, err := filepath.Abs(binary)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "dmsnap-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	d := &demo{binary: binary, dir: dir}
	if err := d.show(); err != nil {
		return err
	}
	fmt.Println("\nVerified:")
	for _, v := range d.verified {
		fmt.Println("  *", v)
	}
	return nil
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

func (d *demo) note(format string, args ...any) {
	d.verified = append(d.verified, fmt.Sprintf(format, args...))
}

func (d *demo) show() error {
	title("Three versions of one disk: as it is, as the snapshot will have it, as the origin will go on")
	images, err := d.makeImages()
	if err != nil {
		return err
	}
	disk, tomorrow, other := images[0], images[1], images[2]
	if err := os.WriteFile(d.path("disk.img"), disk, 0o600); err != nil {
		return err
	}

	title("A snapshot: an exception store in the kernel's format beside the disk")
	if err := d.dmsnap("create", "disk.img", "snap.cow"); err != nil {
		return err
	}
	if err := d.dmsnap("status", "snap.cow"); err != nil {
		return err
	}

	title("Both served over NBD")
	server, err := d.serve()
	if err != nil {
		return err
	}
	defer server.kill()
	if err := d.writeBoth(server, disk, tomorrow, other); err != nil {
		return err
	}
	if err := d.dmsnap("status", "--control", "control.sock"); err != nil {
		return err
	}

	title("Live merge: the snapshot goes back into the origin, both still served")
	if err := d.dmsnap("merge", "--control", "control.sock", "snap"); err != nil {
		return err
	}
	rest := differing(disk, tomorrow)
	rest = rest[len(rest)*3/4:]
	if err := d.write(server.uris["snap"], tomorrow, rest); err != nil {
		return fmt.Errorf("write while merging: %w", err)
	}
	fmt.Printf("   wrote the last %d blocks to the snapshot's export meanwhile\n", len(rest))
	if err := d.dmsnap("merge", "--control", "control.sock", "snap", "--wait"); err != nil {
		return err
	}
	if err := d.checkExport(server.uris["origin"], tomorrow); err != nil {
		return fmt.Errorf("merged origin over NBD: %w", err)
	}
	d.note("the live merge, with writes coming in, made the origin the snapshot: sha256 %s", short(tomorrow))
	if err := server.stop(); err != nil {
		return err
	}
	d.note("SIGTERM stopped the server in good order")

	title("What is on disk now")
	if err := d.dmsnap("status", "snap.cow"); err != nil {
		return err
	}
	got, err := os.ReadFile(d.path("disk.img"))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, tomorrow) {
		return errors.New("disk.img is not what the snapshot was")
	}
	d.note("disk.img on disk is the snapshot, byte for byte: sha256 %s", short(tomorrow))
	if err := d.checkFileSystem("disk.img"); err != nil {
		return err
	}
	return d.fleet(tomorrow, other)
}

// writeBoth makes the snapshot tomorrow's disk and the origin the other one, through NBD, and looks that
// neither saw the other's writes.
func (d *demo) writeBoth(server *server, disk, tomorrow, other []byte) error {
	blocks := differing(disk, tomorrow)
	blocks = blocks[:len(blocks)*3/4] // the others follow while it is merged
	if err := d.write(server.uris["snap"], tomorrow, blocks); err != nil {
		return fmt.Errorf("write to the snapshot: %w", err)
	}
	fmt.Printf("   wrote %d blocks of 4 KiB to the snapshot\n", len(blocks))
	if err := d.checkExport(server.uris["origin"], disk); err != nil {
		return fmt.Errorf("origin after writes to the snapshot: %w", err)
	}
	d.note("%d blocks written to the snapshot left the origin as it was: sha256 %s", len(blocks), short(disk))
	view := bytes.Clone(disk)
	for _, off := range blocks {
		copy(view[off:off+blockSize], tomorrow[off:])
	}
	blocks = differing(disk, other)
	if err := d.write(server.uris["origin"], other, blocks); err != nil {
		return fmt.Errorf("write to the origin: %w", err)
	}
	fmt.Printf("   wrote %d blocks of 4 KiB to the origin\n", len(blocks))
	if err := d.checkExport(server.uris["origin"], other); err != nil {
		return fmt.Errorf("origin: %w", err)
	}
	if err := d.checkExport(server.uris["snap"], view); err != nil {
		return fmt.Errorf("snapshot after writes to the origin: %w", err)
	}
	d.note("%d blocks written to the origin left the snapshot as it was: sha256 %s", len(blocks), short(view))
	return nil
}

// makeImages builds the three versions: an ext4 with other files in each, or plain bytes where mke2fs is
// missing.
func (d *demo) makeImages() ([][]byte, error) {
	mke2fs, err := exec.LookPath("mke2fs")
	if err != nil {
		mke2fs, err = exec.LookPath("/sbin/mke2fs")
	}
	if err != nil {
		fmt.Println("   SKIPPED: no mke2fs here (package e2fsprogs); the images are plain bytes instead")
	}
	random := rand.New(rand.NewPCG(1, 2))
	var images [][]byte
	for i := range 3 {
		content := make([]byte, 6<<20)
		for j := range content {
			content[j] = byte(random.Uint32())
		}
		if err != nil {
			image := make([]byte, imageSize)
			copy(image[(1+9*i)<<20:], content)
			images = append(images, image)
			continue
		}
		image, err := d.makeFileSystem(mke2fs, i, content)
		if err != nil {
			return nil, err
		}
		images = append(images, image)
	}
	return images, nil
}

func (d *demo) makeFileSystem(mke2fs string, i int, content []byte) ([]byte, error) {
	files := d.path(fmt.Sprintf("files%d", i))
	if err := os.MkdirAll(files, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(files, fmt.Sprintf("version-%d.bin", i)), content, 0o644); err != nil {
		return nil, err
	}
	image := d.path(fmt.Sprintf("version%d.img", i))
	cmd := exec.Command(mke2fs, "-q", "-t", "ext4", "-d", files, image, fmt.Sprintf("%dk", imageSize>>10))
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mke2fs: %w: %s", err, out)
	}
	return os.ReadFile(image)
}

func (d *demo) checkFileSystem(name string) error {
	e2fsck, err := exec.LookPath("e2fsck")
	if err != nil {
		if e2fsck, err = exec.LookPath("/sbin/e2fsck"); err != nil {
			fmt.Println("   SKIPPED: no e2fsck here (package e2fsprogs)")
			return nil
		}
	}
	out, err := exec.Command(e2fsck, "-f", "-n", d.path(name)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("e2fsck -fn %s: %w: %s", name, err, out)
	}
	d.note("e2fsck finds the merged ext4 clean")
	return nil
}

// dmsnap runs the binary in the demo's directory and shows command and answer.
func (d *demo) dmsnap(args ...string) error {
	fmt.Println("$ dmsnap", strings.Join(args, " "))
	cmd := exec.Command(d.binary, args...)
	cmd.Dir = d.dir
	out, err := cmd.CombinedOutput()
	for line := range strings.Lines(string(out)) {
		fmt.Print("   ", line)
	}
	if err != nil {
		return fmt.Errorf("dmsnap %s: %w", args[0], err)
	}
	return nil
}

// server is a running `dmsnap serve`.
type server struct {
	cmd  *exec.Cmd
	uris map[string]string // by export name
}

// serve starts the server and reads the URIs that it prints when it is ready.
func (d *demo) serve() (*server, error) {
	args := []string{"serve", "disk.img", "snap=snap.cow", "--export-origin", "--socket", "nbd.sock", "--control", "control.sock"}
	fmt.Println("$ dmsnap", strings.Join(args, " "))
	s := &server{cmd: exec.Command(d.binary, args...), uris: map[string]string{}}
	s.cmd.Dir, s.cmd.Stderr = d.dir, os.Stderr
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(out)
	for len(s.uris) < 2 && lines.Scan() {
		fmt.Println("   " + lines.Text())
		f := strings.Fields(lines.Text())
		if len(f) >= 2 && strings.Contains(f[1], "://") {
			// The server runs in the demo's directory; we don't.
			s.uris[f[0]] = strings.Replace(f[1], "socket=nbd.sock", "socket="+d.path("nbd.sock"), 1)
		}
	}
	if len(s.uris) < 2 {
		s.kill()
		return nil, errors.New("the server ended before it was ready")
	}
	go io.Copy(io.Discard, out)
	return s, nil
}

func (s *server) kill() {
	if s.cmd.ProcessState == nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
	}
}

// stop asks the server to end and gives it ten seconds.
func (s *server) stop() error {
	s.cmd.Process.Signal(syscall.SIGTERM)
	timer := time.AfterFunc(10*time.Second, func() { s.cmd.Process.Kill() })
	defer timer.Stop()
	if err := s.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w", s.cmd.Args[1], err)
	}
	return nil
}

// differing lists the offsets of the blocks in which two images differ.
func differing(a, b []byte) []int {
	var offs []int
	for off := 0; off < len(a); off += blockSize {
		if !bytes.Equal(a[off:off+blockSize], b[off:off+blockSize]) {
			offs = append(offs, off)
		}
	}
	return offs
}

// write makes the blocks at these offsets of the export at uri those of image, and flushes.
func (d *demo) write(uri string, image []byte, offs []int) (err error) {
	c, err := nbd.Dial(context.Background(), uri)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	for _, off := range offs {
		if _, err := c.WriteAt(image[off:off+blockSize], int64(off)); err != nil {
			return err
		}
	}
	return c.Flush()
}

// checkExport reads the whole export and wants it to be image.
func (d *demo) checkExport(uri string, image []byte) (err error) {
	c, err := nbd.Dial(context.Background(), uri)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(block.Device(c), 0, c.Size())); err != nil {
		return err
	}
	if want := sha256.Sum256(image); !bytes.Equal(h.Sum(nil), want[:]) {
		return fmt.Errorf("digest is %x, want %x", h.Sum(nil), want)
	}
	return nil
}

func short(image []byte) string { return fmt.Sprintf("%.8x…", sha256.Sum256(image)) }

func title(s string) { fmt.Printf("\n== %s\n", s) }
