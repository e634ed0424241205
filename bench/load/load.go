// Package load is a lean load generator: it keeps a number of requests in flight and spends as little as possible on each,
// so that the server is the limit and not the client. It speaks plain NBD with simple replies, or is a front-end of
// vhost-user-blk.
//
//	r, err := load.NBD(ctx, "server.sock", "", load.Job{Block: 4096, Depth: 16, Size: 1 << 30, Random: true, Time: time.Second})
//
// New requests are sent in one system call, and as many replies as there are are received in one. Data that was read is dropped unchecked;
// every reply must be without an error. One goroutine, locked to its thread, does everything for a connection.
package load

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// A Job says what is requested. Count or Time bounds it, or both do.
type Job struct {
	Write  bool
	Block  int           // bytes of a request
	Depth  int           // requests in flight
	Size   int64         // bytes of the disk that are used, from the beginning; a multiple of Block
	Random bool          // in an order in which each block comes once before any comes again
	Seed   uint64        // of that order
	Flush  bool          // a flush after each request; only with a depth of 1
	Count  int64         // requests at most; 0 is no limit
	Time   time.Duration // after which no more are sent; 0 is no limit
}

// A Result is what was done. Flushes are not counted.
type Result struct {
	Requests int64
	Elapsed  time.Duration
}

// Rate is in requests a second.
func (r Result) Rate() float64 { return float64(r.Requests) / r.Elapsed.Seconds() }

func (j Job) check() error {
	switch {
	case j.Block <= 0 || j.Depth <= 0 || j.Size < int64(j.Block) || j.Size%int64(j.Block) != 0:
		return errors.New("load: block, depth and size must be positive, and the size a multiple of the block")
	case j.Count <= 0 && j.Time <= 0:
		return errors.New("load: a job without an end")
	case j.Flush && j.Depth != 1:
		return errors.New("load: a flush after each request with more than one in flight")
	}
	return nil
}

// offset returns where request i goes.
func (j Job) offset(i int64) int64 {
	blocks := j.Size / int64(j.Block)
	at := i % blocks
	if j.Random {
		at = permute(at, blocks, j.Seed)
	}
	return at * int64(j.Block)
}

// permute is a bijection on [0, n) for each seed, without pattern: one on the next power of two, repeated until it is inside.
func permute(i, n int64, seed uint64) int64 {
	mask := uint64(1)
	for mask < uint64(n) {
		mask <<= 1
	}
	mask--
	seed = seed*0x9E3779B97F4A7C15 + 0x1234567
	x := uint64(i)
	for {
		for range 3 {
			x = (x*0x9E3779B97F4A7C15 + seed) & mask
			x ^= x >> 13
		}
		if x < uint64(n) {
			return int64(x)
		}
	}
}

// A schedule hands out the requests of a job.
type schedule struct {
	job   Job
	ctx   context.Context
	began time.Time
	sent  int64
	over  bool
}

func begin(ctx context.Context, j Job) *schedule {
	return &schedule{job: j, ctx: ctx, began: time.Now()}
}

// round looks at the clock; it is called once before new requests are made.
func (s *schedule) round() {
	s.over = s.over || s.job.Time > 0 && time.Since(s.began) >= s.job.Time || s.ctx.Err() != nil
}

// next returns the offset of the next request, or false when there is none.
func (s *schedule) next() (int64, bool) {
	if s.over || s.job.Count > 0 && s.sent == s.job.Count {
		return 0, false
	}
	s.sent++
	return s.job.offset(s.sent - 1), true
}

// result is what was done when all requests have been answered.
func (s *schedule) result() (Result, error) {
	if err := s.ctx.Err(); err != nil {
		return Result{}, fmt.Errorf("load: %w", err)
	}
	return Result{s.sent, time.Since(s.began)}, nil
}
