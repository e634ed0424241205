package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"time"
	"unicode/utf8"
)

// What servers of the API share: limits, bodies and replies.

const (
	MaxBody       = 64 << 10         // bytes of a request's body
	MaxWait       = 60 * time.Second // that a request waits for what it asks about
	finishTimeout = 5 * time.Second  // for requests under way when a server ends
)

// Serve serves h on l, which it closes, until ctx ends, and lets requests under way end then. Their contexts end with
// ctx. connContext, unless it is nil, adds what is known of a connection to the contexts of its requests.
func Serve(ctx context.Context, l net.Listener, h http.Handler, connContext func(context.Context, net.Conn) context.Context) error {
	s := &http.Server{Handler: h, MaxHeaderBytes: 16 << 10, IdleTimeout: time.Minute,
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: MaxWait + 30*time.Second, // it also bounds a long poll
		ErrorLog:    log.New(io.Discard, "", 0),
		BaseContext: func(net.Listener) context.Context { return ctx }, ConnContext: connContext}
	var closing error
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishTimeout)
		defer cancel()
		closing = errors.Join(s.Shutdown(late), s.Close())
	})
	err := s.Serve(l)
	if stop() {
		return err // ctx has not ended: the listener failed
	}
	<-closed
	return closing
}

// WriteReply writes an answer, or an error with the code that codeOf gives it.
func WriteReply(w http.ResponseWriter, answer any, err error, codeOf func(error) Code) {
	status := http.StatusOK
	if err != nil {
		e := Error{Code: codeOf(err), Message: err.Error()}
		status, answer = e.Code.HTTPStatus(), ErrorReply{Error: e}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(answer)
}

// ReadBody reads a request's body, which http.MaxBytesReader bounds to MaxBody, into v: one JSON object without unknown
// fields. Errors have codes.
func ReadBody(r *http.Request, v any) error {
	body, err := io.ReadAll(r.Body)
	if err == nil && !utf8.Valid(body) {
		err = errors.New("not UTF-8") // what could not be decoded would be another path or name
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err == nil {
		err = d.Decode(v)
	}
	if err == nil {
		if _, err = d.Token(); err == io.EOF {
			return nil
		}
		err = errors.New("more than one object")
	}
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return &Error{CodeTooLarge, fmt.Sprintf("the body is longer than %d bytes", MaxBody)}
	}
	return &Error{CodeBadRequest, fmt.Sprintf("body: %v", err)}
}
