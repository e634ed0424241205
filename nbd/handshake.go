package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/dmsnap/dmsnap/nbd/wire"
)

const (
	maxOption  = 64 << 10 // bytes of an option's data that are read
	maxSkipped = 1 << 20  // bytes of one that are skipped with an error reply; more disconnects the client
	maxOptions = 4096     // options in a handshake
)

const noExport = "there is no such export" // for clients

// metaContext is a context that the client chose, under the number that block status replies carry.
type metaContext struct {
	id     uint32
	name   string
	status ContextFunc // of the export that is served
}

// handshake is a connection before the transmission.
type handshake struct {
	server   *Server
	ctx      context.Context // of the server
	nc       net.Conn        // encrypted once secure is set
	deadline time.Time       // of the whole handshake
	w        *bufio.Writer
	r        *bufio.Reader

	client     ClientInfo
	secure     bool
	readOnly   bool // the client may not change the export that is served
	noZeroes   bool
	structured bool
	contextsOf string // the export for which contexts were chosen, as the client named it
	contexts   []metaContext

	opened *export // by Options.Open, the last one
	close  func()  // of it
}

func newHandshake(ctx context.Context, s *Server, nc net.Conn) *handshake {
	h := &handshake{server: s, ctx: ctx, client: ClientInfo{Addr: nc.LocalAddr()}}
	h.attach(nc)
	return h
}

// setDeadline sets the deadline of the handshake, unless the server ends: then it has passed.
func (h *handshake) setDeadline(at time.Time) {
	h.deadline = at
	h.nc.SetDeadline(at)
	if h.ctx.Err() != nil { // it may have ended just before
		h.nc.SetDeadline(time.Now())
	}
}

// attach makes nc the connection that is read and written.
func (h *handshake) attach(nc net.Conn) {
	h.nc, h.r, h.w = nc, newReader(nc), bufio.NewWriterSize(nc, 4<<10)
}

// run sends the greeting and answers the client's options. It returns the export to serve, or nil when the client ended
// the connection in an orderly way.
func (h *handshake) run() (*export, error) {
	hello := binary.BigEndian.AppendUint64(nil, wire.MagicServer)
	hello = binary.BigEndian.AppendUint64(hello, wire.MagicOption)
	hello = binary.BigEndian.AppendUint16(hello, wire.FlagFixedNewstyle|wire.FlagNoZeroes)
	if err := h.send(hello); err != nil {
		return nil, err
	}
	var b [4]byte
	if _, err := io.ReadFull(h.r, b[:]); err != nil {
		return nil, ended(err)
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^(wire.FlagFixedNewstyle|wire.FlagNoZeroes) != 0 {
		return nil, fmt.Errorf("handshake: unknown client flags 0x%x", flags)
	}
	h.noZeroes = flags&wire.FlagNoZeroes != 0
	for range maxOptions {
		e, done, err := h.option()
		if done || err != nil {
			return e, err
		}
	}
	return nil, fmt.Errorf("handshake: more than %d options", maxOptions)
}

// ended turns the end of the stream between messages into an orderly end.
func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// option answers one option. done: the transmission begins with e, or the connection ends without one.
func (h *handshake) option() (e *export, done bool, err error) {
	var b [wire.OptionHeaderSize]byte
	if _, err := io.ReadFull(h.r, b[:]); err != nil {
		return nil, true, ended(err)
	}
	o := wire.DecodeOptionHeader(b[:])
	if o.Magic != wire.MagicOption {
		return nil, true, fmt.Errorf("handshake: option magic is 0x%x", o.Magic)
	}
	if o.Length > maxOption {
		if o.Length > maxSkipped || o.Option == wire.OptExportName {
			return nil, true, fmt.Errorf("handshake: option %d of %d bytes", o.Option, o.Length)
		}
		if _, err := io.CopyN(io.Discard, h.r, int64(o.Length)); err != nil {
			return nil, true, err
		}
		return nil, false, h.refuse(o.Option, wire.RepErrTooBig, "option is too long")
	}
	data := make([]byte, o.Length)
	if _, err := io.ReadFull(h.r, data); err != nil {
		return nil, true, err
	}
	return h.answer(o.Option, data)
}

// answer has a case for every option.
func (h *handshake) answer(o wire.Option, data []byte) (e *export, done bool, err error) {
	if h.mustEncrypt(o) {
		if o == wire.OptExportName {
			return nil, true, errors.New("handshake: EXPORT_NAME without TLS")
		}
		return nil, false, h.refuse(o, wire.RepErrTLSRequired, "TLS comes first")
	}
	switch o {
	case wire.OptExportName:
		e, err := h.exportName(string(data))
		return e, true, err
	case wire.OptAbort:
		h.reply(o, wire.RepAck, nil) // a client that aborts need not wait for the reply
		return nil, true, nil
	case wire.OptStartTLS:
		err := h.startTLS(data)
		return nil, err != nil, err
	case wire.OptList:
		return nil, false, h.list(data)
	case wire.OptInfo:
		_, err := h.info(o, data)
		return nil, false, err
	case wire.OptGo:
		e, err := h.info(o, data)
		return e, e != nil, err
	case wire.OptStructuredReply:
		if len(data) > 0 {
			return nil, false, h.refuse(o, wire.RepErrInvalid, "no data expected")
		}
		h.structured = true
		return nil, false, h.reply(o, wire.RepAck, nil)
	case wire.OptListMetaContext, wire.OptSetMetaContext:
		return nil, false, h.metaContexts(o, data)
	}
	return nil, false, h.refuse(o, wire.RepErrUnsup, "option is not supported")
}

// exportName answers OptExportName, which has no error reply.
func (h *handshake) exportName(name string) (*export, error) {
	e, allowed := h.find(name)
	if !allowed {
		return nil, fmt.Errorf("handshake: the client has no right to export %q", name)
	}
	if e == nil {
		return nil, fmt.Errorf("handshake: no export %q", name)
	}
	h.settle(name, e)
	b := binary.BigEndian.AppendUint64(nil, uint64(e.Device.Size()))
	b = binary.BigEndian.AppendUint16(b, e.flags(h.structured, h.readOnly))
	if !h.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	return e, h.send(b)
}

func (h *handshake) list(data []byte) error {
	if len(data) > 0 {
		return h.refuse(wire.OptList, wire.RepErrInvalid, "no data expected")
	}
	for _, name := range h.server.Names() {
		e, _ := h.find(name)
		if e == nil {
			continue // removed meanwhile, or not for this client
		}
		if err := h.append(wire.OptList, wire.RepServer, wire.AppendServer(nil, name, e.Description)); err != nil {
			return err
		}
	}
	return h.reply(wire.OptList, wire.RepAck, nil)
}

// info answers OptInfo and OptGo, and returns the export when there is one.
func (h *handshake) info(o wire.Option, data []byte) (*export, error) {
	r, err := wire.DecodeInfoRequest(data)
	if err != nil {
		return nil, h.refuse(o, wire.RepErrInvalid, err.Error())
	}
	e, allowed := h.find(r.Name)
	if e == nil {
		return nil, h.refuseExport(o, r.Name, allowed)
	}
	infos := [][]byte{
		wire.ExportInfo{Size: uint64(e.Device.Size()), Flags: e.flags(h.structured, h.readOnly)}.Append(nil),
		e.blockSizes().Append(nil),
	}
	if slices.Contains(r.Types, wire.InfoName) {
		infos = append(infos, append(binary.BigEndian.AppendUint16(nil, uint16(wire.InfoName)), e.Name...))
	}
	if slices.Contains(r.Types, wire.InfoDescription) && e.Description != "" {
		infos = append(infos, append(binary.BigEndian.AppendUint16(nil, uint16(wire.InfoDescription)), e.Description...))
	}
	for _, i := range infos {
		if err := h.append(o, wire.RepInfo, i); err != nil {
			return nil, err
		}
	}
	if o == wire.OptGo {
		h.settle(r.Name, e)
	}
	return e, h.reply(o, wire.RepAck, nil)
}

// settle drops contexts that were chosen for another export than the one that is served, or that the export no longer
// has.
func (h *handshake) settle(name string, e *export) {
	if h.contextsOf != name {
		h.contexts = nil
	}
	if len(h.contexts) == 0 {
		return
	}
	all := e.contexts()
	for i := range h.contexts {
		h.contexts[i].status = all[h.contexts[i].name]
	}
	h.contexts = slices.DeleteFunc(h.contexts, func(c metaContext) bool { return c.status == nil })
}

// metaContexts answers OptListMetaContext, and OptSetMetaContext, which replaces the choice made before.
func (h *handshake) metaContexts(o wire.Option, data []byte) error {
	set := o == wire.OptSetMetaContext
	if set {
		h.contexts, h.contextsOf = nil, ""
	}
	if !h.structured {
		return h.refuse(o, wire.RepErrInvalid, "structured replies come first")
	}
	q, err := wire.DecodeMetaQuery(data)
	if err != nil {
		return h.refuse(o, wire.RepErrInvalid, err.Error())
	}
	if i := slices.IndexFunc(q.Queries, func(s string) bool { return !strings.Contains(s, ":") }); i >= 0 {
		return h.refuse(o, wire.RepErrInvalid, "query without a namespace")
	}
	e, allowed := h.find(q.Export)
	if e == nil {
		return h.refuseExport(o, q.Export, allowed)
	}
	names := slices.Sorted(maps.Keys(e.contexts()))
	for i, name := range names {
		if !asked(name, q.Queries, set) {
			continue
		}
		c := metaContext{id: uint32(i + 1), name: name}
		listed := wire.MetaContext{Name: name}
		if set {
			h.contexts = append(h.contexts, c)
			listed.ID = c.id
		}
		if err := h.append(o, wire.RepMetaContext, listed.Append(nil)); err != nil {
			return err
		}
	}
	h.contextsOf = q.Export
	return h.reply(o, wire.RepAck, nil)
}

// asked reports whether one of the queries names the context. In a list no query at all means every
// context, and a query may stop after the colon to mean a namespace.
func asked(name string, queries []string, set bool) bool {
	if !set && len(queries) == 0 {
		return true
	}
	for _, q := range queries {
		if q == name || !set && strings.HasSuffix(q, ":") && strings.HasPrefix(name, q) {
			return true
		}
	}
	return false
}

// append queues an answer; reply also sends what is queued; refuse is an error with a message for people.
func (h *handshake) append(o wire.Option, t wire.OptionReplyType, data []byte) error {
	r := wire.OptionReply{Magic: wire.MagicOptionReply, Option: o, Type: t, Length: uint32(len(data))}
	if _, err := h.w.Write(r.Append(nil)); err != nil {
		return err
	}
	_, err := h.w.Write(data)
	return err
}

func (h *handshake) reply(o wire.Option, t wire.OptionReplyType, data []byte) error {
	if err := h.append(o, t, data); err != nil {
		return err
	}
	return h.w.Flush()
}

func (h *handshake) refuse(o wire.Option, t wire.OptionReplyType, why string) error {
	return h.reply(o, t, []byte(why))
}

func (h *handshake) send(b []byte) error {
	if _, err := h.w.Write(b); err != nil {
		return err
	}
	return h.w.Flush()
}
