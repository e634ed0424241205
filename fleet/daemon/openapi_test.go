package daemon

import (
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/server/api"
)

var update = flag.Bool("update", false, "write openapi.json")

// TestDescriptionIsOfTheRoutes makes the description of the routes and of the types of package api with their comments, and
// compares it with the file that is served. -update writes the file.
func TestDescriptionIsOfTheRoutes(t *testing.T) {
	b, err := json.MarshalIndent(describe(t), "", " ")
	if err != nil {
		t.Fatal(err)
	}
	b = append(b, '\n')
	if *update {
		if err := os.WriteFile("openapi.json", b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if now, _ := os.ReadFile("openapi.json"); string(now) != string(b) {
		t.Error("openapi.json is not up to date: go test ./fleet/daemon -run TestDescription -update")
	}
}

type object = map[string]any

// describe makes the description.
func describe(t *testing.T) object {
	s := &schemas{all: object{}, comments: commentsOf(t, "../../server/api")}
	s.of(reflect.TypeFor[api.ErrorReply]())
	paths := object{}
	for _, r := range routes() {
		of, _ := paths[r.path].(object)
		if of == nil {
			of = object{}
			paths[r.path] = of
		}
		of[strings.ToLower(r.method)] = s.operation(r)
	}
	return object{
		"openapi": "3.1.0",
		"info": object{"title": "dmsnap daemon", "version": "1", "license": object{"name": "Apache-2.0"},
			"description": "The control API of dmsnap daemon: HTTP with JSON on a unix socket. Fields are added, never renamed or removed. A request that changes something goes on when its client disconnects."},
		"servers":    []any{object{"url": "http://dmsnap", "description": "the host is ignored; connect to the control socket"}},
		"paths":      paths,
		"components": object{"schemas": s.all},
	}
}

func (s *schemas) operation(r route) object {
	content := func(kind string, v any) object {
		return object{kind: object{"schema": s.of(reflect.TypeOf(v))}}
	}
	kind := "application/json"
	if r.path == "/v1/events" {
		kind = "text/event-stream"
	}
	codes := append([]api.Code{api.CodeFailed}, r.codes...)
	if r.rights > RightRead {
		codes = append(codes, api.CodeForbidden)
	}
	if r.body != nil {
		codes = append(codes, api.CodeBadRequest, api.CodeTooLarge)
	}
	byStatus := map[int][]string{}
	for _, c := range codes {
		byStatus[c.HTTPStatus()] = append(byStatus[c.HTTPStatus()], string(c))
	}
	responses := object{"200": object{"description": "Done", "content": content(kind, r.reply)}}
	for status, list := range byStatus {
		responses[fmt.Sprint(status)] = object{"description": "Codes: " + strings.Join(list, ", "), "content": content("application/json", api.ErrorReply{})}
	}
	op := object{"summary": r.summary, "responses": responses, "operationId": operationID(r), "x-rights": r.rights.String()}
	if strings.Contains(r.path, "{name}") {
		op["parameters"] = []any{object{"name": "name", "in": "path", "required": true, "schema": object{"type": "string"}}}
	}
	if r.body != nil {
		op["requestBody"] = object{"required": true, "content": content("application/json", r.body)}
	}
	return op
}

func operationID(r route) string {
	words := regexp.MustCompile(`[a-z]+`).FindAllString(strings.ReplaceAll(strings.TrimPrefix(r.path, "/v1"), "{name}", "one"), -1)
	return strings.ToLower(r.method) + "_" + strings.Join(words, "_")
}

// schemas are the components of the description.
type schemas struct {
	all      object
	comments map[string]string // by Type and Type.Field
}

// of is the schema of a type; that of a struct is a component.
func (s *schemas) of(t reflect.Type) object {
	switch {
	case t == reflect.TypeFor[time.Time]():
		return object{"type": "string", "format": "date-time"}
	case t == reflect.TypeFor[[]byte]():
		return object{"type": "string", "contentEncoding": "base64"}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return s.of(t.Elem())
	case reflect.Slice:
		return object{"type": []any{"array", "null"}, "items": s.of(t.Elem())}
	case reflect.Map:
		if t.Elem().Kind() == reflect.Interface {
			return object{"type": "object"}
		}
		return object{"type": "object", "additionalProperties": s.of(t.Elem())}
	case reflect.String:
		return object{"type": "string"}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Float64:
		return object{"type": "number"}
	case reflect.Struct:
		if t.NumField() == 0 {
			return object{"type": "object", "additionalProperties": false}
		}
		if s.all[t.Name()] == nil {
			c := object{"type": "object", "additionalProperties": false}
			s.all[t.Name()] = c
			properties, required := object{}, []any{}
			s.fields(t, properties, &required)
			c["properties"] = properties
			if len(required) > 0 {
				c["required"] = required
			}
			if text := s.comments[t.Name()]; text != "" {
				c["description"] = text
			}
		}
		return object{"$ref": "#/components/schemas/" + t.Name()}
	}
	return object{"type": "integer"}
}

func (s *schemas) fields(t reflect.Type, properties object, required *[]any) {
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous {
			s.fields(f.Type, properties, required)
			continue
		}
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		p := s.of(f.Type)
		if text := s.comments[t.Name()+"."+f.Name]; text != "" {
			p["description"] = text
		}
		properties[name] = p
		if !strings.Contains(options, "omit") {
			*required = append(*required, name)
		}
	}
}

// commentsOf reads the comments of types and fields in a folder.
func commentsOf(t *testing.T, dir string) map[string]string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(names) == 0 {
		t.Fatalf("%s: no files: %v", dir, err)
	}
	var files []*ast.File
	for _, name := range names {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	all := map[string]string{}
	text := func(groups ...*ast.CommentGroup) string {
		for _, g := range groups {
			if g != nil {
				return strings.Join(strings.Fields(g.Text()), " ")
			}
		}
		return ""
	}
	for _, file := range files {
		for _, d := range file.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.TYPE {
				continue
			}
			for _, spec := range g.Specs {
				ts := spec.(*ast.TypeSpec)
				all[ts.Name.Name] = text(ts.Doc, g.Doc)
				st, ok := ts.Type.(*ast.StructType)
				if !ok {
					continue
				}
				for _, f := range st.Fields.List {
					for _, n := range f.Names {
						all[ts.Name.Name+"."+n.Name] = text(f.Doc, f.Comment)
					}
				}
			}
		}
	}
	return all
}

// TestDescriptionIsOfTheServer: what the description has the server does, and nothing else; replies have the fields of their
// schemas.
func TestDescriptionIsOfTheServer(t *testing.T) {
	c := newFakeServer(t)
	var d struct {
		Paths map[string]map[string]struct {
			RequestBody *struct{} `json:"requestBody"`
			Responses   map[string]struct {
				Content map[string]struct {
					Schema object `json:"schema"`
				} `json:"content"`
			} `json:"responses"`
		} `json:"paths"`
		Components struct {
			Schemas map[string]object `json:"schemas"`
		} `json:"components"`
	}
	status, body := c.do(t, "GET", "/v1/openapi.json", "")
	if err := json.Unmarshal(body, &d); err != nil || status != 200 {
		t.Fatalf("status %d, %v", status, err)
	}
	bodies := map[string]string{"/v1/disks": `{"name":"new","source":"` + c.file + `"}`, "/v1/disks/{name}/policy": `{"set":{"keep-last":"3"}}`,
		"/v1/fork": `{"from":"base","name":"b"}`, "/v1/checkpoint": `{"nodes":["a"],"name":"n"}`, "/v1/nodes/{name}/rollback": `{"checkpoint":"a@n"}`,
		"/v1/adopt": `{"node":"c","cow":"` + c.file + `","disk":"base"}`}
	names := map[string]string{"disks": "base", "heat": "base", "layers": "a@n", "nodes": "a", "checkpoints": "a@n"}
	count := 0
	for path, methods := range d.Paths {
		kind := strings.Split(path, "/")[2]
		for _, method := range []string{"GET", "POST", "PUT", "DELETE", "PATCH"} {
			op, there := methods[strings.ToLower(method)]
			at := strings.ReplaceAll(path, "{name}", names[kind])
			if path == "/v1/events" && there {
				continue // TestEvents
			}
			body := ""
			if op.RequestBody != nil {
				body = bodies[path]
			}
			status, reply := c.do(t, method, at, body)
			if !there {
				if status != 404 || !strings.Contains(string(reply), string(api.CodeNoSuchRequest)) {
					t.Errorf("%s %s is not described: status %d, %s", method, at, status, reply)
				}
				continue
			}
			count++
			r, known := op.Responses[fmt.Sprint(status)]
			if status != 200 || !known {
				t.Errorf("%s %s: status %d, %s", method, at, status, reply)
				continue
			}
			var v any
			if err := json.Unmarshal(reply, &v); err != nil {
				t.Fatalf("%s %s: %v", method, at, err)
			}
			for _, problem := range mismatches(d.Components.Schemas, r.Content["application/json"].Schema, v, "") {
				t.Errorf("%s %s: %s", method, at, problem)
			}
		}
	}
	if count != len(routes())-1 {
		t.Errorf("%d requests are described, and there are %d", count, len(routes())-1)
	}
}

// mismatches are where a value is not of a schema.
func mismatches(all map[string]object, schema object, v any, at string) (list []string) {
	if ref, ok := schema["$ref"].(string); ok {
		schema = all[strings.TrimPrefix(ref, "#/components/schemas/")]
	}
	kind := map[string]string{"<nil>": "null", "string": "string", "bool": "boolean", "float64": "number", "map[string]interface {}": "object", "[]interface {}": "array"}[fmt.Sprintf("%T", v)]
	want, several := schema["type"].([]any)
	if !several {
		want = []any{schema["type"]}
	}
	if !slices.Contains(want, any(kind)) && !(kind == "number" && want[0] == "integer") {
		return []string{fmt.Sprintf("%s is %s, want %v", at, kind, want)}
	}
	switch v := v.(type) {
	case []any:
		for i, e := range v {
			list = append(list, mismatches(all, schema["items"].(object), e, fmt.Sprintf("%s[%d]", at, i))...)
		}
	case map[string]any:
		properties, _ := schema["properties"].(object)
		for name, e := range v {
			p, ok := properties[name].(object)
			if !ok {
				p, ok = schema["additionalProperties"].(object)
			}
			switch {
			case ok:
				list = append(list, mismatches(all, p, e, at+"."+name)...)
			case schema["additionalProperties"] == false:
				list = append(list, at+"."+name+" is not described")
			}
		}
		required, _ := schema["required"].([]any)
		for _, name := range required {
			if _, there := v[name.(string)]; !there {
				list = append(list, fmt.Sprintf("%s.%v is missing", at, name))
			}
		}
	}
	return list
}
