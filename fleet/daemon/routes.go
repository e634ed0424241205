package daemon

import (
	"context"
	_ "embed"
	"encoding/json"
	"net/http"

	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/server/figures"
)

// A route is a request of the API. The handler and the description of the API are both made of this table.
type route struct {
	method, path string
	summary      string
	rights       Rights
	body         any        // the zero value of the request's body; nil: it has none
	reply        any        // the zero value of the reply
	codes        []api.Code // of its errors, beside those of every request
	handle       func(d *Daemon, r *http.Request, w http.ResponseWriter) (any, error)
}

// description is the description of the API for programs: OpenAPI 3.1, made of routes and the types of package api.
//
//go:embed openapi.json
var description []byte

// empty is a reply that says nothing but success.
type empty struct{}

// routes are all requests.
func routes() []route {
	return []route{
		{"GET", "/v1/daemon", "What the daemon is and serves", RightRead, nil, api.Daemon{}, nil, func(d *Daemon, r *http.Request, _ http.ResponseWriter) (any, error) {
			return d.status(RightsOf(r.Context())), nil
		}},
		{"GET", "/v1/tree", "The disks, checkpoints and nodes, parents before children", RightRead, nil, api.Tree{}, nil, func(d *Daemon, r *http.Request, _ http.ResponseWriter) (any, error) {
			return d.Tree(), nil
		}},
		{"GET", "/v1/heat/{name}", "A map of a disk in equal parts (parts=N, 1 to 512; 256): what is in an element's own layer, and what was written", RightRead, nil, api.HeatMap{}, []api.Code{api.CodeNoSuchElement}, func(d *Daemon, r *http.Request, _ http.ResponseWriter) (any, error) {
			parts, err := figures.Parts(r)
			if err != nil {
				return nil, err
			}
			return d.fleet.HeatMap(r.PathValue("name"), parts)
		}},
		{"GET", "/v1/events", "Events from now on, as server-sent events whose data are JSON", RightRead, nil, api.Event{}, []api.Code{api.CodeInUse}, func(d *Daemon, r *http.Request, w http.ResponseWriter) (any, error) {
			return nil, d.serveEvents(w, r)
		}},
		{"GET", "/v1/openapi.json", "This description", RightRead, nil, map[string]any{}, nil, func(d *Daemon, r *http.Request, _ http.ResponseWriter) (any, error) {
			return json.RawMessage(description), nil
		}},
		{"GET", "/v1/disks", "The disks", RightRead, nil, api.Disks{}, nil, func(d *Daemon, r *http.Request, _ http.ResponseWriter) (any, error) {
			return d.fleet.Disks(), nil
		}},
		{"POST", "/v1/disks", "Make an image or device a base of nodes", RightAdmin, api.AddDiskRequest{}, api.Disk{}, []api.Code{api.CodeBadName, api.CodeNameTaken}, withBody(func(d *Daemon, ctx context.Context, _ string, q api.AddDiskRequest) (any, error) {
			var err error
			if q.Source, err = d.allowSource(q.Source); err != nil {
				return nil, err
			}
			disk, err := d.fleet.AddDisk(ctx, q)
			if err == nil {
				d.applySpace()
			}
			return disk, err
		})},
		{"GET", "/v1/disks/{name}", "One disk", RightRead, nil, api.Disk{}, []api.Code{api.CodeNoSuchDisk}, func(d *Daemon, r *http.Request, _ http.ResponseWriter) (any, error) {
			return d.fleet.Disk(r.PathValue("name"))
		}},
		{"DELETE", "/v1/disks/{name}", "Forget a disk without nodes and checkpoints; its image stays", RightAdmin, nil, empty{}, []api.Code{api.CodeNoSuchDisk, api.CodeHasChildren, api.CodeInUse}, named(func(d *Daemon, ctx context.Context, name string) (any, error) {
			return empty{}, d.fleet.RemoveDisk(ctx, name)
		})},
		{"PUT", "/v1/disks/{name}/policy", "Change keys of a disk's policy", RightAdmin, api.PolicyRequest{}, api.Disk{}, []api.Code{api.CodeNoSuchDisk}, withBody(func(d *Daemon, ctx context.Context, name string, q api.PolicyRequest) (any, error) {
			q.Disk = name
			return d.setPolicy(ctx, q)
		})},
		{"POST", "/v1/fork", "Make a node from a disk, a checkpoint or a node", RightWrite, api.ForkRequest{}, api.Element{}, []api.Code{api.CodeNoSuchElement, api.CodeBadName, api.CodeNameTaken, api.CodeQuota}, withBody(func(d *Daemon, ctx context.Context, _ string, q api.ForkRequest) (any, error) {
			return d.fork(ctx, q)
		})},
		{"POST", "/v1/checkpoint", "Seal nodes at one moment", RightWrite, api.CheckpointRequest{}, api.Checkpoints{}, []api.Code{api.CodeNoSuchNode, api.CodeBadName, api.CodeNameTaken, api.CodeInUse, api.CodeFreezeFailed}, withBody(func(d *Daemon, ctx context.Context, _ string, q api.CheckpointRequest) (any, error) {
			return d.fleet.Checkpoint(ctx, q)
		})},
		{"GET", "/v1/layers/{name}", "What a checkpoint, or a node below what is written to it, is made of, each layer as an export that is only read", RightRead, nil, api.Layers{}, []api.Code{api.CodeNoSuchElement, api.CodeDiskFailed}, func(d *Daemon, r *http.Request, _ http.ResponseWriter) (any, error) {
			return d.fleet.Layers(r.PathValue("name"))
		}},
		{"POST", "/v1/nodes/{name}/seal", "Make what was written to a node an unnamed checkpoint, and say what the node is made of then", RightWrite, nil, api.Layers{}, []api.Code{api.CodeNoSuchNode, api.CodeFreezeFailed, api.CodeInUse}, named(func(d *Daemon, ctx context.Context, name string) (any, error) {
			return d.fleet.Seal(ctx, name)
		})},
		{"GET", "/v1/nodes/{name}", "One node", RightRead, nil, api.Element{}, []api.Code{api.CodeNoSuchNode}, func(d *Daemon, r *http.Request, _ http.ResponseWriter) (any, error) {
			return d.element(r.PathValue("name"), api.KindNode)
		}},
		{"DELETE", "/v1/nodes/{name}", "Remove a node and its files", RightWrite, nil, empty{}, []api.Code{api.CodeNoSuchNode, api.CodeHasChildren, api.CodeInUse}, named(func(d *Daemon, ctx context.Context, name string) (any, error) {
			return d.drop(ctx, name, api.KindNode)
		})},
		{"POST", "/v1/nodes/{name}/rollback", "Make a node show an earlier checkpoint", RightWrite, api.RollbackRequest{}, api.Element{}, []api.Code{api.CodeNoSuchNode, api.CodeNoSuchCheckpoint, api.CodeNotAncestor, api.CodeInUse}, withBody(func(d *Daemon, ctx context.Context, name string, q api.RollbackRequest) (any, error) {
			q.Node = name
			return d.fleet.Rollback(ctx, q)
		})},
		{"POST", "/v1/nodes/{name}/squash", "Make the layers that are a node's own into one, or those below a checkpoint that have no name and only it needs", RightWrite, nil, api.Element{}, []api.Code{api.CodeNoSuchNode, api.CodeInUse}, named(func(d *Daemon, ctx context.Context, name string) (any, error) {
			return d.fleet.Squash(ctx, api.SquashRequest{Node: name})
		})},
		{"POST", "/v1/nodes/{name}/merge", "Start to write what a node holds to its disk", RightAdmin, nil, api.TreeMerge{}, []api.Code{api.CodeNoSuchNode, api.CodeMerging, api.CodeAlreadyMerging, api.CodeInUse}, named(func(d *Daemon, ctx context.Context, name string) (any, error) {
			return d.fleet.Merge(ctx, name)
		})},
		{"POST", "/v1/nodes/{name}/merge/pause", "Pause the merge of a node", RightAdmin, nil, api.TreeMerge{}, []api.Code{api.CodeNoSuchNode, api.CodeNoMerge}, named(func(d *Daemon, ctx context.Context, name string) (any, error) {
			return d.fleet.PauseMerge(ctx, name)
		})},
		{"POST", "/v1/nodes/{name}/merge/resume", "Continue a merge that was paused, or begin one again that failed", RightAdmin, nil, api.TreeMerge{}, []api.Code{api.CodeNoSuchNode, api.CodeNoMerge, api.CodeInUse}, named(func(d *Daemon, ctx context.Context, name string) (any, error) {
			return d.fleet.ResumeMerge(ctx, name)
		})},
		{"DELETE", "/v1/nodes/{name}/merge", "Take back a merge that failed: the disk gets the content that it had before", RightAdmin, nil, api.Disk{}, []api.Code{api.CodeNoSuchNode, api.CodeNoMerge, api.CodeInUse, api.CodeDiskFailed}, named(func(d *Daemon, ctx context.Context, name string) (any, error) {
			return d.fleet.TakeBackMerge(ctx, name)
		})},
		{"POST", "/v1/nodes/{name}/table", "The device-mapper tables with which a kernel shows a node", RightRead, nil, api.Table{}, []api.Code{api.CodeNoSuchNode}, named(func(d *Daemon, _ context.Context, name string) (any, error) {
			return d.fleet.Table(name)
		})},
		{"DELETE", "/v1/checkpoints/{name}", "Remove a checkpoint and its file", RightWrite, nil, empty{}, []api.Code{api.CodeNoSuchCheckpoint, api.CodeHasChildren}, named(func(d *Daemon, ctx context.Context, name string) (any, error) {
			return d.drop(ctx, name, api.KindCheckpoint)
		})},
		{"POST", "/v1/adopt", "Make an existing store the layer of a new node", RightAdmin, api.AdoptRequest{}, api.Element{}, []api.Code{api.CodeNoSuchDisk, api.CodeBadName, api.CodeNameTaken, api.CodeQuota}, withBody(func(d *Daemon, ctx context.Context, _ string, q api.AdoptRequest) (any, error) {
			return d.adopt(ctx, q)
		})},
	}
}

// lasting returns a context for a request that changes something: it does not end when its client disconnects, but with the
// daemon, so that no copying delays that.
func (d *Daemon) lasting(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(d.ending, cancel)
	return ctx, func() { stop(); cancel() }
}

// named is the handler of a request without a body, about the element in its path. It goes on when its client
// disconnects.
func named(f func(d *Daemon, ctx context.Context, name string) (any, error)) func(*Daemon, *http.Request, http.ResponseWriter) (any, error) {
	return func(d *Daemon, r *http.Request, _ http.ResponseWriter) (any, error) {
		ctx, cancel := d.lasting(r.Context())
		defer cancel()
		return f(d, ctx, r.PathValue("name"))
	}
}

// withBody is the handler of a request with a body; name is that in its path, if there is one. It goes on when its client
// disconnects.
func withBody[Q any](f func(d *Daemon, ctx context.Context, name string, q Q) (any, error)) func(*Daemon, *http.Request, http.ResponseWriter) (any, error) {
	return func(d *Daemon, r *http.Request, _ http.ResponseWriter) (any, error) {
		var q Q
		if err := api.ReadBody(r, &q); err != nil {
			return nil, err
		}
		ctx, cancel := d.lasting(r.Context())
		defer cancel()
		return f(d, ctx, r.PathValue("name"), q)
	}
}

// Handler returns the control API. Requests have the rights that WithRights gave to their contexts, or none.
func (d *Daemon) Handler() http.Handler {
	mux := http.NewServeMux()
	for _, t := range routes() {
		mux.HandleFunc(t.method+" "+t.path, func(w http.ResponseWriter, r *http.Request) {
			if RightsOf(r.Context()) < t.rights {
				api.WriteReply(w, nil, refuse(api.CodeForbidden, "%s %s requires the right %s", r.Method, r.URL.Path, t.rights), codeOf)
				return
			}
			r.Body = http.MaxBytesReader(w, r.Body, api.MaxBody)
			if answer, err := t.handle(d, r, w); answer != nil || err != nil {
				api.WriteReply(w, answer, err, codeOf)
			}
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		api.WriteReply(w, nil, refuse(api.CodeNoSuchRequest, "there is no %s %s", r.Method, r.URL.Path), codeOf)
	})
	return mux
}
