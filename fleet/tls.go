package fleet

import "crypto/tls"

// SetTLS replaces the certificates of the NBD server for clients that connect from now on. The fleet must have been opened
// with some.
func (f *Fleet) SetTLS(config *tls.Config) { f.nbd.SetTLS(config) }
