package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/nbdkernel"
)

// attachedDevices returns why the kernel's NBD devices can't be listed here.
func attachedDevices() error {
	_, err := nbdkernel.List()
	return err
}

// tested is for callings that have a test of their own.
func tested(by string) func() error {
	return func() error { return errors.New("what it needs is made by " + by) }
}

// What attach and detach refuse before they ask the kernel, and that they say what is missing without its module.
func TestAttachRefuses(t *testing.T) {
	for args, says := range map[string]string{
		"attach":                            "arg",
		"attach --list nbd://x":             "arg",
		"attach nbd://x /dev/nbd0 more":     "arg",
		"attach nbd://x /dev/sda":           "/dev/sda: not the path of an NBD device, /dev/nbdN",
		"attach nbd://x /dev/nbd0p1":        "not the path of an NBD device",
		"attach nbd://x --timeout eternity": "invalid",
		"detach":                            "arg",
		"detach /dev/null":                  "not the path of an NBD device",
	} {
		o := dmsnap(strings.Fields(args)...)
		if o.status != exitTrouble || !strings.Contains(o.stderr, says) {
			t.Errorf("%s: status %d, %q", args, o.status, o.stderr)
		}
	}
	if err := attachedDevices(); !errors.Is(err, errors.ErrUnsupported) {
		t.Skip("the kernel has its NBD client: ", err)
	}
	for _, args := range []string{"attach nbd://localhost/x", "attach --list", "detach /dev/nbd0"} {
		if o := dmsnap(strings.Fields(args)...); o.status != exitTrouble || !strings.Contains(o.stderr, "modprobe nbd") {
			t.Errorf("%s: status %d, %q", args, o.status, o.stderr)
		}
	}
}
