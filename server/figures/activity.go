package figures

import (
	"net/http"
	"strconv"

	"github.com/dmsnap/dmsnap/activity"
	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
)

// Activity returns what was counted of an observed device; nil of none.
func Activity(d *activity.Device) *api.Activity {
	if d == nil {
		return nil
	}
	c := d.Counts()
	return &api.Activity{Reads: Latency(c.Reads), Writes: Latency(c.Writes), Flushes: Latency(c.Flushes),
		ReadBytes: c.ReadBytes, WrittenBytes: c.WriteBytes, Errors: c.Errors}
}

// maxParts is how many parts of a disk a heat map may have.
const maxParts = 512

// HeatMap makes a map of a disk of size bytes in at most 512 parts: the fraction of each that changed reports with the flag
// snapshot.InCOW, and the writes of the observed device, unless that is nil. changed may stop early, as block.Extents.
func HeatMap(name string, size int64, parts int, changed func(off, n int64) ([]block.Extent, error), d *activity.Device) (api.HeatMap, error) {
	h := api.HeatMap{Name: name, SizeBytes: size}
	var err error
	if h.Stored, err = activity.Fractions(size, min(max(parts, 1), maxParts), snapshot.InCOW, changed); err != nil {
		return api.HeatMap{}, err
	}
	if d != nil {
		h.Writes = d.Writes(len(h.Stored))
	}
	return h, nil
}

// Nothing is the map of a disk that has nothing in a COW device.
func Nothing(off, n int64) ([]block.Extent, error) { return []block.Extent{{Length: n}}, nil }

// Parts returns the number of parts that a request for a heat map asks for: parts=N, 1 to 512, without it 256.
func Parts(r *http.Request) (int, error) {
	q := r.URL.Query().Get("parts")
	if q == "" {
		return 256, nil
	}
	n, err := strconv.Atoi(q)
	if err != nil || n < 1 || n > maxParts {
		return 0, &api.Error{Code: api.CodeBadRequest, Message: "parts: must be 1 to " + strconv.Itoa(maxParts)}
	}
	return n, nil
}
