package merge

import (
	"cmp"
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
	"github.com/dmsnap/dmsnap/store"
)

// ErrUnfinished reports an origin that a merge of another COW device has started to change and not completed: the
// origin alone is a mixture of both contents.
var ErrUnfinished = errors.New("a merge into this origin is not complete")

// ErrMixture reports what would be read of an origin into which a merge is not complete: a mixture of both contents.
var ErrMixture = errors.New("what is read is a mixture")

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
	lost []LostUndo
}

// sideFileBody is the content of a side file.
type sideFileBody struct {
	About string `json:"about"` // for people
	COW   string `json:"cow"`   // the path as it was; for messages only. Of a daemon's merge its directory
	ID    string `json:"id"`    // of COW's MergeLabel

	// Undo are the undo stores of this merge, in the order in which they were made.
	Undo []undoStore `json:"undo,omitempty"`
	// Back is the undo store that is being merged, to revert the merge.
	Back *takingBack `json:"taking_back,omitempty"`

	// Daemon: it is the merge of a daemon, in whose layers the rest is. ID is its own.
	Daemon bool `json:"daemon,omitempty"`

	// Kept are the ids of the MergeLabels of other snapshots that preserve what the merge overwrites: they show over the mixture
	// what they showed before it.
	Kept []string `json:"kept,omitempty"`
}

// undoStore is an undo store of a merge. It has every chunk that the merge has overwritten since it was made, and every one that
// the merge is going to overwrite, unless After says otherwise.
type undoStore struct {
	ID    string `json:"id"`             // of its UndoLabel
	Whole bool   `json:"whole"`          // it was made before the merge began
	Path  string `json:"path,omitempty"` // as it was; where it is looked for when the merge continues

	// After is the id of a later one, made when there was more to merge than this one has: until that one is merged this one
	// restores a part only.
	After string `json:"after,omitempty"`
}

type takingBack struct {
	COW   string `json:"cow"`
	ID    string `json:"id"` // of its MergeLabel
	Whole bool   `json:"whole"`
	Undo  string `json:"undo,omitempty"` // of its UndoLabel
	Done  bool   `json:"done,omitempty"` // it is merged, and was not Whole: the origin is still a mixture
}

// An UndoStore is an undo store that [CheckUndo] has accepted, and its path.
type UndoStore struct {
	Path   string
	Device block.Device
}

// A LostUndo is an undo store that no longer reverts a merge, since the merge went on with chunks that it does not have. Path is
// empty where it is not known.
type LostUndo struct {
	Path string
	Err  error // why
}

// String says it for people.
func (l LostUndo) String() string {
	return fmt.Sprintf("undo store %s can't undo this merge any more: %v", l.Path, l.Err)
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

// CheckOrigin returns ErrMixture where a merge into the origin at path is not complete and a store over it, or the origin alone if there
// is none, shows a mixture for that reason; see [SideFile.Check]. It is called when the origin is open, so that no merge begins or ends
// meanwhile.
func CheckOrigin(path string, cows ...block.Device) error {
	half, err := ReadSideFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist): // there is no origin
		return nil
	case err != nil:
	case half == nil:
		return nil
	case len(cows) == 0:
		err = half.Refuse()
	}
	for _, cow := range cows {
		if err == nil {
			err = half.Check(cow)
		}
	}
	if errors.Is(err, ErrUnfinished) {
		err = fmt.Errorf("%w: %v", ErrMixture, err) // without the advice to force a merge
	}
	return block.WithPath(path, err)
}

// A DaemonMerge is the merge of a daemon, which keeps in Dir what is not merged yet. It has a side file like the merge of a COW device, so that
// nothing else uses the origin, and no store belongs to it.
type DaemonMerge struct {
	Dir string
	ID  [16]byte // by which the daemon knows its side file
}

// Begin makes the side file durable, before the first byte of the origin changes. One of another merge is ErrUnfinished, and where none can be made
// is ErrNoSideFile.
func (d DaemonMerge) Begin(origin string) error {
	if err := d.Check(origin); err != nil {
		return err
	}
	path, err := sideFilePath(origin)
	if err != nil {
		return err
	}
	s := &SideFile{path: path, now: sideFileBody{About: sideFileAbout, COW: absolute(d.Dir), ID: hex.EncodeToString(d.ID[:]), Daemon: true}}
	return s.write(origin)
}

// Check is CheckOrigin for the daemon.
func (d DaemonMerge) Check(origin string) error {
	if s, err := ReadSideFile(origin); err == nil && d.has(s) {
		return nil
	}
	return CheckOrigin(origin)
}

// End removes the side file, durably, if it is that of the daemon.
func (d DaemonMerge) End(origin string) error {
	s, err := ReadSideFile(origin)
	if err != nil || !d.has(s) {
		return err
	}
	return s.remove()
}

func (d DaemonMerge) has(s *SideFile) bool {
	return s != nil && s.now.Daemon && s.now.ID == hex.EncodeToString(d.ID[:])
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

// InPart reports whether the merge was reverted to a state after its beginning, by an undo store that is merged: older undo stores
// revert the rest, and nothing continues it.
func (s *SideFile) InPart() bool { return s.now.Back != nil && s.now.Back.Done }

// Lost are the undo stores that [SideFile.Continue] or [BeginLive] has found to be of no use from then on.
func (s *SideFile) Lost() []LostUndo { return s.lost }

// Refuse returns the error for a COW device that does not belong to the merge.
func (s *SideFile) Refuse() error {
	if s.now.Daemon {
		return fmt.Errorf("%w: that of the daemon in %s, which continues it when it runs; if the origin was replaced, remove %s", ErrUnfinished, s.now.COW, s.path)
	}
	if back := s.now.Back; s.InPart() {
		return fmt.Errorf("%w: that of %s was reverted by %s to where it was when that undo store was made, after it had begun, and %s does not have all of it any more. Merge an undo store that was made before; if the origin was restored by other means, remove %s",
			ErrUnfinished, s.now.COW, back.COW, s.now.COW, s.path)
	}
	return fmt.Errorf("%w: that of %s. Merge that one first, it continues; if this was done by other means, or the origin was replaced, remove %s",
		ErrUnfinished, s.COW(), s.path)
}

// Check returns ErrUnfinished for a store that does not belong to the merge: the origin is a mixture for it. The store
// that is being merged belongs to it, and so do the undo stores that revert it and the other snapshots of a live merge. While the
// merge is reverted, those are the undo store that is being merged and older ones, which have more.
func (s *SideFile) Check(cow block.Device) error {
	merging, undos, err := readIDs(cow)
	if err != nil {
		return err
	}
	if s.now.Back != nil && merging == s.now.Back.ID || s.now.Back == nil && !s.now.Daemon && merging == s.now.ID || s.undoStore(undos) != nil || s.keeps(merging) {
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

// undoStore finds an undo store, by its id, that reverts the merge as it is.
func (s *SideFile) undoStore(id string) *undoStore {
	at := s.findUndo(id)
	if at < 0 || s.now.Undo[at].After != "" || s.now.Back != nil && at > s.findUndo(s.now.Back.Undo) {
		return nil
	}
	return &s.now.Undo[at]
}

// findUndo returns where an undo store is in the list, by its id; -1: it is not there.
func (s *SideFile) findUndo(id string) int {
	return slices.IndexFunc(s.now.Undo, func(u undoStore) bool { return u.ID == id })
}

// Begin makes the side file durable, for an offline merge of cow into the origin, with the id in cow's first sector
// before it. If a side file exists, the merge of cow continues, or is reverted, or cow is refused (ErrUnfinished, nothing
// is changed) unless replace is set. ErrNoSideFile: none can be made. It is called before the first byte of the origin is
// written. Siblings, which preserve what is overwritten, get ids as in [BeginLive]; where the merge continues, those alone that have
// preserved it from its beginning on. A new side file has the undo store of the merge, which may be nil, from the first moment; where the merge continues,
// [SideFile.Continue] is called afterwards. Also where no side file can be made, the first sector of cow says from then on whether
// the merge goes on without the undo store that was made for it: [CheckUndo] refuses that later.
func Begin(origin, cowPath string, cow block.Device, siblings []Sibling, kept *UndoStore, replace bool) (*SideFile, error) {
	m := mergedDevice(cow)
	s, err := begin(origin, cowPath, m, replace)
	none := errors.Is(err, ErrNoSideFile)
	if err != nil && !none {
		return s, err
	}
	if none {
		s = &SideFile{}
	}
	if s.old == nil {
		if err := s.noteUndo(kept); err != nil {
			return s, err
		}
		if err := s.endUnlisted(m); err != nil {
			return s, err
		}
	}
	if none {
		return s, err
	}
	for _, b := range siblings {
		if err := s.keep(mergedDevice(b.COW)); err != nil {
			return s, block.WithPath(b.Name, err)
		}
	}
	return s, s.write(origin)
}

// keep lists another snapshot that preserves what is overwritten from now on, if it has preserved it so far.
func (s *SideFile) keep(m merged) error {
	id, err := m.id()
	if err == nil && (s.old == nil || slices.Contains(s.old.Kept, id)) {
		s.now.Kept = append(s.now.Kept, id)
	}
	return err
}

// BeginLive is Begin for a live merge of a snapshot, and gives ids to the other snapshots of the origin too: they keep
// what the merge overwrites. One that is transient or lost is left out; where another one can't be given an id, the merge is refused, since that
// would not be accepted afterwards. It is called while s takes no writes.
//
// No undo store of the merge reverts it from then on, since clients write to the origin, unless it is one of the other snapshots;
// the first sector of the merged COW device says so too.
func BeginLive(origin, cowPath string, s *snapshot.Snapshot, others []*snapshot.Snapshot, replace bool) (*SideFile, error) {
	side, err := begin(origin, cowPath, mergedSnapshot(s), replace)
	if errors.Is(err, ErrNoSideFile) {
		return side, cmp.Or(EndUndo(s), err)
	}
	if err != nil {
		return side, err
	}
	var attached []string // undo stores
	for _, o := range others {
		err := side.keep(mergedSnapshot(o))
		if err != nil && !errors.Is(err, store.ErrNoMerge) && !errors.Is(err, store.ErrInvalid) {
			return side, fmt.Errorf("another snapshot: %w", err)
		}
		if _, undos, err := readIDs(o.COW()); err == nil {
			attached = append(attached, undos)
		}
	}
	if err := EndUndo(s); err != nil {
		return side, err
	}
	side.now.Undo = slices.DeleteFunc(slices.Clone(side.now.Undo), func(u undoStore) bool {
		lost := !slices.Contains(attached, u.ID)
		if lost {
			side.lost = append(side.lost, LostUndo{u.Path, errors.New("the merge continues while the disk is in use")})
		}
		return lost
	})
	return side, side.write(origin)
}

// merged is a store that is merged: its device, and how the first sector of that is changed, durably.
type merged struct {
	cow    block.Device
	change func(func(sector []byte)) error
}

func mergedDevice(cow block.Device) merged {
	return merged{cow, func(change func([]byte)) error { return undo.ChangeFirst(cow, change) }}
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
	err = s.begin(absolute(cowPath), cow)
	s.now.Kept = nil
	return s, err
}

// begin makes s what it is while cow is merged, except for Kept.
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
		s.now.Back = &takingBack{COW: cowPath, ID: id, Whole: u.Whole, Undo: u.ID}
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

// Continue records, durably and before a merge that had begun goes on, which undo stores revert it from then on: kept, which may
// be nil, and the earlier ones that have every chunk that is left to merge. They are looked for where they were. An earlier one that does
// not have them is of use again when kept is merged; without kept it is lost (see [SideFile.Lost]). One that can't be looked at, because
// it is in use or can't be read, is an error, unless force is set.
//
// It does nothing while a merge is reverted: an undo store of that is of no use before it is complete, and then there is no side
// file.
func (s *SideFile) Continue(origin string, p *Prepared, kept *UndoStore, force bool) error {
	if s.now.Back != nil || s.old == nil {
		return nil
	}
	after, mine := "", []string{s.now.COW} // files that are open here
	if kept != nil {
		mine = append(mine, kept.Path)
		t, _, err := readLabel(kept.Device)
		if err != nil {
			return err
		}
		after = hex.EncodeToString(t.ID[:])
	}
	earlier := s.now.Undo
	s.now.Undo = nil
	for i, u := range slices.Backward(earlier) {
		lost := error(nil)
		switch at := slices.IndexFunc(earlier[i+1:], func(later undoStore) bool { return later.ID == u.After }); {
		case u.ID == after: // CheckUndo has accepted it
			u.Path = absolute(kept.Path)
		case u.After == "":
			var err error
			if lost, err = p.coveredBy(u, mine); err != nil && !force {
				return fmt.Errorf("undo store of the merge: %w", block.WithPath(u.Path, err))
			}
			lost = errors.Join(lost, err)
			if lost != nil && after != "" && u.Path != "" { // without a path it was listed by a version that looked at none
				u.After, lost = after, nil
			}
		case at < 0 || s.findUndo(u.After) < 0:
			lost = errors.New("a later undo store, which is to be merged first, is lost")
		}
		if lost != nil {
			s.lost = append(s.lost, LostUndo{u.Path, lost})
			continue
		}
		s.now.Undo = slices.Insert(s.now.Undo, 0, u)
	}
	if err := s.noteUndo(kept); err != nil {
		return err
	}
	if err := s.endUnlisted(mergedDevice(p.m.Store().Device())); err != nil {
		return err
	}
	return s.write(origin)
}

// endUnlisted records in the merged store that the merge goes on without the undo store that was made for it, if the side file does not
// list that: later it would be accepted again, when what it does not have was merged.
func (s *SideFile) endUnlisted(m merged) error {
	t, ok, err := readLabel(m.cow)
	if err != nil || !ok || t.Undo || s.findUndo(hex.EncodeToString(t.ID[:])) >= 0 {
		return err
	}
	return endUndo(m)
}

// coveredBy returns why an undo store does not revert the merge from its present state on, nil: it does. err: that can't be
// found out. others are the paths of files that are not this one.
func (p *Prepared) coveredBy(u undoStore, others []string) (lost, err error) {
	if u.Path == "" {
		return errors.New("it is not recorded where it is"), nil
	}
	errOther := errors.New("another file is there")
	if slices.ContainsFunc(others, func(path string) bool { return sameFile(u.Path, path) }) {
		return errOther, nil
	}
	kept, err := block.Open(u.Path, block.Options{ReadOnly: true})
	if errors.Is(err, fs.ErrNotExist) {
		return err, nil
	}
	if err != nil {
		return nil, err
	}
	defer kept.Close()
	t, labelled, err := readLabel(kept)
	if err != nil {
		return nil, err
	}
	if !labelled || !t.Undo || hex.EncodeToString(t.ID[:]) != u.ID {
		return errOther, nil
	}
	st, err := snapshotStore(kept)
	if err != nil {
		return err, nil
	}
	if err := checkUndoStore(p.over.Device(), p.m.Store(), st, t); err != nil {
		return err, nil
	}
	return checkCovers(st, p.m.Store()), nil
}

// sameFile reports whether two paths lead to the same file.
func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// noteUndo adds an undo store that CheckUndo has accepted.
func (s *SideFile) noteUndo(kept *UndoStore) error {
	if kept == nil {
		return nil
	}
	t, _, err := readLabel(kept.Device)
	if err != nil {
		return err
	}
	if id := hex.EncodeToString(t.ID[:]); s.findUndo(id) < 0 {
		s.now.Undo = append(s.now.Undo, undoStore{ID: id, Whole: s.old == nil, Path: absolute(kept.Path)})
	}
	return nil
}

// absolute is a path that does not depend on the working directory.
func absolute(path string) string {
	if full, err := filepath.Abs(path); err == nil {
		return full
	}
	return path
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
	if s.old != nil { // that one would stay, and say what is not so any more
		return err
	}
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

// End removes the side file, durably, when the merge is complete and durable. It stays after the merge of an undo store that was
// made when the merge had already begun: the origin is as it was when that undo store was made, and from there older ones restore
// the rest. The store that was merged first does not continue then: it does not have what was reverted.
func (s *SideFile) End(origin string) error {
	back := s.now.Back
	if back == nil || back.Whole {
		return s.remove()
	}
	back.Done = true
	for i := range s.now.Undo {
		if s.now.Undo[i].After == back.Undo {
			s.now.Undo[i].After = ""
		}
	}
	return s.write(origin)
}

func (s *SideFile) remove() error {
	if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return block.SyncDirectory(filepath.Dir(s.path))
}
