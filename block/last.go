package block

import "errors"

// A LastWriter can make one more write durable after a Flush has failed, although every other flush goes on failing.
// WriteLastAt writes p at off and flushes, whatever failed before. Success says that p is durable, and nothing about
// any other write: a device that failed a Flush still fails every later Flush and WriteDurableAt. ErrUnsupported, with
// nothing changed, means that the device can't do this.
//
// It is for the mark that declares a failed device invalid.
type LastWriter interface {
	WriteLastAt(p []byte, off int64) error
}

// WriteLast writes p at off and returns when it is durable; see [LastWriter]. A device without the
// ability gets a write and a Flush, which fails where an earlier one did.
func WriteLast(dev Device, p []byte, off int64) error {
	if d, ok := dev.(LastWriter); ok {
		if err := d.WriteLastAt(p, off); !errors.Is(err, ErrUnsupported) {
			return err
		}
	}
	if _, err := dev.WriteAt(p, off); err != nil {
		return err
	}
	return dev.Flush()
}

// WriteLastAt writes p at off by pwrite and fdatasync, also after a failed Flush, which stays failed: the kernel
// reports lost writes once to each open file, so this fdatasync reports on p.
func (f *File) WriteLastAt(p []byte, off int64) error {
	if err := f.enterChange("write", off, int64(len(p))); err != nil {
		return err
	}
	defer f.life.RUnlock()
	// A concurrent Flush could consume the kernel's report of a failure of p, so none may run during this write.
	f.syncs.Lock()
	defer f.syncs.Unlock()
	var err error
	for range 2 { // the first failure may be the report of an older write, after which p is written again
		if _, err = f.write(p, off); err != nil {
			return err
		}
		if err = f.datasync(); err == nil {
			return nil
		}
		f.failed.CompareAndSwap(nil, &err)
	}
	return err
}
