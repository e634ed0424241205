package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/dmsnap/dmsnap/nbd"
)

// fleet is the second act: machines that are forked from one golden disk, a checkpoint, a mistake, and a rollback, all by a daemon
// that is killed in between. golden is the content of disk.img, other another one.
func (d *demo) fleet(golden, other []byte) error {
	title("A fleet: machines forked from disk.img, by a daemon")
	os.Setenv("DMSNAP_CONTROL", filepath.Join("fleet", "control.sock"))
	daemon, err := d.daemon()
	if err != nil {
		return err
	}
	defer func() { daemon.kill() }()
	if err := d.dmsnap("disk", "add", "golden", "disk.img"); err != nil {
		return err
	}
	const machines = 5
	began := time.Now()
	for i := range machines {
		if err := d.dmsnap("fork", "golden", fmt.Sprintf("vm%d", i+1)); err != nil {
			return err
		}
	}
	fmt.Printf("   %d forks took %v, with as many programs started\n", machines, time.Since(began).Round(time.Millisecond))
	if err := d.write(d.node("vm1"), other, differing(golden, other)); err != nil {
		return err
	}
	if err := d.dmsnap("checkpoint", "vm1", "--name", "good"); err != nil {
		return err
	}

	title("A mistake on vm1, and its end: a rollback, and machines forked from the checkpoint")
	broken := bytes.Repeat([]byte("oh no!.."), len(golden)/8)
	if err := d.write(d.node("vm1"), broken, differing(broken, other)[:64]); err != nil {
		return err
	}
	if err := d.dmsnap("rollback", "vm1", "vm1@good", "--force"); err != nil {
		return err
	}
	if err := d.dmsnap("fork", "vm1@good", "copy"); err != nil {
		return err
	}
	if err := d.dmsnap("tree"); err != nil {
		return err
	}

	title("kill -9, and the daemon again: the same tree")
	daemon.kill()
	if daemon, err = d.daemon(); err != nil {
		return err
	}
	for name, want := range map[string][]byte{"vm1": other, "copy": other, "vm2": golden} {
		if err := d.checkExport(d.node(name), want); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	d.note("after a rollback and kill -9, vm1 and its fork have the checkpoint: sha256 %s", short(other))
	d.note("vm2 and the golden disk are as they were: sha256 %s", short(golden))
	if err := daemon.stop(); err != nil {
		return err
	}
	got, err := os.ReadFile(d.path("disk.img"))
	if err == nil && !bytes.Equal(got, golden) {
		err = errors.New("the golden disk has changed")
	}
	return err
}

// node is the URI of a node.
func (d *demo) node(name string) string {
	return (nbd.URI{Network: "unix", Address: d.path("fleet/nbd.sock"), Export: name}).String()
}

// daemon starts the daemon and waits until it is ready.
func (d *demo) daemon() (*server, error) {
	args := []string{"daemon", "--dir", "fleet", "--allow-path", "."}
	fmt.Println("$ dmsnap", strings.Join(args, " "))
	s := &server{cmd: exec.Command(d.binary, args...)}
	s.cmd.Dir, s.cmd.Stderr = d.dir, os.Stderr
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		s.kill()
		return nil, errors.New("the daemon ended before it was ready")
	}
	go io.Copy(io.Discard, out)
	return s, nil
}
