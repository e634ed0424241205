package api

// Daemon is the reply to GET /v1/daemon: what the daemon of a fleet is and serves.
type Daemon struct {
	Dir         string      `json:"dir"`
	PID         int         `json:"pid"`
	URIs        []string    `json:"uris"` // where its exports are found, without a name
	Disks       int         `json:"disks"`
	Checkpoints int         `json:"checkpoints"`
	Nodes       int         `json:"nodes"`
	Connections int64       `json:"connections"`
	Bytes       int64       `json:"allocated_bytes"`  // of the files of all layers
	AllowPaths  []string    `json:"allow_paths"`      // directories in which paths in requests must lie
	Rights      string      `json:"rights"`           // of the client that asked: read, write or admin
	Error       string      `json:"error,omitempty"`  // why no changes are accepted
	Merges      []TreeMerge `json:"merges,omitempty"` // into disks, under way or the last one of each
}
