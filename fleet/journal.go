package fleet

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/newfile"
)

// The state on disk is two files:
//
//	state.json   the state after line SEQ; replaced as a whole
//	state.log    the lines since:
//
//	{"seq":7,"time":"…","op":"fork","layers":[…],"nodes":[…],"crc":"89abcdef"}⏎
//	└─────────────── CRC-32C of these bytes ────────────────┘
//
// A line is one write(2), made before the operation is acknowledged: it survives the death of the process. It is durable
// after sync. What a crash left of the last line is cut. Lines that state.json contains already are ignored, so that
// nothing is lost, or executed twice, between the replacement of state.json and the truncation of state.log.
const (
	stateFile = "state.json"
	logFile   = "state.log"
)

// formatVersion is that of both files.
const formatVersion = 1

// storedState is the content of state.json.
type storedState struct {
	Version int           `json:"version"`
	Seq     uint64        `json:"seq"`
	Next    uint64        `json:"next_layer"`
	Disks   []diskRecord  `json:"disks"`
	Layers  []layerRecord `json:"layers"`
	Nodes   []nodeRecord  `json:"nodes"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encodeLine returns a line of the journal.
func encodeLine(c *change) ([]byte, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	b = b[:len(b)-1] // the closing brace
	return fmt.Appendf(b, ",\"crc\":\"%08x\"}\n", crc32.Checksum(b, castagnoli)), nil
}

// crcBytes is the length of the end of a line, from the comma before the CRC to the newline.
const crcBytes = len(",\"crc\":\"89abcdef\"}\n")

// decodeLine reads a line, with its newline. Anything else than what encodeLine returned is an error.
func decodeLine(line []byte) (*change, error) {
	if len(line) < crcBytes+1 {
		return nil, errors.New("it is too short")
	}
	body := line[:len(line)-crcBytes]
	if want := fmt.Sprintf(",\"crc\":\"%08x\"}\n", crc32.Checksum(body, castagnoli)); string(line[len(body):]) != want {
		return nil, errors.New("its checksum is wrong")
	}
	var c change
	d := json.NewDecoder(bytes.NewReader(append(bytes.Clone(body), '}')))
	d.DisallowUnknownFields() // of a later version: its meaning is not known
	if err := d.Decode(&c); err != nil {
		return nil, err
	}
	return &c, nil
}

// A journal is the open state.log. Its methods but sync belong to one goroutine at a time.
type journal struct {
	dir  string
	f    *os.File
	size int64  // bytes of lines
	room int64  // bytes that have space allocated
	tail []byte // lines since the fold under way began; nil: none is under way

	written atomic.Uint64 // the last line
	syncing sync.Mutex
	synced  atomic.Uint64 // the last line that is durable
	failed  atomic.Pointer[error]
}

// loadState reads the state of a directory. whole is the length of the lines of state.log that are whole, cut what follows.
func loadState(dir string) (s *state, whole int, cut []byte, err error) {
	s = newState()
	text, err := os.ReadFile(filepath.Join(dir, stateFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, 0, nil, err
	default:
		if err := s.decode(text); err != nil {
			return nil, 0, nil, fmt.Errorf("%s: %w", filepath.Join(dir, stateFile), err)
		}
	}
	path := filepath.Join(dir, logFile)
	text, err = os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil, err
	}
	whole, err = s.replay(text)
	if err != nil {
		return nil, 0, nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := s.check(); err != nil {
		return nil, 0, nil, fmt.Errorf("%s, %s: %w", filepath.Join(dir, stateFile), logFile, err)
	}
	return s, whole, text[whole:], nil
}

// decode reads state.json.
func (s *state) decode(text []byte) error {
	var st storedState
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&st); err != nil {
		return err
	}
	if st.Version != formatVersion {
		return fmt.Errorf("version %d is not known, %d is", st.Version, formatVersion)
	}
	s.apply(&change{Seq: st.Seq, Disks: st.Disks, Layers: st.Layers, Nodes: st.Nodes})
	s.Next = max(s.Next, st.Next)
	return nil
}

// replay executes the lines of a journal, and returns how many bytes of it are whole lines.
func (s *state) replay(text []byte) (whole int, err error) {
	for whole < len(text) {
		n := bytes.IndexByte(text[whole:], '\n') + 1
		if n == 0 {
			return whole, nil
		}
		c, err := decodeLine(text[whole : whole+n])
		switch {
		case err != nil:
			return whole, nil
		case c.Seq > s.Seq+1:
			return 0, fmt.Errorf("byte %d: line %d follows line %d: lines between them are missing", whole, c.Seq, s.Seq)
		case c.Seq == s.Seq+1:
			s.apply(c)
		}
		whole += n
	}
	return whole, nil
}

// encode returns the content of state.json.
func (s *state) encode() ([]byte, error) {
	st := storedState{Version: formatVersion, Seq: s.Seq, Next: s.Next, Disks: []diskRecord{}, Layers: []layerRecord{}, Nodes: []nodeRecord{}}
	for _, d := range sorted(s.Disks) {
		st.Disks = append(st.Disks, *d)
	}
	for _, l := range sorted(s.Layers) {
		st.Layers = append(st.Layers, *l)
	}
	for _, n := range sorted(s.Nodes) {
		st.Nodes = append(st.Nodes, *n)
	}
	b, err := json.MarshalIndent(st, "", " ")
	return append(b, '\n'), err
}

// writeState replaces state.json, durably.
func writeState(dir string, text []byte) error {
	return newfile.Write(filepath.Join(dir, stateFile), newfile.Options{Replace: true}, func(f *os.File) error {
		_, err := f.Write(text)
		return err
	})
}

// openJournal opens state.log, or makes it, and cuts it after its whole lines, durably. seq is the last line.
func openJournal(dir string, whole int64, seq uint64) (*journal, error) {
	path := filepath.Join(dir, logFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	if err = f.Truncate(whole); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = block.SyncDirectory(dir)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	j := &journal{dir: dir, f: f, size: whole}
	j.written.Store(seq)
	j.synced.Store(seq)
	return j, nil
}

// replaceLog replaces state.log, durably, by one with the given lines.
func replaceLog(dir string, lines []byte) (*os.File, error) {
	path := filepath.Join(dir, logFile)
	f, err := os.OpenFile(path+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err = f.Write(lines); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err == nil {
		err = block.SyncDirectory(dir)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// journalRoom is how much space is allocated ahead of the lines: when the file system is full, elements can be dropped
// still.
const journalRoom = 256 << 10

// allocate makes sure that there is space for n bytes of lines, and where it can for more.
func (j *journal) allocate(n int64) error {
	if j.size+n+journalRoom/2 <= j.room {
		return nil
	}
	err := unix.Fallocate(int(j.f.Fd()), unix.FALLOC_FL_KEEP_SIZE, j.size, n+journalRoom)
	switch {
	case err == nil:
		j.room = j.size + n + journalRoom
	case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%s: %w", filepath.Join(j.dir, logFile), err)
	default:
		j.room = j.size + n // a file system without the call
	}
	return nil
}

// append writes a line. freeing: it may use the last of the space. An error with broken false left everything as it was.
func (j *journal) append(c *change, freeing bool) (broken bool, err error) {
	if failed := j.failed.Load(); failed != nil {
		return true, *failed
	}
	line, err := encodeLine(c)
	if err != nil {
		return false, err
	}
	n := int64(len(line))
	if err := j.allocate(n); err != nil && (!freeing || j.size+n > j.room) {
		return false, err
	}
	if _, err := j.f.Write(line); err != nil {
		j.fail(err)
		j.f.Truncate(j.size) // so that no part of the line is left; reading it stops there anyway
		return true, err
	}
	j.size += n
	if j.tail != nil {
		j.tail = append(j.tail, line...)
	}
	j.written.Store(c.Seq)
	return false, nil
}

func (j *journal) fail(err error) { j.failed.CompareAndSwap(nil, &err) }

// sync makes all lines up to seq durable. Concurrent callers share a flush.
func (j *journal) sync(seq uint64) error {
	if j.synced.Load() >= seq {
		return nil
	}
	j.syncing.Lock()
	defer j.syncing.Unlock()
	if j.synced.Load() >= seq {
		return nil
	}
	if failed := j.failed.Load(); failed != nil {
		return *failed
	}
	upTo := j.written.Load()
	if err := unix.Fdatasync(int(j.f.Fd())); err != nil {
		j.fail(fmt.Errorf("%s: flush: %w", filepath.Join(j.dir, logFile), err))
		return *j.failed.Load()
	}
	j.synced.Store(upTo)
	return nil
}

// foldAt is the size of state.log in bytes from which it is folded into state.json.
const foldAt = 4 << 20

// replace replaces state.log by one with the lines that were appended since the fold began: state.json contains the others.
func (j *journal) replace() error {
	j.syncing.Lock()
	defer j.syncing.Unlock()
	f, err := replaceLog(j.dir, j.tail)
	if err != nil {
		return err
	}
	j.f.Close()
	j.f, j.size, j.room, j.tail = f, int64(len(j.tail)), 0, nil
	j.synced.Store(j.written.Load())
	return nil
}
