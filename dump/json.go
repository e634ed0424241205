package dump

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"

	"github.com/dmsnap/dmsnap/ondisk"
)

// jsonForm writes one JSON value as it goes: a store of millions of slots is never in memory.
//
//	{"format": "dmsnap store", "version": 1, "size": 65536, "chunk_sectors": 8,
//	 "header": {"magic": …, "valid": 1, "version": 1, "chunk_sectors": 8},
//	 "bytes": [{"offset": 16, "count": 1, "hex": "…"}],
//	 "areas": [{"area": 0, "offset": 4096, "slots": [{"slot": 0, "count": 1, "old": 5, "new": 2}],
//	            "end_slot": 1, "void": false}],
//	 "unreadable": [{"offset": 4096, "length": 512, "error": "…"}]}
//
// A group of slots counts up on all three sides. Slots after end_slot are void. Bytes are those of the header's chunk
// and, with Options.Data, of data chunks, under "data".
type jsonForm struct {
	w    *bufio.Writer
	err  error
	hex  hexLines
	open string // the array that is being written, or ""
	any  bool   // it has an element
	end  *uint64
	void bool
	torn []jsonBytes // bytes within an area: the device ends within a slot
	gaps []jsonGap
}

type jsonBytes struct {
	Offset int64  `json:"offset"`
	Count  int    `json:"count"`
	Hex    string `json:"hex"`
}

type jsonGap struct {
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Error  string `json:"error"`
}

// maxGaps bounds the unreadable places that are named, since they are written last.
const maxGaps = 1000

func newJSON(w io.Writer) *jsonForm {
	j := &jsonForm{w: bufio.NewWriterSize(w, 64<<10)}
	j.hex.emit = func(off int64, b []byte, count int) {
		e := jsonBytes{off, count, hex.EncodeToString(b)}
		if j.open == "areas" {
			j.torn = append(j.torn, e)
			return
		}
		j.element(e)
	}
	j.printf("{\"format\": \"dmsnap store\", \"version\": 1")
	return j
}

func (j *jsonForm) printf(format string, args ...any) {
	if _, err := fmt.Fprintf(j.w, format, args...); j.err == nil {
		j.err = err
	}
}

// value writes a value of a type that always has a JSON form.
func (j *jsonForm) value(v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	j.printf("%s", b)
}

// array closes the array that is open and opens another one, where name is not "".
func (j *jsonForm) array(name string) {
	j.hex.flush()
	if j.open != "" {
		j.printf("]")
	}
	if j.open, j.any = name, false; name != "" {
		j.printf(",\n %q: [", name)
	}
}

// element writes a member of the open array.
func (j *jsonForm) element(v any) {
	j.separate()
	j.value(v)
}

func (j *jsonForm) separate() {
	if j.any {
		j.printf(",")
	}
	j.printf("\n  ")
	j.any = true
}

func (j *jsonForm) failed() error { return j.err }

func (j *jsonForm) size(bytes int64) { j.printf(", \"size\": %d", bytes) }

func (j *jsonForm) layout(sectors, _ uint32) {
	j.printf(", \"chunk_sectors\": %d", sectors)
}

func (j *jsonForm) header(h ondisk.Header) {
	j.printf(",\n \"header\": {\"magic\": %d, \"valid\": %d, \"version\": %d, \"chunk_sectors\": %d}", h.Magic, h.Valid, h.Version, h.ChunkSectors)
}

func (j *jsonForm) bytes(off int64, b []byte) {
	if j.open == "" {
		j.array("bytes")
	}
	j.hex.add(off, b)
}

func (j *jsonForm) beginArea(area uint64, off int64) {
	if j.open != "areas" {
		j.array("areas")
	}
	j.separate()
	j.printf("{\"area\": %d, \"offset\": %d, \"slots\": [", area, off)
	j.any, j.end, j.void = false, nil, false
}

func (j *jsonForm) slots(r run) {
	if j.any {
		j.printf(",")
	}
	j.printf("\n   {\"slot\": %d, \"count\": %d, \"old\": %d, \"new\": %d}", r.slot, r.count, r.old, r.new)
	j.any = true
}

func (j *jsonForm) endMark(slot uint64, void bool) { j.end, j.void = &slot, void }

func (j *jsonForm) endArea() {
	j.hex.flush()
	j.printf("], \"end_slot\": ")
	j.value(j.end)
	j.printf(", \"void\": %t", j.void)
	if j.torn != nil {
		j.printf(", \"bytes\": ")
		j.value(j.torn)
	}
	j.printf("}")
	j.any = true
}

func (j *jsonForm) beginData() { j.array("data") }

func (j *jsonForm) gap(off, n int64, err error) {
	if len(j.gaps) < maxGaps {
		j.gaps = append(j.gaps, jsonGap{off, n, err.Error()})
	}
}

func (j *jsonForm) finish() error {
	j.array("")
	j.printf(",\n \"unreadable\": ")
	j.value(append([]jsonGap{}, j.gaps...))
	j.printf("}\n")
	if err := j.w.Flush(); j.err == nil {
		j.err = err
	}
	return j.err
}
