package ondemand

// WaitBackground waits until everything was prefetched.
func (d *Disk) WaitBackground() { d.background.Wait() }
