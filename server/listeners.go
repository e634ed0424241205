package server

import (
	"fmt"
	"net"
)

// Listeners says where a served disk listens. Sockets that a service manager passed take the place of those that are named.
type Listeners struct {
	Passed  map[string]net.Listener // of PassedListeners
	Without bool                    // no NBD server
	Socket  string                  // unix socket of the NBD server
	Listen  string                  // address of the NBD server on TCP, instead of Socket
	Control string                  // unix socket of the control API; "": none
}

// Check returns the error of what can't be listened on, whatever the machine, before anything is opened.
func (l Listeners) Check() error {
	switch {
	case l.Without || l.Passed["nbd"] != nil:
	case l.Listen != "":
		if err := CheckTCPAddress(l.Listen); err != nil {
			return fmt.Errorf("listen: %w", err)
		}
	default:
		if err := CheckSocketPath(l.Socket); err != nil {
			return err
		}
	}
	if l.Control == "" || l.Passed["control"] != nil {
		return nil
	}
	return CheckSocketPath(l.Control)
}

// Open listens, on all or on none. What is not to be is nil.
func (l Listeners) Open() (clients, control net.Listener, err error) {
	switch clients = l.Passed["nbd"]; {
	case clients != nil || l.Without:
	case l.Listen == "":
		clients, err = ListenUnix(l.Socket)
	default:
		if clients, err = ListenTCP(l.Listen); err != nil {
			err = fmt.Errorf("listen: %w", err)
		}
	}
	if control = l.Passed["control"]; err == nil && control == nil && l.Control != "" {
		control, err = ListenUnix(l.Control)
	}
	if err != nil {
		CloseListeners(clients, control)
		return nil, nil, err
	}
	return clients, control, nil
}

// CloseListeners closes those that are not nil.
func CloseListeners(list ...net.Listener) {
	for _, l := range list {
		if l != nil {
			l.Close()
		}
	}
}
