package web

import (
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"time"

	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

// The page gets an event for each report: the first one has everything, later ones have what changed.
//
//	data: {"server":"origin","order":["base","vm1"],"elements":[{...},{...}],"file_systems":[...]}
//	data: {"elements":[{"name":"vm1",...}]}
//
// order is there when elements came or went; what is not in it is gone.

// row is what the page shows of an element.
type row struct {
	Name        string         `json:"name"`
	Kind        api.Kind       `json:"kind"`
	Parent      string         `json:"parent,omitempty"`
	Disk        string         `json:"disk"`
	SizeBytes   int64          `json:"size_bytes"`
	Failed      bool           `json:"failed,omitempty"`
	Error       string         `json:"error,omitempty"`
	URI         string         `json:"uri,omitempty"`
	File        string         `json:"file,omitempty"`
	Unnamed     bool           `json:"unnamed,omitempty"`
	Created     time.Time      `json:"created,omitzero"`
	Connections int64          `json:"connections,omitempty"`
	State       api.State      `json:"state,omitempty"` // of the store
	Full        bool           `json:"full,omitempty"`
	Percent     float64        `json:"percent"`
	Allocated   int64          `json:"allocated_bytes"`
	Total       int64          `json:"total_bytes"`
	Exceptions  uint64         `json:"exceptions"`
	HasStore    bool           `json:"has_store,omitempty"`
	Rates       monitor.Rates  `json:"rates"`
	Merge       *api.TreeMerge `json:"merge,omitempty"`
}

func rowOf(e *monitor.Element) row {
	const sector = 512
	r := row{Name: e.Name, Kind: e.Kind, Parent: e.Parent, Disk: e.Disk, SizeBytes: e.SizeBytes, Failed: e.State == api.ElementFailed, Error: e.Error,
		URI: e.URI, File: e.File, Unnamed: e.Unnamed, Created: e.Created, Connections: e.Connections, Rates: e.Rates, Merge: e.Merge}
	if f := e.Figures; f != nil {
		r.HasStore, r.State, r.Full, r.Percent = true, f.State, f.Full, f.Percent
		r.Allocated, r.Total, r.Exceptions = int64(f.SectorsAllocated)*sector, int64(f.TotalSectors)*sector, f.Exceptions
	}
	return r
}

// update is the data of one event.
type update struct {
	Server      api.ServerKind       `json:"server,omitempty"`
	Error       string               `json:"error,omitempty"` // the tree accepts no changes, or the server does not answer
	Order       []string             `json:"order"`           // null: as before
	Elements    []row                `json:"elements,omitempty"`
	FileSystems []monitor.FileSystem `json:"file_systems,omitempty"`
}

// changes remembers what a page has got.
type changes struct {
	order []string
	rows  map[string]row
	fs    []monitor.FileSystem
}

// next returns what changed since the last report.
func (c *changes) next(r monitor.Report, err error) update {
	u := update{Server: r.Server, Error: r.Error}
	if err != nil {
		u.Error = err.Error()
	}
	rows, order := make(map[string]row, len(r.Elements)), make([]string, 0, len(r.Elements))
	for i := range r.Elements {
		now := rowOf(&r.Elements[i])
		rows[now.Name] = now
		order = append(order, now.Name)
		if was, known := c.rows[now.Name]; !known || !reflect.DeepEqual(was, now) {
			u.Elements = append(u.Elements, now)
		}
	}
	if !slices.Equal(order, c.order) {
		u.Order = order
	}
	if !reflect.DeepEqual(r.FileSystems, c.fs) {
		u.FileSystems = r.FileSystems
	}
	c.order, c.rows, c.fs = order, rows, r.FileSystems
	return u
}

// writeTimeout is how long a page may take nothing before it is disconnected.
const writeTimeout = 30 * time.Second

// live sends the reports as server-sent events, until the client goes.
func (h *handler) live(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	reports, end := h.Watcher.Subscribe()
	defer end()
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no")
	control.SetReadDeadline(time.Time{}) // the server's limits are for requests that end
	var c changes
	for {
		if latest, err := h.Watcher.Latest(); err != nil || !latest.At.IsZero() {
			text, err := json.Marshal(c.next(latest, err))
			if err != nil {
				return
			}
			control.SetWriteDeadline(time.Now().Add(writeTimeout))
			if _, err := fmt.Fprintf(w, "data: %s\n\n", text); err != nil {
				return
			}
			if control.Flush() != nil {
				return
			}
		}
		select {
		case <-r.Context().Done():
			return
		case <-reports:
		}
	}
}
