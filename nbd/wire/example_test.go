package wire_test

import (
	"fmt"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

// A request is encoded, and decoded again.
func Example() {
	b := wire.Request{Magic: wire.MagicRequest, Command: wire.CmdRead, Cookie: 1, Offset: 4096, Length: 512}.Append(nil)
	r := wire.DecodeRequest(b)
	fmt.Println(len(b), r.Magic == wire.MagicRequest, r.Offset, r.Length)
	// Output: 28 true 4096 512
}
