package api

import "net/http"

// A Code is the kind of an error, for programs.
type Code string

// The codes of errors.
const (
	CodeBadRequest     Code = "bad_request" // the body, or a value in it
	CodeBadName        Code = "bad_name"    // the name cannot be that of a snapshot
	CodeReadOnly       Code = "read_only"   // the server is read-only
	CodeNoSuchRequest  Code = "no_such_request"
	CodeNoSuchSnapshot Code = "no_such_snapshot"
	CodeNoMerge        Code = "no_merge"         // no merge was started
	CodeNameTaken      Code = "name_taken"       // another export has the name
	CodeMerging        Code = "merging"          // the request is not possible while a merge is under way
	CodeAlreadyMerging Code = "already_merging"  // another snapshot is being merged
	CodeInvalid        Code = "invalid"          // the snapshot's content is lost
	CodeNotEmpty       Code = "not_empty"        // the COW device holds something else; see AttachRequest.Force
	CodeOriginTooSmall Code = "origin_too_small" // the origin ends before the store's exceptions do; see AttachRequest.Force
	CodeUnfinished     Code = "unfinished_merge" // a merge of another COW device is not complete; see AttachRequest.Force
	CodeFixed          Code = "fixed"            // the snapshot is a volume of a group, which is neither dropped nor grown
	CodeTooLarge       Code = "too_large"        // the body is too long
	CodeFailed         Code = "failed"           // anything else: a file that is missing, in use or no store; an I/O error
)

// statusOf is the HTTP status that goes with a code.
var statusOf = map[Code]int{
	CodeBadRequest:     http.StatusBadRequest,
	CodeBadName:        http.StatusBadRequest,
	CodeReadOnly:       http.StatusForbidden,
	CodeNoSuchRequest:  http.StatusNotFound,
	CodeNoSuchSnapshot: http.StatusNotFound,
	CodeNoMerge:        http.StatusNotFound,
	CodeNameTaken:      http.StatusConflict,
	CodeMerging:        http.StatusConflict,
	CodeAlreadyMerging: http.StatusConflict,
	CodeInvalid:        http.StatusConflict,
	CodeNotEmpty:       http.StatusUnprocessableEntity,
	CodeOriginTooSmall: http.StatusUnprocessableEntity,
	CodeUnfinished:     http.StatusUnprocessableEntity,
	CodeFixed:          http.StatusConflict,
	CodeTooLarge:       http.StatusRequestEntityTooLarge,
	CodeFailed:         http.StatusUnprocessableEntity,
}

// HTTPStatus returns the HTTP status that goes with the code.
func (c Code) HTTPStatus() int { return statusOf[c] }

// An Error is an error that the server reports. Message speaks of the API's own fields.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// ErrorReply is the body of every reply that is not a success.
type ErrorReply struct {
	Error Error `json:"error"`
}
