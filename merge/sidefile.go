package merge

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/internal/newfile"
	"github.com/dmsnap/dmsnap/internal/undo"
	"github.com/dmsnap/dmsnap/ondisk"
	"github.com/dmsnap/dmsnap/snapshot"
)

// ErrUnfinished reports an origin that a merge of another COW device has started to change and not completed: the
// origin alone is a mixture of both contents.
var ErrUnfinished = errors.New("a merge into this origin is not complete")

// ErrNoSideFile reports an origin for which no side file can be made: a block device, or a file in a directory that
// can't be written to or has no space.
var ErrNoSideFile = errors.New("no side file can be made beside the origin")

const (
	sideFileSuffix = ".merging"
	sideFileBytes  = 1 << 20 // largest size that is read
)

// A SideFile marks a merge into an origin as incomplete. It is the file ORIGIN.merging in the directory of the origin
// (symbolic links resolved), and exists, durably, from before the first byte of the origin changes until the last one is
// durable. Callers of its methods hold the origin's lock as a writer; [ReadSideFile] may be called at any time.
//
// The merged COW device is identified by a random id in its first sector (ondisk.MergeLabel), also after it was moved.
// So is an undo store of the merge (by its ondisk.UndoLabel), which reverts the merge, and so are the other snapshots of
// the origin during a live merge, which preserve what it overwrites.
type SideFile struct {
	path string
	old  *sideFileBody // before Begin; nil where there was none
	now  sideFileBody
}

// sideFileBody is the content of a side file.
type sideFileBody struct {
	About string `json:"about"` // for people
	COW   string `json:"cow"`   // the path as it was; for messages only
	ID    string `json:"id"`    // of COW's MergeLabel

	// Undo are the ids of the undo stores of this merge.
	Undo []undoStore `json:"undo,omitempty"`
	// Back is the undo store that is being merged, to revert the merge.
	Back *takingBack `json:"taking_back,omitempty"`

	// Kept are the ids of the MergeLabels of the other snapshots during a live merge: they show over the mixture what
	// they showed before it.
	Kept []string `json:"kept,omitempty"`
}

type undoStore struct {
	ID    string `json:"id"`
	Whole bool   `json:"whole"` // it was made before the merge began
}

type takingBack struct {
	COW   string `json:"cow"`
	ID    string `json:"id"` // of its MergeLabel
	Whole bool   `json:"whole"`
}

const sideFileAbout = "dmsnap: a merge into the disk beside this file is not complete. Merge again to continue it."

// sideFilePath is where the side file of an origin is, or ErrNoSideFile for a device.
func sideFilePath(origin string) (string, error) {
	at, err := filepath.EvalSymlinks(origin)
	if err != nil {
		return "", err
	}
	info, err := os.Stat(at)
	switch {
	case err != nil:
		return "", err
	case !info.Mode().IsRegular():
		return "", fmt.Errorf("%w: %s is not a regular file", ErrNoSideFile, origin)
	}
	return at + sideFileSuffix, nil
}

// SideFilePath is where the side file of an origin is, or would be; "" for a device.
func SideFilePath(origin string) string {
	path, _ := sideFilePath(origin)
	return path
}

// ReadSideFile returns the side file of an origin, nil where there is none. One that can't be read, or is damaged, is
// ErrUnfinished.
func ReadSideFile(origin string) (*SideFile, error) {
	path, err := sideFilePath(origin)
	if errors.Is(err, ErrNoSideFile) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENAMETOOLONG) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w, it seems: %w", ErrUnfinished, err)
	}
	defer f.Close()
	s := &SideFile{path: path}
	b, err := io.ReadAll(io.LimitReader(f, sideFileBytes))
	if err == nil {
		err = json.Unmarshal(b, &s.now)
	}
	if err == nil && (s.now.COW == "" || len(s.now.ID) != 2*len(ondisk.MergeLabel{}.ID)) {
		err = errors.New("not the content of a side file")
	}
	if err != nil {
		return nil, fmt.Errorf("%w, it seems: side file %s: %w; remove that file if no merge was cut short", ErrUnfinished, path, err)
	}
	return s, nil
}

// CheckFurther refuses further disks of a volume group beside one of which there is a side file (ErrUnfinished): the merge was begun by an
// address of that disk, and is continued by it.
func CheckFurther(disks ...string) error {
	for _, disk := range disks {
		half, err := ReadSideFile(disk)
		if half != nil {
			err = half.Refuse()
		}
		if errors.Is(err, ErrUnfinished) {
			return err
		}
	}
	return nil
}

// Path is the path of the side file.
func (s *SideFile) Path() string { return s.path }

// COW is the path of the COW device that is merged, or of the undo store, if the merge is being reverted.
func (s *SideFile) COW() string {
	if s.now.Back != nil {
		return s.now.Back.COW
	}
	return s.now.COW
}

// TakingBack reports whether an undo store is merged to revert an earlier merge.
func (s *SideFile) TakingBack() bool { return s.now.Back != nil }

// Refuse returns the error for a COW device that does not belong to the merge.
func (s *SideFile) Refuse() error {
	return fmt.Errorf("%w: that of %s. Merge that one first, it continues; if this was done by other means, or the origin was replaced, remove %s",
		ErrUnfinished, s.COW(), s.path)
}

// Check returns ErrUnfinished for a store that does not belong to the merge: the origin is a mixture for it. The store
// that is being merged belongs to it, and so do its undo stores and the other snapshots of a live merge.
func (s *SideFile) Check(cow block.Device) error {
	merging, undos, err := readIDs(cow)
	if err != nil {
		return err
	}
	if s.now.Back != nil && merging == s.now.Back.ID || s.now.Back == nil && merging == s.now.ID || s.undoStore(undos) != nil || s.keeps(merging) {
		return nil
	}
	return s.Refuse()
}

// keeps reports whether the id is that of another snapshot during a live merge.
func (s *SideFile) keeps(id string) bool { return id != "" && slices.Contains(s.now.Kept, id) }

// readIDs returns the ids of a store's labels: as a merged store, and as an undo store. "" is none.
func readIDs(cow block.Device) (merging, undos string, err error) {
	var b [ondisk.SectorSize]byte
	if _, err := cow.ReadAt(b[:], 0); err != nil {
		return "", "", fmt.Errorf("read header: %w", err)
	}
	if t, ok := ondisk.DecodeMergeLabel(b[:]); ok {
		merging = hex.EncodeToString(t.ID[:])
	}
	if t, ok := ondisk.DecodeUndoLabel(b[:]); ok && t.Undo {
		undos = hex.EncodeToString(t.ID[:])
	}
	return merging, undos, nil
}

// undoStore finds an undo store of the merge by its id.
func (s *SideFile) undoStore(id string) *undoStore {
	if i := slices.IndexFunc(s.now.Undo, func(u undoStore) bool { return u.ID == id }); i >= 0 {
		return &s.now.Undo[i]
	}
	return nil
}

// Begin makes the side file durable, for an offline merge of cow into the origin, with the id in cow's first sector
// before it. If a side file exists, the merge of cow continues, or is reverted, or cow is refused (ErrUnfinished, nothing
// is changed) unless replace is set. ErrNoSideFile: none can be made. It is called before the first byte of the origin is
// written, and after an undo store of the whole merge was made: a new side file has it from the first moment.
func Begin(origin, cowPath string, cow block.Device, replace bool) (*SideFile, error) {
	m := merged{cow, func(change func([]byte)) error { return undo.ChangeFirst(cow, change) }}
	s, err := begin(origin, cowPath, m, replace)
	if err == nil && s.old == nil {
		_, err = s.noteUndo(cow)
	}
	if err != nil {
		return s, err
	}
	return s, s.write(origin)
}

// BeginLive is Begin for a live merge of a snapshot, and gives ids to the other snapshots of the origin too: they keep
// what the merge overwrites. One that can't be given an id is left out. It is called while s takes no writes.
func BeginLive(origin, cowPath string, s *snapshot.Snapshot, others []*snapshot.Snapshot, replace bool) (*SideFile, error) {
	side, err := begin(origin, cowPath, mergedSnapshot(s), replace)
	if err != nil {
		return side, err
	}
	for _, o := range others {
		if id, err := mergedSnapshot(o).id(); err == nil {
			side.now.Kept = append(side.now.Kept, id)
		}
	}
	return side, side.write(origin)
}

// merged is a store that is merged: its device, and how the first sector of that is changed, durably.
type merged struct {
	cow    block.Device
	change func(func(sector []byte)) error
}

func mergedSnapshot(s *snapshot.Snapshot) merged { return merged{s.COW(), s.ChangeLabel} }

// begin makes a SideFile what it is while cow is merged, without other snapshots, and does not write it.
func begin(origin, cowPath string, cow merged, replace bool) (*SideFile, error) {
	path, err := sideFilePath(origin)
	if err != nil {
		return nil, err
	}
	s, err := ReadSideFile(origin)
	if s != nil {
		err = s.Check(cow.cow)
	}
	switch {
	case err != nil && !(replace && errors.Is(err, ErrUnfinished)):
		return nil, err
	case err != nil || s == nil:
		s = &SideFile{path: path}
	default:
		old := s.now
		s.old = &old
	}
	if full, err := filepath.Abs(cowPath); err == nil {
		cowPath = full
	}
	err = s.begin(cowPath, cow)
	s.now.Kept = nil
	return s, err
}

// begin makes s what it is while cow is merged, except for Kept and Undo.
func (s *SideFile) begin(cowPath string, cow merged) error {
	merging, undos, err := readIDs(cow.cow)
	if err != nil {
		return err
	}
	u := s.undoStore(undos)
	switch {
	case s.old == nil:
		id, err := cow.label()
		if err != nil {
			return err
		}
		s.now = sideFileBody{About: sideFileAbout, COW: cowPath, ID: id}
	case s.now.Back != nil && merging == s.now.Back.ID:
		back := *s.now.Back
		back.COW = cowPath
		s.now.Back = &back
	case u != nil:
		id, err := cow.label()
		if err != nil {
			return err
		}
		s.now.Back = &takingBack{COW: cowPath, ID: id, Whole: u.Whole}
	case s.keeps(merging): // it has the whole of what it shows; what is merged does not matter to it
		s.now = sideFileBody{About: sideFileAbout, COW: cowPath, ID: merging}
	default:
		s.now.COW = cowPath
	}
	return nil
}

// label writes a new id to a store, durably.
func (m merged) label() (string, error) {
	var t ondisk.MergeLabel
	rand.Read(t.ID[:])
	return hex.EncodeToString(t.ID[:]), m.change(t.Encode)
}

// id returns the id of a store, which it is given if it has none.
func (m merged) id() (string, error) {
	id, _, err := readIDs(m.cow)
	if err == nil && id == "" {
		id, err = m.label()
	}
	return id, err
}

// Undo records the undo store of cow's merge, durably and before the merge continues, so that it is recognised when it
// is merged. It does nothing while a merge is reverted: an undo store of that is of no use before it is complete, and
// then there is no side file.
func (s *SideFile) Undo(origin string, cow block.Device) error {
	if noted, err := s.noteUndo(cow); err != nil || !noted {
		return err
	}
	return s.write(origin)
}

// noteUndo is Undo without a write. noted: it is to be written.
func (s *SideFile) noteUndo(cow block.Device) (noted bool, err error) {
	t, ok, err := readLabel(cow)
	if err != nil || !ok || s.now.Back != nil {
		return false, err
	}
	id := hex.EncodeToString(t.ID[:])
	if s.undoStore(id) != nil {
		return false, nil
	}
	s.now.Undo = append(slices.Clone(s.now.Undo), undoStore{ID: id, Whole: s.old == nil})
	return true, nil
}

// write makes the side file durable, with the permissions of the origin.
func (s *SideFile) write(origin string) error {
	b, err := json.MarshalIndent(s.now, "", "  ")
	if err != nil {
		panic(err) // strings
	}
	info, err := os.Stat(origin)
	if err != nil {
		return err
	}
	err = newfile.Write(s.path, newfile.Options{Replace: true}, func(f *os.File) error {
		if err := f.Chmod(info.Mode()&0o444 | 0o600); err != nil {
			return err
		}
		_, err := f.Write(append(b, '\n'))
		return err
	})
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.ENAMETOOLONG) || block.IsNoSpace(err) {
		err = fmt.Errorf("%w: %w", ErrNoSideFile, err)
	}
	return err
}

// Cancel restores the side file as it was before Begin. The origin must be unchanged since.
func (s *SideFile) Cancel(origin string) error {
	if s.old == nil {
		return s.remove()
	}
	s.now = *s.old
	return s.write(origin)
}

// End removes the side file, durably, when the merge of cow is complete and durable. It stays after the merge of an
// undo store that was made when the merge had already begun: the origin is as it was when that undo store was made.
func (s *SideFile) End(origin string, cow block.Device) error {
	merging, undos, err := readIDs(cow)
	if err != nil {
		return err
	}
	whole := true
	if u := s.undoStore(undos); u != nil {
		whole = u.Whole
	} else if s.now.Back != nil && merging == s.now.Back.ID {
		whole = s.now.Back.Whole
	}
	if !whole {
		s.now.Back = nil
		return s.write(origin)
	}
	return s.remove()
}

func (s *SideFile) remove() error {
	if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return block.SyncDirectory(filepath.Dir(s.path))
}
