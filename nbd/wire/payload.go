package wire

import (
	"errors"
	"fmt"
	"unicode/utf8"
)

// ErrMalformed reports data that does not follow the protocol.
var ErrMalformed = errors.New("malformed data")

// cursor reads fields from a byte slice; bad is set at the first one that is missing, and stays set.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) take(n uint32) []byte {
	if c.bad || uint64(n) > uint64(len(c.b)) {
		c.bad = true
		return nil
	}
	p := c.b[:n]
	c.b = c.b[n:]
	return p
}

func (c *cursor) u16() uint16 {
	if p := c.take(2); p != nil {
		return be.Uint16(p)
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if p := c.take(4); p != nil {
		return be.Uint32(p)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if p := c.take(8); p != nil {
		return be.Uint64(p)
	}
	return 0
}

// name is a length of 32 bits and as many bytes of UTF-8 without NUL.
func (c *cursor) name() string {
	n := c.u32()
	if n > MaxName {
		c.bad = true
	}
	s := string(c.take(n))
	if !ValidName(s) {
		c.bad = true
	}
	return s
}

// done returns an error when a field was missing, or bytes are left over.
func (c *cursor) done(what string) error {
	if c.bad {
		return fmt.Errorf("%s: %w", what, ErrMalformed)
	}
	if len(c.b) > 0 {
		return fmt.Errorf("%s: %w: %d bytes too many", what, ErrMalformed, len(c.b))
	}
	return nil
}

// ValidName reports whether s may name an export or a context.
func ValidName(s string) bool {
	if len(s) > MaxName || !utf8.ValidString(s) {
		return false
	}
	for i := range len(s) {
		if s[i] == 0 {
			return false
		}
	}
	return true
}

func appendName(b []byte, s string) []byte {
	return append(be.AppendUint32(b, uint32(len(s))), s...)
}

// An InfoRequest is the data of OptInfo and OptGo.
//
//	0        4            4+n      6+n
//	+--------+---- … -----+--------+--------+-- … --+
//	|   n    |    name    | count  |  type  |       |
//	+--------+---- … -----+--------+--------+-- … --+
type InfoRequest struct {
	Name  string
	Types []InfoType
}

// Append adds r to b.
func (r InfoRequest) Append(b []byte) []byte {
	b = appendName(b, r.Name)
	b = be.AppendUint16(b, uint16(len(r.Types)))
	for _, t := range r.Types {
		b = be.AppendUint16(b, uint16(t))
	}
	return b
}

// DecodeInfoRequest reads all of b.
func DecodeInfoRequest(b []byte) (InfoRequest, error) {
	c := cursor{b: b}
	r := InfoRequest{Name: c.name()}
	for n := c.u16(); n > 0 && !c.bad; n-- {
		r.Types = append(r.Types, InfoType(c.u16()))
	}
	return r, c.done("info request")
}

// An ExportInfo is the data of InfoExport: size in bytes and transmission flags.
//
//	0       2              10      12
//	+-------+--------------+-------+
//	| type  |     size     | flags |
//	+-------+--------------+-------+
type ExportInfo struct {
	Size  uint64
	Flags uint16
}

// Append adds i to b, type first.
func (i ExportInfo) Append(b []byte) []byte {
	b = be.AppendUint16(b, uint16(InfoExport))
	b = be.AppendUint64(b, i.Size)
	return be.AppendUint16(b, i.Flags)
}

// DecodeExportInfo reads all of b, type first.
func DecodeExportInfo(b []byte) (ExportInfo, error) {
	c := cursor{b: b}
	c.u16()
	i := ExportInfo{c.u64(), c.u16()}
	return i, c.done("export info")
}

// A BlockSizes is the data of InfoBlockSize, in bytes.
//
//	0       2        6           10       14
//	+-------+--------+-----------+--------+
//	| type  |  min   | preferred |  max   |
//	+-------+--------+-----------+--------+
type BlockSizes struct{ Min, Preferred, Max uint32 }

// Append adds s to b, type first.
func (s BlockSizes) Append(b []byte) []byte {
	b = be.AppendUint16(b, uint16(InfoBlockSize))
	b = be.AppendUint32(b, s.Min)
	b = be.AppendUint32(b, s.Preferred)
	return be.AppendUint32(b, s.Max)
}

// DecodeBlockSizes reads all of b, type first.
func DecodeBlockSizes(b []byte) (BlockSizes, error) {
	c := cursor{b: b}
	c.u16()
	s := BlockSizes{c.u32(), c.u32(), c.u32()}
	return s, c.done("block sizes")
}

// A MetaQuery is the data of OptListMetaContext and OptSetMetaContext.
//
//	0        4            4+n      8+n
//	+--------+---- … -----+--------+--------+---- … ----+-- … --+
//	|   n    |   export   | count  | length |   query   |       |
//	+--------+---- … -----+--------+--------+---- … ----+-- … --+
type MetaQuery struct {
	Export  string
	Queries []string
}

// Append adds q to b.
func (q MetaQuery) Append(b []byte) []byte {
	b = appendName(b, q.Export)
	b = be.AppendUint32(b, uint32(len(q.Queries)))
	for _, s := range q.Queries {
		b = appendName(b, s)
	}
	return b
}

// DecodeMetaQuery reads all of b.
func DecodeMetaQuery(b []byte) (MetaQuery, error) {
	c := cursor{b: b}
	q := MetaQuery{Export: c.name()}
	for n := c.u32(); n > 0 && !c.bad; n-- { // bounded by b: each takes four bytes at least
		q.Queries = append(q.Queries, c.name())
	}
	return q, c.done("meta context query")
}

// A MetaContext is the data of RepMetaContext. The name goes to the end.
//
//	0        4
//	+--------+---- … -----+
//	|   ID   |    name    |
//	+--------+---- … -----+
type MetaContext struct {
	ID   uint32
	Name string
}

// Append adds m to b.
func (m MetaContext) Append(b []byte) []byte { return append(be.AppendUint32(b, m.ID), m.Name...) }

// DecodeMetaContext reads all of b.
func DecodeMetaContext(b []byte) (MetaContext, error) {
	c := cursor{b: b}
	m := MetaContext{ID: c.u32()}
	m.Name = string(c.take(uint32(len(c.b))))
	if !ValidName(m.Name) {
		c.bad = true
	}
	return m, c.done("meta context")
}

// AppendServer adds the data of RepServer: an export's name, and a text for people, which may be empty.
//
//	0        4            4+n
//	+--------+---- … -----+---- … -----+
//	|   n    |    name    |    text    |
//	+--------+---- … -----+---- … -----+
func AppendServer(b []byte, name, text string) []byte { return append(appendName(b, name), text...) }

// DecodeServer reads the name in the data of RepServer; a description may follow.
func DecodeServer(b []byte) (string, error) {
	c := cursor{b: b}
	name := c.name()
	c.b = nil
	return name, c.done("export in list")
}

// A Descriptor is a run of bytes with the same status, in the payload of ChunkBlockStatus.
type Descriptor struct {
	Length uint32
	Flags  uint32
}

// AppendBlockStatus adds the payload of ChunkBlockStatus.
//
//	0            4        8       12
//	+------------+--------+-------+-- … --+
//	| context ID | length | flags |       |
//	+------------+--------+-------+-- … --+
func AppendBlockStatus(b []byte, id uint32, ds []Descriptor) []byte {
	b = be.AppendUint32(b, id)
	for _, d := range ds {
		b = be.AppendUint32(b, d.Length)
		b = be.AppendUint32(b, d.Flags)
	}
	return b
}

// DecodeBlockStatus reads all of b.
func DecodeBlockStatus(b []byte) (id uint32, ds []Descriptor, err error) {
	c := cursor{b: b}
	id = c.u32()
	for len(c.b) > 0 && !c.bad {
		ds = append(ds, Descriptor{c.u32(), c.u32()})
	}
	return id, ds, c.done("block status")
}

// AppendError adds the payload of ChunkError. That of ChunkErrorOffset ends with an offset.
//
//	0        4       6            6+n
//	+--------+-------+---- … -----+- - - - - - - -+
//	| error  |   n   |  message   |    offset     |
//	+--------+-------+---- … -----+- - - - - - - -+
func AppendError(b []byte, e Errno, message string) []byte {
	b = be.AppendUint32(b, uint32(e))
	b = be.AppendUint16(b, uint16(len(message)))
	return append(b, message...)
}

// DecodeError reads the payload of ChunkError or ChunkErrorOffset, whose offset it leaves out.
func DecodeError(b []byte) (Errno, string, error) {
	c := cursor{b: b}
	e := Errno(c.u32())
	m := string(c.take(uint32(c.u16())))
	if !c.bad {
		c.b = nil
	}
	return e, m, c.done("error")
}

// AppendOffset adds the offset with which the payload of ChunkOffsetData begins.
//
//	0              8
//	+--------------+---- … ----+
//	|    offset    |   data    |
//	+--------------+---- … ----+
func AppendOffset(b []byte, off uint64) []byte { return be.AppendUint64(b, off) }

// AppendHole adds the payload of ChunkOffsetHole.
//
//	0              8        12
//	+--------------+--------+
//	|    offset    | length |
//	+--------------+--------+
func AppendHole(b []byte, off uint64, n uint32) []byte {
	return be.AppendUint32(be.AppendUint64(b, off), n)
}

// DecodeHole reads all of b.
func DecodeHole(b []byte) (off uint64, n uint32, err error) {
	c := cursor{b: b}
	off, n = c.u64(), c.u32()
	return off, n, c.done("hole")
}

// DecodeOffset reads the first eight bytes of a data chunk's payload.
func DecodeOffset(b []byte) uint64 { return be.Uint64(b) }
