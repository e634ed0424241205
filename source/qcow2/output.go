package qcow2

import ()

// An output is written from its beginning to its end.
type output struct {
	dst Target
	at  int64 // byte of dst where buf belongs
	buf []byte
}

func (o *output) position() int64 { return o.at + int64(len(o.buf)) }

// align moves on to a multiple of n.
func (o *output) align(n int64) error {
	gap := -o.position() & (n - 1)
	if gap <= padBytes {
		return o.write(make([]byte, gap))
	}
	if err := o.flush(); err != nil {
		return err
	}
	o.at += gap
	return nil
}

func (o *output) write(p []byte) error {
	if len(o.buf)+len(p) > bufferBytes {
		if err := o.flush(); err != nil {
			return err
		}
	}
	if len(p) >= bufferBytes {
		_, err := o.dst.WriteAt(p, o.at)
		o.at += int64(len(p))
		return err
	}
	o.buf = append(o.buf, p...)
	return nil
}

func (o *output) flush() error {
	if len(o.buf) == 0 {
		return nil
	}
	_, err := o.dst.WriteAt(o.buf, o.at)
	o.at, o.buf = o.at+int64(len(o.buf)), o.buf[:0]
	return err
}
