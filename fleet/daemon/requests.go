package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/dmsnap/dmsnap/server/api"
)

// element returns the element of a name, which must be of a kind.
func (d *Daemon) element(name string, kind api.Kind) (api.Element, error) {
	e, err := d.fleet.Element(name)
	if err != nil || e.Kind != kind {
		code := api.CodeNoSuchNode
		if kind == api.KindCheckpoint {
			code = api.CodeNoSuchCheckpoint
		}
		what := ""
		if err == nil {
			what = fmt.Sprintf(": it is a %s", e.Kind)
		}
		return api.Element{}, refuse(code, "there is no %s %q%s", kind, name, what)
	}
	return e, nil
}

func (d *Daemon) drop(ctx context.Context, name string, kind api.Kind) (any, error) {
	if _, err := d.element(name, kind); err != nil {
		return nil, err
	}
	return empty{}, d.fleet.Drop(ctx, name)
}

// fork forks unless the policy of the disk forbids a further node.
func (d *Daemon) fork(ctx context.Context, q api.ForkRequest) (any, error) {
	e, err := d.fleet.Element(q.From)
	if err != nil {
		return nil, err
	}
	unlock, err := d.reserveNode(e.Disk, q.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if strings.HasPrefix(q.Name, TemporaryPrefix) {
		defer d.policies.temporary.Store(true)
	}
	return d.fleet.Fork(ctx, q)
}

func (d *Daemon) adopt(ctx context.Context, q api.AdoptRequest) (any, error) {
	var err error
	if q.COW, err = d.allowFile("cow", q.COW); err != nil {
		return nil, err
	}
	unlock, err := d.reserveNode(q.Disk, q.Node)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return d.fleet.Adopt(ctx, q)
}

// Limits of GET /v1/events.
const (
	maxSubscribers = 256
	keepAlive      = 15 * time.Second // between comments while nothing happens
	eventTimeout   = 30 * time.Second // for a client to take an event
)

// serveEvents sends events until the client disconnects or the daemon ends.
func (d *Daemon) serveEvents(w http.ResponseWriter, r *http.Request) error {
	defer d.subscribers.Add(-1)
	if d.subscribers.Add(1) > maxSubscribers {
		return refuse(api.CodeInUse, "%d clients wait for events already", maxSubscribers)
	}
	c := http.NewResponseController(w)
	c.SetReadDeadline(time.Time{}) // of the request, which ended
	events := d.fleet.Subscribe(r.Context())
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	t := time.NewTicker(keepAlive)
	defer t.Stop()
	text := []byte(": events follow\n\n")
	for {
		c.SetWriteDeadline(time.Now().Add(eventTimeout))
		if _, err := w.Write(text); err != nil {
			return nil
		}
		if err := c.Flush(); err != nil {
			return nil
		}
		select {
		case e, ok := <-events:
			if !ok {
				return nil
			}
			data, err := json.Marshal(e)
			if err != nil {
				return nil
			}
			text = fmt.Appendf(nil, "id: %d\nevent: %s\ndata: %s\n\n", e.Seq, e.Kind, data)
		case <-t.C:
			text = []byte(": \n\n")
		case <-r.Context().Done():
			return nil
		}
	}
}
