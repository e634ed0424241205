package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/test/kernel/job"
)

// Device-mapper's control device speaks in one structure: a header of 312 bytes, then targets. dmsetup
// says the same things, but in a guest without udev it costs a process per word, and user-mode Linux
// starts processes slowly; the bring-up test holds the two against each other.
const (
	dmDevCreate   = 3
	dmDevRemove   = 4
	dmDevSuspend  = 6 // and resume, by the flag
	dmTableLoad   = 9
	dmTableClear  = 10
	dmTableStatus = 12

	dmFlagSuspend      = 1 << 1
	dmFlagStatusTable  = 1 << 4
	dmFlagSkipLockFS   = 1 << 10
	dmFlagNoFlush      = 1 << 11
	dmHeaderBytes      = 312
	dmTargetBytes      = 40
	dmBufferBytes      = 64 << 10
	dmIoctl            = 0xfd
	dmNameAt           = 48
	dmNodePathTemplate = "/dev/dm-%d"
)

// mapped is the minor number of each mapped device that was created here.
var mapped = map[string]uint32{}

// dmMajor is the major number of mapped devices, known with the first of them.
var dmMajor uint32

// node is the path of a device given as a path or as dm:NAME.
func node(dev string) (string, error) {
	name, ok := strings.CutPrefix(dev, "dm:")
	if !ok {
		return dev, nil
	}
	minor, ok := mapped[name]
	if !ok {
		return "", fmt.Errorf("no mapped device %s", name)
	}
	return fmt.Sprintf(dmNodePathTemplate, minor), nil
}

// numbers replaces each dm:NAME of a table by the device's number.
func numbers(table string) (string, error) {
	words := strings.Split(table, " ")
	for i, w := range words {
		if name, ok := strings.CutPrefix(w, "dm:"); ok {
			minor, ok := mapped[name]
			if !ok {
				return "", fmt.Errorf("no mapped device %s", name)
			}
			words[i] = fmt.Sprintf("%d:%d", dmMajor, minor)
		}
	}
	return strings.Join(words, " "), nil
}

// deviceMapper does the operations on mapped devices. handled is false for others.
func deviceMapper(op job.Op) (r job.Result, handled bool) {
	name := strings.TrimPrefix(op.Dev, "dm:")
	var err error
	switch op.Do {
	case job.Create:
		err = create(name, op.Stdin)
	case job.Load:
		err = load(name, op.Stdin)
	case job.Clear:
		_, err = call(dmTableClear, name, 0, nil, 0)
	case job.Suspend:
		_, err = call(dmDevSuspend, name, dmFlagSuspend|dmFlagSkipLockFS, nil, 0)
	case job.SuspendFS: // as LVM does around a snapshot of a mounted file system
		_, err = call(dmDevSuspend, name, dmFlagSuspend, nil, 0)
	case job.Resume:
		_, err = call(dmDevSuspend, name, 0, nil, 0)
	case job.Remove:
		if _, err = call(dmDevRemove, name, 0, nil, 0); err == nil {
			delete(mapped, name)
		}
	case job.Status:
		r.Out, err = status(name, dmFlagNoFlush)
	case job.Table:
		r.Out, err = status(name, dmFlagStatusTable)
	case job.Number:
		r.Out, err = numbers(op.Dev)
	default:
		return r, false
	}
	r.Err = refusal(err)
	return r, true
}

// create makes a device, loads its table and resumes it. On failure nothing stays.
func create(name, table string) error {
	head, err := call(dmDevCreate, name, 0, nil, 0)
	if err != nil {
		return err
	}
	dev := binary.LittleEndian.Uint64(head[40:])
	dmMajor = uint32(dev >> 8 & 0xfff)
	mapped[name] = uint32(dev&0xff | dev>>12&^0xff)
	if table == "" {
		return nil
	}
	err = load(name, table)
	if err == nil {
		_, err = call(dmDevSuspend, name, 0, nil, 0)
	}
	if err == nil {
		return nil
	}
	delete(mapped, name)
	_, undo := call(dmDevRemove, name, 0, nil, 0)
	return errors.Join(err, undo)
}

// load puts a table, one target a line, into a device's inactive slot.
func load(name, table string) error {
	table, err := numbers(table)
	if err != nil {
		return err
	}
	var targets []byte
	lines := strings.Split(strings.TrimSpace(table), "\n")
	for _, l := range lines {
		var start, length uint64
		var kind string
		if _, err := fmt.Sscan(l, &start, &length, &kind); err != nil {
			return fmt.Errorf("table line %q: %w", l, err)
		}
		arguments := ""
		if words := strings.SplitN(strings.TrimSpace(l), " ", 4); len(words) == 4 {
			arguments = words[3]
		}
		size := (dmTargetBytes + len(arguments) + 1 + 7) &^ 7
		target := make([]byte, size)
		binary.LittleEndian.PutUint64(target, start)
		binary.LittleEndian.PutUint64(target[8:], length)
		binary.LittleEndian.PutUint32(target[20:], uint32(size))
		copy(target[24:39], kind)
		copy(target[dmTargetBytes:], arguments)
		targets = append(targets, target...)
	}
	_, err = call(dmTableLoad, name, 0, targets, len(lines))
	return err
}

// status returns the lines that dmsetup status or dmsetup table prints for a device.
func status(name string, flags uint32) (string, error) {
	reply, err := call(dmTableStatus, name, flags, nil, 0)
	if err != nil {
		return "", err
	}
	at := binary.LittleEndian.Uint32(reply[16:])
	count := binary.LittleEndian.Uint32(reply[20:])
	body := reply[at:]
	var lines []string
	for next := uint32(0); count > 0; count-- {
		t := body[next:]
		text := unix.ByteSliceToString(t[dmTargetBytes:])
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%d %d %s %s", binary.LittleEndian.Uint64(t),
			binary.LittleEndian.Uint64(t[8:]), unix.ByteSliceToString(t[24:40]), text)))
		next = binary.LittleEndian.Uint32(t[20:])
	}
	return strings.Join(lines, "\n"), nil
}

// call is one conversation with the control device.
func call(command uintptr, name string, flags uint32, body []byte, targets int) ([]byte, error) {
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	b := make([]byte, max(dmBufferBytes, dmHeaderBytes+len(body)))
	for i, v := range []uint32{4, 0, 0, uint32(len(b)), dmHeaderBytes, uint32(targets)} {
		binary.LittleEndian.PutUint32(b[4*i:], v)
	}
	binary.LittleEndian.PutUint32(b[28:], flags)
	copy(b[dmNameAt:dmNameAt+127], name)
	copy(b[dmHeaderBytes:], body)
	const readWrite = 3
	request := uintptr(readWrite<<30 | dmHeaderBytes<<16 | dmIoctl<<8 | command)
	_, _, no := unix.Syscall(unix.SYS_IOCTL, control.Fd(), request, uintptr(unsafe.Pointer(&b[0])))
	if no != 0 {
		return nil, no
	}
	return b, nil
}
