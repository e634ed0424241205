package inline

// Together says when cached reads that came together are executed together (block.CacheReader): after a group of which some had to be
// left, not for a while, which grows as long as that happens. The device may have no such ability, or its bytes are not in memory.
//
// Its zero value is ready. One goroutine at a time uses it.
type Together struct {
	pause int // reads to execute one by one before the next group
	last  int // the last pause
}

const (
	leastPause = 64
	mostPause  = 4096
)

// May reports whether the next read may begin a group.
func (x *Together) May() bool {
	if x.pause > 0 {
		x.pause--
		return false
	}
	return true
}

// Ended records whether all reads of a group were done.
func (x *Together) Ended(whole bool) {
	if whole {
		x.last = 0
	} else {
		x.last = min(max(leastPause, 2*x.last), mostPause)
	}
	x.pause = x.last
}
