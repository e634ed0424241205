package block

// Abilities for tests, which make a File believe that its file system lacks one.
const (
	DsyncWrite = dsyncWrite
	PunchHole  = punchHole
	ZeroRange  = zeroRange
)

// Forget makes f believe that abilities are lacking.
func (f *File) Forget(lacking ...ability) {
	for _, a := range lacking {
		f.lacks[a].Store(true)
	}
}

// Synced runs a call as Flush and WriteDurableAt do.
func (f *File) Synced(call func() error) error { return f.synced(call) }
