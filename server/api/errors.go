package api

import (
	"errors"
	"net/http"
	"slices"
)

// A Code is the kind of an error, for programs.
type Code string

// The codes of errors.
const (
	CodeBadRequest     Code = "bad_request" // the body, or a value in it
	CodeBadName        Code = "bad_name"    // the name cannot be that of a snapshot
	CodeReadOnly       Code = "read_only"   // the server is read-only
	CodeNoSuchRequest  Code = "no_such_request"
	CodeNoSuchSnapshot Code = "no_such_snapshot"
	CodeNoMerge        Code = "no_merge"         // no merge was started, or it is complete
	CodeNameTaken      Code = "name_taken"       // another export has the name
	CodeMerging        Code = "merging"          // the request is not possible while a merge is under way
	CodeAlreadyMerging Code = "already_merging"  // another snapshot is being merged
	CodeInvalid        Code = "invalid"          // the snapshot's content is lost
	CodeNotEmpty       Code = "not_empty"        // the COW device holds something else; see AttachRequest.Force
	CodeOriginTooSmall Code = "origin_too_small" // the origin ends before the store's exceptions do; see AttachRequest.Force
	CodeUnfinished     Code = "unfinished_merge" // a merge of another COW device is not complete; see AttachRequest.Force
	CodeFixed          Code = "fixed"            // the snapshot is a volume of a group, which is neither dropped nor grown
	CodeTooLarge       Code = "too_large"        // the body is too long

	// Of fleets.
	CodeNoSuchDisk       Code = "no_such_disk"
	CodeNoSuchNode       Code = "no_such_node"
	CodeNoSuchCheckpoint Code = "no_such_checkpoint"
	CodeNoSuchElement    Code = "no_such_element" // neither a disk nor a node nor a checkpoint has the name
	CodeHasChildren      Code = "has_children"    // others lie on it
	CodeInUse            Code = "in_use"          // clients are connected, or another operation uses it
	CodeSealed           Code = "sealed"          // a checkpoint is never changed
	CodeNotAncestor      Code = "not_ancestor"    // the checkpoint is not one of the node's
	CodeQuota            Code = "quota"           // a policy's limit is reached
	CodeForbidden        Code = "forbidden"       // the client has no right to it, or the path is not allowed
	CodeFreezeFailed     Code = "freeze_failed"   // the freeze command failed or took too long
	CodeDiskFailed       Code = "disk_failed"     // the disk, or a layer, can't be read
	CodeNoSpace          Code = "no_space"        // the directory's file system is full
	CodeStateFailed      Code = "state_failed"    // the state could not be recorded: no changes are accepted until a restart

	CodeFailed Code = "failed" // anything else: a file that is missing, in use or no store; an I/O error
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

	CodeNoSuchDisk:       http.StatusNotFound,
	CodeNoSuchNode:       http.StatusNotFound,
	CodeNoSuchCheckpoint: http.StatusNotFound,
	CodeNoSuchElement:    http.StatusNotFound,
	CodeHasChildren:      http.StatusConflict,
	CodeInUse:            http.StatusConflict,
	CodeSealed:           http.StatusConflict,
	CodeNotAncestor:      http.StatusConflict,
	CodeQuota:            http.StatusForbidden,
	CodeForbidden:        http.StatusForbidden,
	CodeFreezeFailed:     http.StatusUnprocessableEntity,
	CodeDiskFailed:       http.StatusUnprocessableEntity,
	CodeNoSpace:          http.StatusInsufficientStorage,
	CodeStateFailed:      http.StatusInsufficientStorage,

	CodeFailed: http.StatusUnprocessableEntity,
}

// HTTPStatus returns the HTTP status that goes with the code.
func (c Code) HTTPStatus() int { return statusOf[c] }

// An Error is an error that the server reports. Message speaks of the API's own fields.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// HasCode reports whether err is an error of the server with one of the codes.
func HasCode(err error, codes ...Code) bool {
	var e *Error
	return errors.As(err, &e) && slices.Contains(codes, e.Code)
}

// ErrorReply is the body of every reply that is not a success.
type ErrorReply struct {
	Error Error `json:"error"`
}
