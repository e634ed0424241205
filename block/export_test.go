package block

// Abilities for tests, which make a File behave as if its file system lacked one.
const (
	DsyncWrite = dsyncWrite
	PunchHole  = punchHole
	ZeroRange  = zeroRange
)

// Forget makes f behave as if abilities were lacking.
func (f *File) Forget(lacking ...ability) {
	for _, a := range lacking {
		f.lacks[a].Store(true)
	}
}

// Synced runs a call as Flush and WriteDurableAt do.
func (f *File) Synced(call func() error) error { return f.synced(call) }

// WriteDurableBy is WriteDurableAt with another system call that writes durably.
func (f *File) WriteDurableBy(p []byte, off int64, dsync func([]byte, int64) (int, error)) error {
	return f.writeDurable(p, off, dsync)
}
