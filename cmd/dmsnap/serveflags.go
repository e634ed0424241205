package main

import (
	"cmp"
	"errors"

	"github.com/dmsnap/dmsnap/server"
	"github.com/dmsnap/dmsnap/snapshot"
)

// syncFlag is the value of --sync.
type syncFlag struct{ snapshot.SyncMode }

func (f *syncFlag) Set(s string) error {
	switch s {
	case "flush":
		f.SyncMode = snapshot.SyncFlush
	case "always":
		f.SyncMode = snapshot.SyncAlways
	default:
		return errors.New("must be flush or always")
	}
	return nil
}

func (f *syncFlag) String() string {
	if f.SyncMode == snapshot.SyncAlways {
		return "always"
	}
	return "flush"
}

func (f *syncFlag) Type() string { return "flush|always" }

// fullFlag is the value of --on-full.
type fullFlag struct{ server.FullPolicy }

func (f *fullFlag) Set(s string) error {
	switch p := server.FullPolicy(s); p {
	case server.FullInvalidate, server.FullFail, server.FullPause:
		f.FullPolicy = p
		return nil
	}
	return errors.New("must be invalidate, fail or pause")
}

func (f *fullFlag) String() string { return string(cmp.Or(f.FullPolicy, server.FullFail)) }

func (f *fullFlag) Type() string { return "invalidate|fail|pause" }

// tlsFlag is the value of --tls.
type tlsFlag struct{ allow bool }

func (f *tlsFlag) Set(s string) error {
	if s != "require" && s != "allow" {
		return errors.New("must be require or allow")
	}
	f.allow = s == "allow"
	return nil
}

func (f *tlsFlag) String() string {
	if f.allow {
		return "allow"
	}
	return "require"
}

func (f *tlsFlag) Type() string { return "require|allow" }
