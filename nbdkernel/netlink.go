package nbdkernel

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"syscall"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The generic netlink family "nbd" (linux/nbd-netlink.h):
//
//	CONNECT      {INDEX u32?, SIZE u64, BLOCK_SIZE u64, TIMEOUT u64 s?, DEAD_CONN_TIMEOUT u64 s?, SERVER_FLAGS u64, CLIENT_FLAGS u64,
//	              BACKEND_IDENTIFIER string, SOCKETS { SOCK_ITEM { SOCK_FD u32 } ... }}   → CONNECT {INDEX u32}
//	DISCONNECT   {INDEX u32}                                                             → acknowledgement
//	STATUS       {INDEX u32?}                                                            → STATUS {DEVICE_LIST { DEVICE_ITEM
//	                                                                                        { DEVICE_INDEX u32, DEVICE_CONNECTED u8 } ... }}
const (
	familyName    = "nbd"
	familyVersion = 1

	cmdConnect, cmdDisconnect, cmdStatus = 1, 2, 5

	attrIndex, attrSize, attrBlockSize, attrTimeout, attrServerFlags, attrClientFlags, attrSockets = 1, 2, 3, 4, 5, 6, 7
	attrDeadTimeout, attrDeviceList, attrBackend                                                   = 8, 9, 10

	itemOfList                           = 1 // NBD_SOCK_ITEM, NBD_DEVICE_ITEM
	attrSocketFD                         = 1
	attrDeviceIndex, attrDeviceConnected = 1, 2
)

// kernel is a connection to the kernel's NBD client.
type kernel struct {
	*genetlink.Conn
	family uint16
}

// dialKernel connects to the kernel; the error says what is missing.
func dialKernel() (*kernel, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("the kernel's NBD client can't be reached: %w", err)
	}
	f, err := c.GetFamily(familyName)
	if err != nil {
		c.Close()
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("the kernel has no NBD client: load its module as root by \"modprobe nbd\": %w", errors.ErrUnsupported)
		}
		return nil, fmt.Errorf("the kernel's NBD client can't be reached: %w", err)
	}
	return &kernel{c, f.ID}, nil
}

// do sends a command and returns the answers.
func (k *kernel) do(command uint8, flags netlink.HeaderFlags, attributes *netlink.AttributeEncoder) ([]genetlink.Message, error) {
	data, err := attributes.Encode()
	if err != nil {
		return nil, err
	}
	m := genetlink.Message{Header: genetlink.Header{Command: command, Version: familyVersion}, Data: data}
	return k.Execute(m, k.family, netlink.Request|flags)
}

// refused explains an error of the kernel for a device.
func refused(index int, err error) error {
	device := fmt.Sprintf("/dev/nbd%d", index)
	if index == AnyIndex {
		device = "attach"
	}
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: permission denied: root, or CAP_SYS_ADMIN, is required: %w", device, fs.ErrPermission)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%s: the device is in use", device)
	}
	var op *netlink.OpError // its text repeats what was called
	if errno := syscall.Errno(0); errors.As(err, &op) && errors.As(err, &errno) {
		err = errno
	}
	return fmt.Errorf("%s: the kernel refuses: %w", device, err)
}

// encode returns the attributes of CONNECT. fds are those of the sockets.
func (c configuration) encode(fds []int) *netlink.AttributeEncoder {
	e := netlink.NewAttributeEncoder()
	if c.index != AnyIndex {
		e.Uint32(attrIndex, uint32(c.index))
	}
	e.Uint64(attrSize, uint64(c.size))
	e.Uint64(attrBlockSize, uint64(c.blockSize))
	if c.timeout > 0 {
		e.Uint64(attrTimeout, seconds(c.timeout))
	}
	if c.deadTimeout > 0 {
		e.Uint64(attrDeadTimeout, seconds(c.deadTimeout))
	}
	e.Uint64(attrServerFlags, uint64(c.flags))
	e.Uint64(attrClientFlags, 0)
	e.String(attrBackend, c.backend)
	e.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
		for _, fd := range fds {
			list.Nested(itemOfList, func(item *netlink.AttributeEncoder) error {
				item.Uint32(attrSocketFD, uint32(fd))
				return nil
			})
		}
		return nil
	})
	return e
}

// connect makes a device and returns its index.
func (k *kernel) connect(c configuration) (index int, err error) {
	var fds []int
	for _, t := range c.sockets {
		f, err := fileOf(t.Conn)
		if err != nil {
			return 0, err
		}
		defer f.Close() // after the kernel has taken its reference
		fds = append(fds, int(f.Fd()))
	}
	answers, err := k.do(cmdConnect, 0, c.encode(fds)) // without an acknowledgement, the only message is the answer or an error
	if err != nil {
		return 0, refused(c.index, err)
	}
	for _, m := range answers {
		d, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return 0, err
		}
		for d.Next() {
			if d.Type() == attrIndex {
				return int(d.Uint32()), d.Err()
			}
		}
	}
	return 0, errors.New("the kernel attached a device and does not say which")
}

// disconnect ends a device. Requests to it fail.
func (k *kernel) disconnect(index int) error {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(index))
	if _, err := k.do(cmdDisconnect, netlink.Acknowledge, e); err != nil {
		return refused(index, err)
	}
	return nil
}

// connected returns the indices of the devices that are attached, of one or of all, in order.
func (k *kernel) connected(index int) ([]int, error) {
	e := netlink.NewAttributeEncoder()
	if index != AnyIndex {
		e.Uint32(attrIndex, uint32(index))
	}
	answers, err := k.do(cmdStatus, 0, e)
	if err != nil {
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) { // there is no such device
			return nil, nil
		}
		return nil, refused(index, err)
	}
	var list []int
	for _, m := range answers {
		if list, err = decodeStatus(list, m.Data); err != nil {
			return nil, fmt.Errorf("the kernel's answer: %w", err)
		}
	}
	slices.Sort(list)
	return list, nil
}

// decodeStatus appends the indices of the attached devices in an answer.
func decodeStatus(list []int, data []byte) ([]int, error) {
	d, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return nil, err
	}
	for d.Next() {
		if d.Type() != attrDeviceList {
			continue
		}
		d.Nested(func(items *netlink.AttributeDecoder) error {
			for items.Next() {
				items.Nested(func(item *netlink.AttributeDecoder) error {
					index, connected := -1, false
					for item.Next() {
						switch item.Type() {
						case attrDeviceIndex:
							index = int(item.Uint32())
						case attrDeviceConnected:
							connected = item.Uint8() != 0
						}
					}
					if connected && index >= 0 {
						list = append(list, index)
					}
					return item.Err()
				})
			}
			return items.Err()
		})
	}
	return list, d.Err()
}
