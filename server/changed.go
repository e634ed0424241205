package server

import "github.com/dmsnap/dmsnap/block"

// A Cacher is Files whose content the kernel may cache: it is notified of what changed other than by its own requests. Changed drops what is
// cached of n bytes at off of a file, if there is one; from the start if n is 0. It may wait for requests to that file.
type Cacher interface {
	Files
	Cached() bool
	Changed(name string, off, n int64)
}

// cacher returns Files whose content is cached, or nil.
func (s *Server) cacher() Cacher {
	if c, ok := s.opts.Files.(Cacher); ok && c.Cached() {
		return c
	}
	return nil
}

// A changing device calls changed after each change of its content, before the change is acknowledged.
type changing struct {
	block.Forward
	changed func(off, n int64)
}

func (c *changing) WriteAt(p []byte, off int64) (int, error) {
	n, err := c.Forward.WriteAt(p, off)
	c.changed(off, int64(len(p)))
	return n, err
}

func (c *changing) WriteDurableAt(p []byte, off int64) error {
	err := c.Forward.WriteDurableAt(p, off)
	c.changed(off, int64(len(p)))
	return err
}

func (c *changing) WriteLastAt(p []byte, off int64) error {
	err := c.Forward.WriteLastAt(p, off)
	c.changed(off, int64(len(p)))
	return err
}

func (c *changing) ZeroAt(off, n int64, flags block.ZeroFlags) error {
	err := c.Forward.ZeroAt(off, n, flags)
	c.changed(off, n)
	return err
}

func (c *changing) Discard(off, n int64) error {
	err := c.Forward.Discard(off, n)
	c.changed(off, n)
	return err
}

// withCache returns the devices of an export for transports and for Files that are cached.
func (s *Server) withCache(c Cacher, name string, dev block.Device) (served, file block.Device) {
	served = &changing{block.NewForward(dev), func(off, n int64) {
		c.Changed(name, off, n)
		s.changedElsewhere(c, name, off, n)
	}}
	return served, &changing{block.NewForward(dev), func(off, n int64) { s.changedElsewhere(c, name, off, n) }}
}

// changedElsewhere drops what is cached of other files that show the same disk: from the start of its live merge on a snapshot's
// file shows the origin. It does not wait: two files could wait for each other.
func (s *Server) changedElsewhere(c Cacher, name string, off, n int64) {
	merged := s.merged.Load()
	if merged == nil {
		return
	}
	same := append([]string{s.name}, *merged...)
	for _, other := range same {
		if other == name {
			go func() {
				for _, other := range same {
					if other != name {
						c.Changed(other, off, n)
					}
				}
			}()
			return
		}
	}
}

// originReplaced drops what is cached of the origin's file: a live merge of a snapshot has begun, and the origin shows its content. mu
// is held.
func (s *Server) originReplaced(name string) {
	list := []string{name}
	if old := s.merged.Load(); old != nil {
		list = append(list, *old...)
	}
	s.merged.Store(&list)
	if c := s.cacher(); c != nil && s.exported {
		c.Changed(s.name, 0, 0)
	}
}
