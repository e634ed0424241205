package block

// KeepCache returns dev, without its cache being dropped (see [CacheDropper]): for readers that report what is there now, of a store with
// millions of exceptions in a fraction of the time. After a failed flush they see what is not on the disk. Nothing may be
// written on the strength of what they read.
func KeepCache(dev Device) Device { return keptCache{NewForward(dev)} }

type keptCache struct{ Forward }

// DropCache does nothing.
func (keptCache) DropCache(off, n int64) error { return nil }
