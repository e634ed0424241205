package vhost

import (
	"encoding/binary"
	"errors"
	"sync"
)

// Behind the areas of the rings, the in-flight memory that this package makes says which writes were completed and not
// flushed: a front-end keeps that memory when its back-end is killed, and what such writes changed may be lost then. Others do
// not look at it: the size is the back-end's choice (§8).
//
//	 0  8  "dmsnapUF"
//	 8  8  writes that completed (little-endian)
//	16  8  of these, how many were durable then
const (
	unflushedSize  = 64
	unflushedMagic = "dmsnapUF"
)

var errLost = errors.New("an earlier server ended before completed writes were durable: they may be lost")

// An unflushed counts the writes of a session that completed and are not durable. Its methods may be called concurrently,
// under guard.
type unflushed struct {
	mu               sync.Mutex
	area             []byte // nil: nothing survives this process
	written, flushed uint64
	lost             bool // what an earlier process completed and did not flush: each flush fails
}

// set takes over in-flight memory with the areas of the rings, of n bytes, and what an earlier process left in it.
func (u *unflushed) set(memory []byte, n, stride uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.area, u.written, u.flushed = nil, 0, 0
	used := false // by some back-end
	for at := uint64(0); at < n; at += stride {
		used = used || binary.LittleEndian.Uint16(memory[at+8:]) != 0
	}
	u.lost = used
	if uint64(len(memory)) < n+unflushedSize {
		return
	}
	u.area = memory[n:][:unflushedSize]
	switch {
	case string(u.area[:8]) == unflushedMagic:
		u.written, u.flushed = binary.LittleEndian.Uint64(u.area[8:]), binary.LittleEndian.Uint64(u.area[16:])
		u.lost = u.written != u.flushed
	case !used:
		clear(u.area)
		copy(u.area, unflushedMagic)
	default:
		u.area = nil
	}
}

// wrote counts a write that changed the device, or may have, before it is completed.
func (u *unflushed) wrote() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.written++
	if u.area != nil {
		binary.LittleEndian.PutUint64(u.area[8:], u.written)
	}
}

// pending reports whether there is something to flush that no earlier process lost.
func (u *unflushed) pending() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return !u.lost && u.written != u.flushed
}

// flush calls do, which makes durable all that completed before.
func (u *unflushed) flush(do func() error) error {
	u.mu.Lock()
	lost, covers := u.lost, u.written
	u.mu.Unlock()
	if lost {
		return errLost
	}
	if err := do(); err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.flushed = max(u.flushed, covers)
	if u.area != nil {
		binary.LittleEndian.PutUint64(u.area[16:], u.flushed)
	}
	return nil
}
