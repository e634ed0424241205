package server

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dmsnap/dmsnap/cowfile"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
)

// TestCountersInTheStatus follows the counters of a snapshot through writes to both disks and a live merge.
func TestCountersInTheStatus(t *testing.T) {
	p := newPair(t)
	s := p.open(t, Options{Sync: snapshot.SyncAlways})
	if err := s.ExportOrigin(); err != nil {
		t.Fatal(err)
	}
	dev, err := s.Device("disk")
	if err != nil {
		t.Fatal(err)
	}
	writeAt(t, s.Origin(), "changed", 0)
	writeAt(t, dev, "written", 100_000)
	st := s.Status()
	c := st.Snapshots[0].Counters
	if c.PreservedChunks != 1 || c.PreservedBytes != 4096 || c.WrittenChunks != 1 || c.FilledBytes != 4096-7 || c.Exceptions != 2 {
		t.Errorf("one chunk of each kind: %+v", c)
	}
	if c.Syncs < 2 || c.Rounds.Count != c.Syncs || c.Rounds.Seconds <= 0 || len(c.Rounds.Buckets) == 0 {
		t.Errorf("a sync of each kind: %+v", c)
	}
	if o := st.Origin.Counters; o.SyncWaits.Count != 1 || o.WriteBacks != 0 {
		t.Errorf("one origin write that waited: %+v", o)
	}
	if text, err := json.Marshal(st); err != nil || !bytes.Contains(text, []byte(`"reader_waits":{"count":0,"seconds":0,"buckets":[]}`)) {
		t.Errorf("%v: %s", err, text)
	}
	if _, err := s.StartMerge("disk"); err != nil {
		t.Fatal(err)
	}
	for s.Status().Merge.State == api.MergeRunning {
		time.Sleep(time.Millisecond)
	}
	if c := s.Status().Snapshots[0].Counters; c.PreservedChunks != 1 || c.Exceptions != 2 {
		t.Errorf("the counters after the merge: %+v", c)
	}
}

// TestLoggerReceivesRecords has a snapshot find no space.
func TestLoggerReceivesRecords(t *testing.T) {
	p := newPair(t)
	small := filepath.Join(p.dir, "small.cow")
	if _, err := cowfile.Create(p.origin, small, cowfile.Options{Size: 12 << 10}); err != nil {
		t.Fatal(err)
	}
	var records bytes.Buffer
	s := p.open(t, Options{Logger: slog.New(slog.NewJSONHandler(&records, nil))})
	if _, err := s.Attach(api.AttachRequest{Name: "small", COW: small}); err != nil {
		t.Fatal(err)
	}
	dev, err := s.Device("small")
	if err != nil {
		t.Fatal(err)
	}
	writeAt(t, dev, "fits", 0)
	if _, err := dev.WriteAt([]byte("does not"), 40_000); err == nil {
		t.Fatal("two chunks fit into a COW file of one")
	}
	var r struct{ Level, Msg, Snapshot, Kind, Error string }
	if err := json.Unmarshal(records.Bytes(), &r); err != nil {
		t.Fatalf("%v: %s", err, records.Bytes())
	}
	if r.Level != "WARN" || r.Snapshot != "small" || r.Kind != "full" || !strings.HasPrefix(r.Msg, "No space") || r.Error == "" {
		t.Errorf("the record of a full COW file: %+v", r)
	}
}

// TestOperationsAreLogged: what is done by the control API, and how a merge goes, is a line each with disk, snapshot and operation.
func TestOperationsAreLogged(t *testing.T) {
	p := newPair(t)
	var records bytes.Buffer
	s := p.open(t, Options{Logger: slog.New(slog.NewJSONHandler(&records, nil))})
	do := func(method, path, body string) {
		t.Helper()
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
		if w.Code != http.StatusOK {
			t.Fatalf("%s %s: %d %s", method, path, w.Code, w.Body)
		}
	}
	do("POST", "/v1/snapshots", `{"name":"a","cow":"`+filepath.Join(p.dir, "a.cow")+`","create":true}`)
	dev, err := s.Device("a")
	if err != nil {
		t.Fatal(err)
	}
	writeAt(t, dev, "merged", 0)
	do("POST", "/v1/merge", `{"name":"a"}`)
	if m, err := s.Merge(t.Context(), time.Minute); err != nil || m.State != api.MergeDone {
		t.Fatalf("%+v, %v", m, err)
	}
	do("DELETE", "/v1/snapshots/a", "")
	var got []string
	for line := range strings.Lines(records.String()) {
		var r struct{ Level, Msg, Disk, Snapshot, Operation string }
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		if r.Operation == "" { // of the engine
			continue
		}
		if r.Level != "INFO" || r.Disk != p.origin || r.Snapshot != "a" {
			t.Errorf("record %s", line)
		}
		got = append(got, r.Operation+": "+r.Msg)
	}
	if want := "attach: attached; merge: merge started; merge: merge done; drop: dropped"; strings.Join(got, "; ") != want {
		t.Errorf("logged: %q, want %q", strings.Join(got, "; "), want)
	}
}
