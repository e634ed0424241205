package blocktest

import "github.com/dmsnap/dmsnap/block"

// Plain returns dev without its optional abilities, so that the functions of package block use their substitutes.
func Plain(dev block.Device) block.Device { return plain{dev} }

type plain struct {
	block.Device // the four methods alone, on purpose
}
