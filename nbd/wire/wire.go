// Package wire has the bytes of the NBD protocol: its numbers, and each message as plain encode and decode. It does no I/O;
// packages that speak the protocol bring their own connections.
//
//	b := wire.Request{Magic: wire.MagicRequest, Command: wire.CmdRead, Cookie: 1, Offset: off, Length: n}.Append(nil)
//	r := wire.DecodeRequest(b) // a fixed size, so any bytes decode; the caller checks r.Magic
//
//	info, err := wire.DecodeInfoRequest(data) // a variable size: ErrMalformed unless data is exactly one
//
// Everything is big-endian. A connection begins with a handshake, in which the client sends options and the server answers
// them. Then follows the transmission, in which the client sends requests and the server answers them in any order,
// matched by the cookie. The numbers are those of the published protocol document.
//
// Guarantees: decoding never panics for the sizes that the functions ask for, allocates no more than the data is long, and
// what is encoded decodes to the same value.
package wire

import (
	"encoding/binary"
	"fmt"
)

// The magic numbers.
const (
	MagicServer      uint64 = 0x4e42444d41474943 // "NBDMAGIC", the server's first word
	MagicOption      uint64 = 0x49484156454f5054 // "IHAVEOPT", its second, and before each option
	MagicOptionReply uint64 = 0x0003e889045565a9
	MagicRequest     uint32 = 0x25609513
	MagicSimple      uint32 = 0x67446698
	MagicChunk       uint32 = 0x668e33ef
)

// Handshake flags: 16 bits from the server, 32 from the client, with the same meaning.
const (
	FlagFixedNewstyle = 1 << 0 // NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_C_FIXED_NEWSTYLE
	FlagNoZeroes      = 1 << 1 // NBD_FLAG_NO_ZEROES, NBD_FLAG_C_NO_ZEROES
)

// Transmission flags: the abilities of an export.
const (
	HasFlags        uint16 = 1 << iota // NBD_FLAG_HAS_FLAGS
	ReadOnly                           // NBD_FLAG_READ_ONLY
	SendFlush                          // NBD_FLAG_SEND_FLUSH
	SendFUA                            // NBD_FLAG_SEND_FUA
	Rotational                         // NBD_FLAG_ROTATIONAL
	SendTrim                           // NBD_FLAG_SEND_TRIM
	SendWriteZeroes                    // NBD_FLAG_SEND_WRITE_ZEROES
	SendDF                             // NBD_FLAG_SEND_DF
	CanMultiConn                       // NBD_FLAG_CAN_MULTI_CONN
	SendResize                         // NBD_FLAG_SEND_RESIZE
	SendCache                          // NBD_FLAG_SEND_CACHE
	SendFastZero                       // NBD_FLAG_SEND_FAST_ZERO
)

// Option is a request of the client in the handshake.
type Option uint32

const (
	OptExportName      Option = 1  // NBD_OPT_EXPORT_NAME
	OptAbort           Option = 2  // NBD_OPT_ABORT
	OptList            Option = 3  // NBD_OPT_LIST
	OptStartTLS        Option = 5  // NBD_OPT_STARTTLS
	OptInfo            Option = 6  // NBD_OPT_INFO
	OptGo              Option = 7  // NBD_OPT_GO
	OptStructuredReply Option = 8  // NBD_OPT_STRUCTURED_REPLY
	OptListMetaContext Option = 9  // NBD_OPT_LIST_META_CONTEXT
	OptSetMetaContext  Option = 10 // NBD_OPT_SET_META_CONTEXT
	OptExtendedHeaders Option = 11 // NBD_OPT_EXTENDED_HEADERS
)

// OptionReplyType answers an option; with the top bit set it is an error.
type OptionReplyType uint32

const (
	RepAck         OptionReplyType = 1 // NBD_REP_ACK
	RepServer      OptionReplyType = 2 // NBD_REP_SERVER
	RepInfo        OptionReplyType = 3 // NBD_REP_INFO
	RepMetaContext OptionReplyType = 4 // NBD_REP_META_CONTEXT

	RepErrUnsup       OptionReplyType = 1<<31 | 1 // NBD_REP_ERR_UNSUP
	RepErrPolicy      OptionReplyType = 1<<31 | 2 // NBD_REP_ERR_POLICY
	RepErrInvalid     OptionReplyType = 1<<31 | 3 // NBD_REP_ERR_INVALID
	RepErrPlatform    OptionReplyType = 1<<31 | 4 // NBD_REP_ERR_PLATFORM
	RepErrTLSRequired OptionReplyType = 1<<31 | 5 // NBD_REP_ERR_TLS_REQD
	RepErrUnknown     OptionReplyType = 1<<31 | 6 // NBD_REP_ERR_UNKNOWN
	RepErrShutdown    OptionReplyType = 1<<31 | 7 // NBD_REP_ERR_SHUTDOWN
	RepErrBlockSize   OptionReplyType = 1<<31 | 8 // NBD_REP_ERR_BLOCK_SIZE_REQD
	RepErrTooBig      OptionReplyType = 1<<31 | 9 // NBD_REP_ERR_TOO_BIG
)

// IsError reports whether t is an error.
func (t OptionReplyType) IsError() bool { return t>>31 != 0 }

// InfoType is a piece of information about an export.
type InfoType uint16

const (
	InfoExport      InfoType = 0 // NBD_INFO_EXPORT
	InfoName        InfoType = 1 // NBD_INFO_NAME
	InfoDescription InfoType = 2 // NBD_INFO_DESCRIPTION
	InfoBlockSize   InfoType = 3 // NBD_INFO_BLOCK_SIZE
)

// Command is the kind of a request.
type Command uint16

const (
	CmdRead        Command = 0 // NBD_CMD_READ
	CmdWrite       Command = 1 // NBD_CMD_WRITE
	CmdDisconnect  Command = 2 // NBD_CMD_DISC
	CmdFlush       Command = 3 // NBD_CMD_FLUSH
	CmdTrim        Command = 4 // NBD_CMD_TRIM
	CmdCache       Command = 5 // NBD_CMD_CACHE
	CmdWriteZeroes Command = 6 // NBD_CMD_WRITE_ZEROES
	CmdBlockStatus Command = 7 // NBD_CMD_BLOCK_STATUS
)

var commandNames = [...]string{"read", "write", "disconnect", "flush", "trim", "cache", "write zeroes", "block status"}

// String returns the command's name, as "read", or "command N" of one that the protocol does not have.
func (c Command) String() string {
	if int(c) < len(commandNames) {
		return commandNames[c]
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// CommandFlags refine a command.
type CommandFlags uint16

const (
	FlagFUA      CommandFlags = 1 << iota // NBD_CMD_FLAG_FUA
	FlagNoHole                            // NBD_CMD_FLAG_NO_HOLE
	FlagDF                                // NBD_CMD_FLAG_DF
	FlagReqOne                            // NBD_CMD_FLAG_REQ_ONE
	FlagFastZero                          // NBD_CMD_FLAG_FAST_ZERO
)

// ChunkType is the kind of a structured reply's chunk; with the top bit set it is an error.
type ChunkType uint16

const (
	ChunkNone        ChunkType = 0         // NBD_REPLY_TYPE_NONE
	ChunkOffsetData  ChunkType = 1         // NBD_REPLY_TYPE_OFFSET_DATA
	ChunkOffsetHole  ChunkType = 2         // NBD_REPLY_TYPE_OFFSET_HOLE
	ChunkBlockStatus ChunkType = 5         // NBD_REPLY_TYPE_BLOCK_STATUS
	ChunkError       ChunkType = 1<<15 | 1 // NBD_REPLY_TYPE_ERROR
	ChunkErrorOffset ChunkType = 1<<15 | 2 // NBD_REPLY_TYPE_ERROR_OFFSET
)

// IsError reports whether t is an error.
func (t ChunkType) IsError() bool { return t>>15 != 0 }

// ChunkDone is the flag of the last chunk of a reply, NBD_REPLY_FLAG_DONE.
const ChunkDone uint16 = 1

// Errno is an error number on the wire, NBD_E… in the protocol; it is the same on every system. 0 is success.
type Errno uint32

const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// MaxName is the longest name of an export or a meta context, in bytes.
const MaxName = 4096

// MaxPayload is the longest READ or WRITE between a server and a client that negotiated nothing else, in bytes.
const MaxPayload = 32 << 20

var be = binary.BigEndian

// An OptionHeader goes before an option's data.
//
//	0            8        12       16
//	+------------+--------+--------+---- … ----+
//	|   magic    | option | length |   data    |
//	+------------+--------+--------+---- … ----+
type OptionHeader struct {
	Magic  uint64
	Option Option
	Length uint32
}

// OptionHeaderSize is its length in bytes.
const OptionHeaderSize = 16

// Append adds h to b.
func (h OptionHeader) Append(b []byte) []byte {
	b = be.AppendUint64(b, h.Magic)
	b = be.AppendUint32(b, uint32(h.Option))
	return be.AppendUint32(b, h.Length)
}

// DecodeOptionHeader reads OptionHeaderSize bytes.
func DecodeOptionHeader(b []byte) OptionHeader {
	return OptionHeader{be.Uint64(b), Option(be.Uint32(b[8:])), be.Uint32(b[12:])}
}

// An OptionReply goes before the data of an answer to an option.
//
//	0            8        12       16       20
//	+------------+--------+--------+--------+---- … ----+
//	|   magic    | option |  type  | length |   data    |
//	+------------+--------+--------+--------+---- … ----+
type OptionReply struct {
	Magic  uint64
	Option Option
	Type   OptionReplyType
	Length uint32
}

// OptionReplySize is its length in bytes.
const OptionReplySize = 20

// Append adds r to b.
func (r OptionReply) Append(b []byte) []byte {
	b = be.AppendUint64(b, r.Magic)
	b = be.AppendUint32(b, uint32(r.Option))
	b = be.AppendUint32(b, uint32(r.Type))
	return be.AppendUint32(b, r.Length)
}

// DecodeOptionReply reads OptionReplySize bytes.
func DecodeOptionReply(b []byte) OptionReply {
	return OptionReply{be.Uint64(b), Option(be.Uint32(b[8:])), OptionReplyType(be.Uint32(b[12:])), be.Uint32(b[16:])}
}

// A Request is the header of a command. Length is that of the range, and of the payload of a WRITE.
//
//	0        4       6      8              16             24       28
//	+--------+-------+------+--------------+--------------+--------+
//	| magic  | flags | type |    cookie    |    offset    | length |
//	+--------+-------+------+--------------+--------------+--------+
type Request struct {
	Magic   uint32
	Flags   CommandFlags
	Command Command
	Cookie  uint64
	Offset  uint64
	Length  uint32
}

// RequestSize is its length in bytes.
const RequestSize = 28

// Append adds r to b.
func (r Request) Append(b []byte) []byte {
	b = be.AppendUint32(b, r.Magic)
	b = be.AppendUint16(b, uint16(r.Flags))
	b = be.AppendUint16(b, uint16(r.Command))
	b = be.AppendUint64(b, r.Cookie)
	b = be.AppendUint64(b, r.Offset)
	return be.AppendUint32(b, r.Length)
}

// DecodeRequest reads RequestSize bytes.
func DecodeRequest(b []byte) Request {
	return Request{be.Uint32(b), CommandFlags(be.Uint16(b[4:])), Command(be.Uint16(b[6:])), be.Uint64(b[8:]), be.Uint64(b[16:]), be.Uint32(b[24:])}
}

// A Simple is a simple reply; data follows a successful READ.
//
//	0        4        8              16
//	+--------+--------+--------------+
//	| magic  | error  |    cookie    |
//	+--------+--------+--------------+
type Simple struct {
	Magic  uint32
	Error  Errno
	Cookie uint64
}

// SimpleSize is its length in bytes.
const SimpleSize = 16

// Append adds s to b.
func (s Simple) Append(b []byte) []byte {
	b = be.AppendUint32(b, s.Magic)
	b = be.AppendUint32(b, uint32(s.Error))
	return be.AppendUint64(b, s.Cookie)
}

// DecodeSimple reads SimpleSize bytes.
func DecodeSimple(b []byte) Simple {
	return Simple{be.Uint32(b), Errno(be.Uint32(b[4:])), be.Uint64(b[8:])}
}

// A Chunk is the header of one part of a structured reply.
//
//	0        4       6      8              16       20
//	+--------+-------+------+--------------+--------+---- … ----+
//	| magic  | flags | type |    cookie    | length |  payload  |
//	+--------+-------+------+--------------+--------+---- … ----+
type Chunk struct {
	Magic  uint32
	Flags  uint16
	Type   ChunkType
	Cookie uint64
	Length uint32
}

// ChunkSize is its length in bytes.
const ChunkSize = 20

// Append adds c to b.
func (c Chunk) Append(b []byte) []byte {
	b = be.AppendUint32(b, c.Magic)
	b = be.AppendUint16(b, c.Flags)
	b = be.AppendUint16(b, uint16(c.Type))
	b = be.AppendUint64(b, c.Cookie)
	return be.AppendUint32(b, c.Length)
}

// DecodeChunk reads ChunkSize bytes.
func DecodeChunk(b []byte) Chunk {
	return Chunk{be.Uint32(b), be.Uint16(b[4:]), ChunkType(be.Uint16(b[6:])), be.Uint64(b[8:]), be.Uint32(b[16:])}
}
