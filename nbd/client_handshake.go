package nbd

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

const (
	maxOptionReply   = 64 << 10 // bytes of one answer of a server
	maxOptionReplies = 4096     // answers to one option
	maxMinBlock      = 64 << 10 // bytes; the protocol's limit of the minimum block size
)

func newReader(r io.Reader) *bufio.Reader { return bufio.NewReaderSize(r, 64<<10) }

// clientHandshake is a Client's connection before the transmission.
type clientHandshake struct {
	c *Client
	r *bufio.Reader

	tls    *tls.Config // nil: in the clear
	simple bool        // structured replies are not asked for, nor contexts
	flags  uint16      // of the transmission, as the server sent them
}

// run requests everything the client can use and accepts what the server has.
func (h *clientHandshake) run(export string, contexts []string) error {
	if !wire.ValidName(export) {
		return fmt.Errorf("export name %q: longer than %d bytes, or not UTF-8 without NUL", export, wire.MaxName)
	}
	if err := h.greet(); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	if h.tls != nil {
		if err := h.startTLS(); err != nil {
			return err
		}
	}
	if !h.simple {
		err := h.option(wire.OptStructuredReply, nil, nil)
		h.c.structured = err == nil
		if err := missing(err); err != nil {
			return err
		}
	}
	if h.c.structured {
		if err := missing(h.setContexts(export, contexts)); err != nil {
			return err
		}
	}
	if err := h.begin(export); err != nil {
		return err
	}
	if s := h.c.info; s.Size < 0 || s.MaxBlock == 0 {
		return fmt.Errorf("handshake: the server announces blocks of %d bytes, and %d at most a request", s.Size, s.MaxBlock)
	} else if s.MinBlock == 0 || s.MinBlock&(s.MinBlock-1) != 0 || s.MinBlock > maxMinBlock {
		return fmt.Errorf("handshake: the server announces a minimum block size of %d bytes: want a power of two up to %d", s.MinBlock, maxMinBlock)
	}
	return nil
}

// startTLS encrypts the connection, or fails: a client that requires TLS never continues without.
func (h *clientHandshake) startTLS() error {
	if err := h.option(wire.OptStartTLS, nil, nil); err != nil {
		return err
	}
	if h.r.Buffered() > 0 {
		return errors.New("handshake: the server sent data in the clear behind its answer to STARTTLS")
	}
	nc := tls.Client(h.c.nc, h.tls)
	if err := nc.Handshake(); err != nil { // bounded like the whole handshake
		return fmt.Errorf("TLS: %w", err)
	}
	h.c.nc, h.r = nc, h.c.newReader(nc)
	return nil
}

func (h *clientHandshake) greet() error {
	var b [18]byte
	if _, err := io.ReadFull(h.r, b[:]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint16(b[16:])
	if binary.BigEndian.Uint64(b[:]) != wire.MagicServer || binary.BigEndian.Uint64(b[8:]) != wire.MagicOption {
		return errors.New("the peer is no NBD server of the newstyle protocol")
	}
	if flags&wire.FlagFixedNewstyle == 0 {
		return errors.New("the server does not speak the fixed newstyle protocol")
	}
	flags &= wire.FlagFixedNewstyle | wire.FlagNoZeroes
	h.c.noZeroes = flags&wire.FlagNoZeroes != 0
	_, err := h.c.nc.Write(binary.BigEndian.AppendUint32(nil, uint32(flags)))
	return err
}

// A refusedOption is an error reply of the server to an option.
type refusedOption struct {
	option  wire.Option
	reason  wire.OptionReplyType
	message string
}

func (e *refusedOption) Error() string {
	s := fmt.Sprintf("the server refused option %d with error %d", e.option, e.reason&^(1<<31))
	if e.reason == wire.RepErrUnknown {
		s = "the server has no such export"
	}
	if e.message != "" {
		s += fmt.Sprintf(" (%q)", e.message)
	}
	return s
}

// missing drops the error of a server that lacks an option; the client works without it.
func missing(err error) error {
	if refused := (*refusedOption)(nil); errors.As(err, &refused) {
		return nil
	}
	return err
}

// option sends an option and calls each with the replies before the last.
func (h *clientHandshake) option(o wire.Option, data []byte, each func(wire.OptionReplyType, []byte) error) error {
	b := wire.OptionHeader{Magic: wire.MagicOption, Option: o, Length: uint32(len(data))}.Append(nil)
	if _, err := h.c.nc.Write(append(b, data...)); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	for range maxOptionReplies {
		t, data, err := h.optionReply(o)
		switch {
		case err != nil:
			return fmt.Errorf("handshake: %w", err)
		case t == wire.RepAck:
			return nil
		case t.IsError():
			return &refusedOption{o, t, string(data)}
		case each == nil:
			return fmt.Errorf("handshake: unexpected answer %d to option %d", t, o)
		}
		if err := each(t, data); err != nil {
			return fmt.Errorf("handshake: %w", err)
		}
	}
	return fmt.Errorf("handshake: more than %d answers to option %d", maxOptionReplies, o)
}

func (h *clientHandshake) optionReply(o wire.Option) (wire.OptionReplyType, []byte, error) {
	var b [wire.OptionReplySize]byte
	if _, err := io.ReadFull(h.r, b[:]); err != nil {
		return 0, nil, err
	}
	r := wire.DecodeOptionReply(b[:])
	if r.Magic != wire.MagicOptionReply || r.Option != o || r.Length > maxOptionReply {
		return 0, nil, fmt.Errorf("answer to option %d: magic 0x%x, option %d, %d bytes", o, r.Magic, r.Option, r.Length)
	}
	data := make([]byte, r.Length)
	_, err := io.ReadFull(h.r, data)
	return r.Type, data, err
}

func (h *clientHandshake) setContexts(export string, contexts []string) error {
	q := wire.MetaQuery{Export: export, Queries: contexts}
	return h.option(wire.OptSetMetaContext, q.Append(nil), func(t wire.OptionReplyType, data []byte) error {
		m, err := wire.DecodeMetaContext(data)
		if err != nil || t != wire.RepMetaContext {
			return fmt.Errorf("answer of type %d where a meta context belongs: %w", t, err)
		}
		if !slices.Contains(contexts, m.Name) {
			return fmt.Errorf("meta context %q was not asked for", m.Name)
		}
		h.c.ids[m.Name] = m.ID
		return nil
	})
}

// begin starts the transmission: by OptGo, or, with a server that does not know it, by OptExportName.
func (h *clientHandshake) begin(export string) error {
	i := &h.c.info
	i.MinBlock, i.PreferredBlock, i.MaxBlock = 1, 4096, wire.MaxPayload
	seen := false
	q := wire.InfoRequest{Name: export, Types: []wire.InfoType{wire.InfoBlockSize, wire.InfoDescription}}
	err := h.option(wire.OptGo, q.Append(nil), func(t wire.OptionReplyType, data []byte) error {
		if t != wire.RepInfo || len(data) < 2 {
			return fmt.Errorf("answer of type %d and %d bytes where information belongs", t, len(data))
		}
		switch wire.InfoType(binary.BigEndian.Uint16(data)) {
		case wire.InfoExport:
			e, err := wire.DecodeExportInfo(data)
			seen = true
			h.setExport(e)
			return err
		case wire.InfoBlockSize:
			s, err := wire.DecodeBlockSizes(data)
			i.MinBlock, i.PreferredBlock, i.MaxBlock = s.Min, s.Preferred, min(s.Max, wire.MaxPayload)
			return err
		case wire.InfoDescription:
			i.Description = string(data[2:])
		}
		return nil
	})
	if refused := (*refusedOption)(nil); errors.As(err, &refused) && refused.reason == wire.RepErrUnsup {
		return h.exportName(export)
	}
	if err == nil && !seen {
		return errors.New("handshake: the server did not send the export's size")
	}
	return err
}

func (h *clientHandshake) exportName(export string) error {
	b := wire.OptionHeader{Magic: wire.MagicOption, Option: wire.OptExportName, Length: uint32(len(export))}.Append(nil)
	if _, err := h.c.nc.Write(append(b, export...)); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	answer := make([]byte, 10, 134)
	if !h.c.noZeroes {
		answer = answer[:134]
	}
	if _, err := io.ReadFull(h.r, answer); err != nil {
		// OptExportName has no error reply: a server without the export disconnects.
		return fmt.Errorf("handshake: the server closed the connection, perhaps as it has no export %q: %w", export, err)
	}
	h.setExport(wire.ExportInfo{Size: binary.BigEndian.Uint64(answer), Flags: binary.BigEndian.Uint16(answer[8:])})
	return nil
}

func (h *clientHandshake) setExport(e wire.ExportInfo) {
	has := func(flag uint16) bool { return e.Flags&wire.HasFlags != 0 && e.Flags&flag != 0 }
	i := &h.c.info
	h.flags = e.Flags
	i.Size = -1
	if e.Size <= math.MaxInt64 {
		i.Size = int64(e.Size)
	}
	i.ReadOnly, i.CanFlush, i.CanFUA = has(wire.ReadOnly), has(wire.SendFlush), has(wire.SendFUA)
	i.CanTrim, i.CanZero, i.CanFastZero = has(wire.SendTrim), has(wire.SendWriteZeroes), has(wire.SendFastZero)
	i.CanCache, i.MultiConn = has(wire.SendCache), has(wire.CanMultiConn)
}
