package kernel_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// A script is what both sides do: an origin, its snapshots, and steps one after the other.
type script struct {
	seed          uint64
	originSectors int64
	snaps         []snapConf
	steps         []step
}

// snapConf is how one snapshot of a script is set up.
type snapConf struct {
	store      string // "P", "PO" or "N"
	chunk      int64  // sectors
	cowSectors int64
	length     int64  // sectors of the origin it covers
	features   string // as in a table, with their number, or empty
}

func (c snapConf) discards() bool { return c.features != "" }

// The kinds of steps.
const (
	doWrite   = "write"   // off, n bytes of seed's stream to target
	doDiscard = "discard" // off, n bytes of a snapshot
	doFlush   = "flush"
	doDetach  = "detach" // remove the snapshot's device; its store stays
	doAttach  = "attach" // set it up again, when it is not there
	doGrow    = "grow"   // n more sectors for its COW device
	doMerge   = "merge"  // merge it into the origin, to the end; it is gone then
)

const origin = -1 // a step's target that is no snapshot

// A step is one operation of a script.
type step struct {
	kind   string
	target int
	off, n int64
	seed   uint64
}

func (s step) String() string {
	where := "origin"
	if s.target != origin {
		where = fmt.Sprintf("snap%d", s.target)
	}
	switch s.kind {
	case doWrite, doDiscard:
		return fmt.Sprintf("%s %s sectors %d+%d", s.kind, where, s.off/512, s.n/512)
	case doGrow:
		return fmt.Sprintf("grow the COW device of %s by %d sectors", where, s.n)
	}
	return s.kind + " " + where
}

func (s script) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "origin of %d sectors\n", s.originSectors)
	for i, c := range s.snaps {
		fmt.Fprintf(&b, "snap%d: %s, chunk %d, COW %d sectors, length %d %s\n", i, c.store, c.chunk, c.cowSectors, c.length, c.features)
	}
	for i, st := range s.steps {
		fmt.Fprintf(&b, "%3d  %v\n", i, st)
	}
	return b.String()
}

// newScript makes the script of a seed.
func newScript(seed uint64) script {
	r := rand.New(rand.NewPCG(seed, 0x6b65726e656c))
	s := script{seed: seed, originSectors: 64 + r.Int64N(1<<(6+r.IntN(6)))}
	for range 1 + r.IntN(3) {
		s.snaps = append(s.snaps, newSnapConf(r, s.originSectors))
	}
	for range 15 + r.IntN(25) {
		s.steps = append(s.steps, newStep(r, s))
	}
	return s
}

func newSnapConf(r *rand.Rand, originSectors int64) snapConf {
	c := snapConf{length: originSectors}
	// Small chunks fill areas, which is where most can go wrong; large ones are used as well.
	c.chunk = 1 << r.IntN(4)
	if r.IntN(3) == 0 {
		c.chunk = 1 << r.IntN(11)
	}
	c.store = []string{"P", "P", "P", "PO", "PO", "N"}[r.IntN(6)]
	// Shorter ones end with a chunk: a write behind the end does not wait for the copy of a chunk that
	// straddles it, so what the COW device gets behind the end, which nobody sees, is chance.
	if r.IntN(8) == 0 && originSectors > c.chunk {
		c.length = c.chunk * (1 + r.Int64N(originSectors/c.chunk))
	}
	if r.IntN(3) == 0 {
		c.features = []string{"1 discard_zeroes_cow", "2 discard_zeroes_cow discard_passdown_origin"}[r.IntN(2)]
	}
	all := (originSectors+c.chunk-1)/c.chunk + 3
	all += all / (32 * c.chunk)
	chunks := all + r.Int64N(4)
	if r.IntN(3) == 0 { // too small for everything
		chunks = 2 + r.Int64N(all)
	}
	c.cowSectors = sound(c.chunk, chunks)*c.chunk + r.Int64N(c.chunk)
	return c
}

// sound avoids COW devices that end where the next area would begin: there the kernel gives up a
// snapshot which dmsnap keeps, on purpose (H10); TestEndAtAnAreaEdge has them.
func sound(chunk, chunks int64) int64 {
	if perArea := 32*chunk + 1; chunks > 2 && chunks%perArea == 1 {
		chunks++
	}
	return chunks
}

// grown is the size of a COW device after a growth of the given number of sectors.
func grown(c snapConf, by int64) int64 {
	sectors := c.cowSectors + by
	return max(sectors, sound(c.chunk, sectors/c.chunk)*c.chunk)
}

func newStep(r *rand.Rand, s script) step {
	st := step{target: r.IntN(len(s.snaps)), seed: r.Uint64N(1 << 32)}
	c := s.snaps[st.target]
	switch p := r.IntN(100); {
	case p < 38:
		st.kind = doWrite
		st.off, st.n = extent(r, c.length, c.chunk)
	case p < 75:
		st.kind, st.target = doWrite, origin
		st.off, st.n = extent(r, s.originSectors, c.chunk)
	case p < 83:
		if st.kind = doFlush; c.discards() && c.length >= c.chunk {
			st.kind = doDiscard
			st.off, st.n = wholeChunks(r, c)
		}
	case p < 86:
		st.kind = doFlush
	case p < 91:
		st.kind = doDetach
	case p < 96:
		st.kind = doAttach
	case p < 98:
		st.kind, st.n = doGrow, 1+r.Int64N(8*c.chunk)
	default:
		st.kind = doMerge
	}
	return st
}

// wholeChunks picks a range to discard. Only of whole chunks the outcome is defined: a range that begins
// inside a chunk is cut by the kernel's block layer into pieces of a chunk's length, each of which dm cuts
// again, so that no piece is a whole chunk, and what a part becomes is up to the COW device.
func wholeChunks(r *rand.Rand, c snapConf) (off, n int64) {
	whole := c.length / c.chunk
	first := r.Int64N(whole)
	count := min(whole-first, 1+r.Int64N(16))
	return first * c.chunk * 512, count * c.chunk * 512
}

// extent picks a range in bytes: of all alignments, and of the kinds that mean something to a chunk.
func extent(r *rand.Rand, sectors, chunk int64) (off, n int64) {
	switch r.IntN(4) {
	case 0: // whole chunks
		first := r.Int64N((sectors + chunk - 1) / chunk)
		off, n = first*chunk, chunk*(1+r.Int64N(16))
	case 1: // the end of the device
		n = min(sectors, 1+r.Int64N(2*chunk))
		off = sectors - n
	default:
		off, n = r.Int64N(sectors), 1+r.Int64N(min(256, 12*chunk))
	}
	n = min(n, sectors-off)
	return off * 512, n * 512
}
