package nbd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/nbd/wire"
)

// A call is a request in flight. Until the goroutine that reads replies ends it, nothing else uses it or the caller's
// buffer.
type call struct {
	request wire.Request
	into    []byte         // where the data of a READ goes
	covered ranges         // of into, filled in so far
	status  bool           // BLOCK_STATUS is asked,
	want    uint32         // in this context
	extents []block.Extent // from the server
	err     error          // an error from the server
	ended   chan error     // buffered
}

// do sends a request and waits until it has been answered.
func (c *Client) do(cmd wire.Command, flags wire.CommandFlags, off int64, n uint32, payload []byte, k *call) error {
	k.ended = make(chan error, 1)
	k.request = wire.Request{Magic: wire.MagicRequest, Flags: flags, Command: cmd, Offset: uint64(off), Length: n}
	if err := c.register(k); err != nil {
		return err
	}
	if err := c.send(k.request, payload); err != nil {
		c.fail(fmt.Errorf("send request: %w", err))
	}
	return <-k.ended
}

func (c *Client) register(k *call) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	c.cookie++
	k.request.Cookie = c.cookie
	c.calls[c.cookie] = k
	if len(c.calls) == 1 { // a read that waits for the server has no bound yet
		c.await(c.nc)
	}
	return nil
}

// send sends a request, unless one was sent in part before: the server would read this one as the rest of its payload.
func (c *Client) send(r wire.Request, payload []byte) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	if c.torn {
		return net.ErrClosed
	}
	c.boundSend(r, payload)
	v := append(c.vectors[:0], r.Append(c.head[:0]))
	if len(payload) > 0 {
		v = append(v, payload)
	}
	c.vectors = v
	_, err := v.WriteTo(c.nc)
	c.torn = err != nil
	clear(c.vectors) // the payload is the caller's
	return err
}

// lostConnection is why a connection ended. What the server did not deliver for it is block.ErrUnavailable, too.
type lostConnection struct{ error }

func (l lostConnection) Unwrap() error { return l.error }

func (l lostConnection) Is(target error) bool { return target == block.ErrUnavailable }

// fail ends the connection; receive then ends the calls.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = lostConnection{err}
	}
	c.mu.Unlock()
	c.nc.Close()
}

// receive reads replies until the connection ends, and then ends all calls. Only receive ends calls, so that the buffer
// of an ended call is not written any more.
func (c *Client) receive(r *bufio.Reader) {
	defer close(c.ended)
	for {
		if err := c.reply(r); err != nil {
			c.fail(fmt.Errorf("read reply: %w", err))
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.calls {
		k.ended <- c.err
	}
	c.calls = nil
}

// reply reads one simple reply or one chunk. An error means that the stream has ended or violates the protocol.
func (c *Client) reply(r *bufio.Reader) error {
	head, err := r.Peek(wire.SimpleSize) // the shorter of the two
	if err != nil {
		return err
	}
	switch magic := binary.BigEndian.Uint32(head); {
	case magic == wire.MagicSimple:
		s := wire.DecodeSimple(head)
		r.Discard(wire.SimpleSize)
		return c.simpleReply(r, s)
	case magic == wire.MagicChunk && c.structured:
		if head, err = r.Peek(wire.ChunkSize); err != nil {
			return err
		}
		h := wire.DecodeChunk(head)
		r.Discard(wire.ChunkSize)
		return c.chunk(r, h)
	default:
		return fmt.Errorf("reply magic is 0x%08x", magic)
	}
}

func (c *Client) find(cookie uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.calls[cookie]
	if k == nil {
		return nil, fmt.Errorf("reply to a request that was not made (cookie %d)", cookie)
	}
	return k, nil
}

func (c *Client) end(k *call, err error) {
	c.mu.Lock()
	delete(c.calls, k.request.Cookie)
	c.mu.Unlock()
	k.ended <- err
}

func (c *Client) simpleReply(r *bufio.Reader, s wire.Simple) error {
	k, err := c.find(s.Cookie)
	if err != nil {
		return err
	}
	switch {
	case s.Error != 0:
		c.end(k, &RemoteError{Errno: s.Error})
		return nil
	case k.status || k.into != nil && c.structured:
		return errors.New("simple reply where a structured one belongs")
	}
	if _, err := io.ReadFull(r, k.into); err != nil {
		return err
	}
	c.end(k, nil)
	return nil
}

// maxStatus is the longest payload of a block status chunk that is read, in bytes: a million descriptors.
const maxStatus = 8 << 20

// chunk reads one chunk, and ends the call when it is the last.
func (c *Client) chunk(r *bufio.Reader, h wire.Chunk) error {
	k, err := c.find(h.Cookie)
	if err != nil {
		return err
	}
	done := h.Flags&wire.ChunkDone != 0
	switch {
	case h.Type == wire.ChunkNone && h.Length == 0 && done:
	case h.Type == wire.ChunkOffsetData && k.into != nil:
		err = k.data(r, h)
	case h.Type == wire.ChunkOffsetHole && k.into != nil && h.Length == 12:
		err = k.hole(r)
	case h.Type == wire.ChunkBlockStatus && k.status && h.Length <= maxStatus:
		err = k.blockStatus(r, h)
	case h.Type.IsError() && h.Length <= 64<<10:
		err = k.failed(r, h)
	default:
		err = fmt.Errorf("chunk of type %d and %d bytes does not belong there", h.Type, h.Length)
	}
	if err != nil || !done {
		return err
	}
	if k.err == nil {
		if k.into != nil && k.covered.bytes() != len(k.into) {
			return fmt.Errorf("the reply to a read of %d bytes has %d", len(k.into), k.covered.bytes())
		}
		if k.status && len(k.extents) == 0 {
			return errors.New("the reply to a block status has none")
		}
	}
	c.end(k, k.err)
	return nil
}

func (k *call) data(r *bufio.Reader, h wire.Chunk) error {
	if h.Length <= 8 {
		return errors.New("data chunk without data")
	}
	head, err := r.Peek(8)
	if err != nil {
		return err
	}
	off := wire.DecodeOffset(head)
	r.Discard(8)
	p, err := k.part(off, h.Length-8)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(r, p)
	return err
}

func (k *call) hole(r *bufio.Reader) error {
	var b [12]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return err
	}
	off, n, err := wire.DecodeHole(b[:])
	if err != nil {
		return err
	}
	p, err := k.part(off, n)
	clear(p)
	return err
}

// part returns the part of the caller's buffer that a chunk may fill, once.
func (k *call) part(off uint64, n uint32) ([]byte, error) {
	at := off - k.request.Offset
	if size := uint64(len(k.into)); off < k.request.Offset || n == 0 || at > size || uint64(n) > size-at {
		return nil, fmt.Errorf("%d bytes at byte %d answer a read of %d at byte %d", n, off, size, k.request.Offset)
	}
	if !k.covered.add(int(at), int(n)) {
		return nil, errors.New("chunks of a reply overlap, or are too many and too scattered")
	}
	return k.into[at : at+uint64(n)], nil
}

func (k *call) blockStatus(r *bufio.Reader, h wire.Chunk) error {
	b := make([]byte, h.Length)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	id, ds, err := wire.DecodeBlockStatus(b)
	if err != nil || id != k.want {
		return err // the other contexts of the connection are reported, too
	}
	if k.extents != nil {
		return errors.New("a context's block status was sent twice")
	}
	left := int64(k.request.Length)
	for _, d := range ds {
		if d.Length == 0 || left == 0 {
			return errors.New("a block status has an empty descriptor, or one behind the range")
		}
		n := min(int64(d.Length), left) // the last may extend past the range
		left -= n
		k.extents = append(k.extents, block.Extent{Length: n, Flags: block.ExtentFlags(d.Flags)})
	}
	return nil
}

func (k *call) failed(r *bufio.Reader, h wire.Chunk) error {
	b := make([]byte, h.Length)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	errno, message, err := wire.DecodeError(b)
	if err == nil && k.err == nil {
		k.err = &RemoteError{errno, message}
	}
	return err
}

// ranges is a set of bytes as sorted ranges; adjacent ones are joined.
type ranges []span

type span struct{ off, end int }

// maxRanges bounds the memory a set takes. Replies in order, the usual kind, need one range.
const maxRanges = 4096

// add adds n > 0 bytes at off, unless some of them are in the set, or it has too many gaps.
func (s *ranges) add(off, n int) bool {
	end := off + n
	i, _ := slices.BinarySearchFunc(*s, off, func(x span, off int) int { return x.off - off })
	// i is the first that begins at or after off.
	if i < len(*s) && (*s)[i].off < end || i > 0 && (*s)[i-1].end > off {
		return false
	}
	before, behind := i > 0 && (*s)[i-1].end == off, i < len(*s) && (*s)[i].off == end
	switch {
	case before && behind:
		(*s)[i-1].end = (*s)[i].end
		*s = slices.Delete(*s, i, i+1)
	case before:
		(*s)[i-1].end = end
	case behind:
		(*s)[i].off = off
	case len(*s) == maxRanges:
		return false
	default:
		*s = slices.Insert(*s, i, span{off, end})
	}
	return true
}

func (s ranges) bytes() int {
	n := 0
	for _, x := range s {
		n += x.end - x.off
	}
	return n
}
