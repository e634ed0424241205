package inspect

import (
	"slices"
	"strings"

	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source"
)

// An Action is what can be done with what was found.
type Action int

const (
	ActionCreate              Action = iota // a store for DISK: DISK COW
	ActionServe                             // a disk, or a volume: DISK
	ActionServeWithOrigin                   // ORIGIN COW
	ActionServeNew                          // DISK with a new COW: DISK COW
	ActionStatus                            // of a COW
	ActionServerStatus                      // of the server that uses a COW: nothing
	ActionDiff                              // ORIGIN COW
	ActionMerge                             // ORIGIN COW, or a snapshot volume
	ActionExport                            // ORIGIN COW OUT, or DISK OUT
	ActionRescue                            // ORIGIN COW OUT, or a snapshot volume and OUT
	ActionCheck                             // COW
	ActionCheckWithOrigin                   // COW ORIGIN
	ActionRepair                            // COW NEWCOW
	ActionRepairWithoutHeader               // COW NEWCOW, with a chunk size that was lost
	ActionUndoRepair                        // FILE of a repair
	ActionDrawMap                           // COW
	ActionInspect                           // DISK...
	ActionRestore                           // a dump: FILE COW
	ActionConvert                           // DISK OUT, with another program
)

// A Step is an action that applies to what was found.
type Step struct {
	Action  Action   `json:"-"`
	Args    []string `json:"-"` // names in capital letters are the reader's to choose
	PVs     []string `json:"-"` // further disks of the group of an address
	Backing bool     `json:"-"` // the backing files that a qcow2 image names are to be opened
	Data    bool     `json:"-"` // its external data file is to be given
	Command string   `json:"command"`
	Why     string   `json:"why"`
}

func step(why string, do Action, args ...string) Step { return Step{Action: do, Args: args, Why: why} }

// Steps returns the actions that apply to what was found, the most likely first. groups are those of all disks.
func (i *Inspection) Steps(groups []Group) []Step {
	kind := i.Content.Kind
	switch {
	case i.Store != nil:
		return stepsForStore(i.Store, i.Path, i.InUse)
	case kind.Role == image.Own && i.Kind == "undo":
		return []Step{step("to undo the change of COW", ActionUndoRepair, i.Path)}
	case kind.Role == image.Own:
		return []Step{step("to make a store from it", ActionRestore, i.Path, "NEWCOW")}
	case kind.Name == source.QCOW2:
		return stepsForImage(i.Path, i.QCOW2)
	case kind.Role == image.Container:
		return []Step{step("to convert it to a raw disk, which dmsnap requires", ActionConvert, i.Path, withoutExtension(i.Path)+".img")}
	case kind.Role == image.Packed:
		return []Step{step("after it is unpacked", ActionInspect, withoutExtension(i.Path))}
	case kind.Role != image.RawDisk:
		return []Step{}
	}
	steps := stepsForVolumes(i.Path, groups)
	inGroup := slices.ContainsFunc(groups, func(g Group) bool { return slices.Contains(g.Images, i.Path) })
	steps = i.stepsForDisk(steps, inGroup)
	if kind == image.Unknown {
		steps = append(steps, step("if it was a COW device whose header is lost", ActionRepairWithoutHeader, i.Path, "NEWCOW"))
	}
	return steps
}

// stepsForImage returns the actions for a qcow2 image: none for one that is encrypted. Without q nothing more is known of it.
func stepsForImage(path string, q *QCOW2) []Step {
	if q == nil {
		q = &QCOW2{}
	}
	if q.Encryption != "" {
		return []Step{}
	}
	stem := withoutExtension(path)
	steps := []Step{step("to serve a snapshot of the disk in it", ActionServeNew, path, stem+".cow"),
		step("to write the disk in it to a raw image", ActionExport, path, stem+".img")}
	for n := range steps {
		steps[n].Backing, steps[n].Data = q.Backing != "", q.ExternalData
	}
	return steps
}

// stepsForDisk returns the actions for a disk, which can be an origin, after those for the volumes on it. inGroup says that it
// is part of a volume group.
func (i *Inspection) stepsForDisk(steps []Step, inGroup bool) []Step {
	if m := i.Merging; m != nil && m.COW != "" {
		return append(steps, step("to complete the merge that has begun", ActionMerge, i.Path, m.COW))
	}
	for _, b := range i.Beside {
		switch {
		case b.InUse:
			steps = append(steps, step("to show the status of the served snapshot", ActionStatus, b.Path))
		case b.State == "damaged":
			steps = append(steps, step("to show the problems of the store beside it", ActionCheck, b.Path))
		case b.State == "invalid":
			steps = append(steps, step("to recover data from the invalid snapshot beside it", ActionRescue, i.Path, b.Path, "OUT"))
		case !b.Fits:
			steps = append(steps, step("the store beside it belongs to a larger disk", ActionCheckWithOrigin, b.Path, i.Path))
		default:
			steps = append(steps, step("to show where the snapshot beside it differs", ActionDiff, i.Path, b.Path),
				step("to serve both", ActionServeWithOrigin, i.Path, b.Path),
				step("to merge the snapshot into the disk", ActionMerge, i.Path, b.Path))
		}
	}
	if len(steps) == 0 && !inGroup {
		why := "to create a snapshot of this disk"
		if i.Content.Kind == image.Unknown || i.Content.Kind == image.Zeros {
			why = "if it is a raw disk, to create a snapshot of it"
		}
		steps = append(steps, step(why, ActionCreate, i.Path, cowFor(i.Path)))
	}
	return steps
}

// stepsForVolumes returns the actions for the first snapshots of each state in the groups whose addresses are those of a disk.
func stepsForVolumes(path string, groups []Group) []Step {
	steps, seen := []Step{}, map[Action]bool{}
	for _, g := range groups {
		if len(g.Images) == 0 || g.Images[0] != path {
			continue
		}
		if len(g.Missing) > 0 {
			all := append(slices.Clone(g.Images), "DISK")
			steps = append(steps, step("to list the volumes together with the disk that holds a missing physical volume", ActionInspect, all...))
		}
		for _, v := range g.Volumes {
			if v.Status == nil || !v.Visible {
				continue
			}
			found := []Step{step("to write what a snapshot in it shows to a raw image", ActionExport, v.Address, "OUT")}
			if g.Writable(v.Origin) {
				found = append(found, step("to serve the origin of a snapshot with all its snapshots", ActionServe, v.Address),
					step("to merge a snapshot into its origin", ActionMerge, v.Address))
			}
			if v.State == api.State(snapshot.StateInvalid) {
				found = []Step{step("to recover data from an invalid snapshot in it", ActionRescue, v.Address, "OUT")}
			} else if !v.Readable {
				continue
			}
			for _, s := range found {
				if !seen[s.Action] {
					seen[s.Action] = true
					s.PVs = g.Images[1:]
					steps = append(steps, s)
				}
			}
		}
	}
	return steps
}

// stepsForStore returns the actions for a store.
func stepsForStore(f *Store, path string, inUse bool) []Step {
	origin := f.Origin
	if origin == "" {
		origin = "ORIGIN"
	}
	stem := withoutExtension(path)
	switch {
	case inUse:
		return []Step{step("to show the status of the server that uses it", ActionServerStatus)}
	case f.Report.Has(check.MarkedInvalid):
		return []Step{step("to recover its data", ActionRescue, origin, path, stem+".rescued.img")}
	case f.Report.Worst() == check.Error:
		return []Step{step("to show its problems", ActionCheck, path), step("to make a sound store from it", ActionRepair, path, stem+".repaired.cow")}
	}
	steps := []Step{step("to show where the snapshot differs from its origin", ActionDiff, origin, path),
		step("to write its content to a raw image", ActionExport, origin, path, stem+".snapshot.img"),
		step("to merge it into its origin", ActionMerge, origin, path),
		step("to show a map of it", ActionDrawMap, path)}
	if f.Report.Worst() == check.Warning {
		steps = append([]Step{step("to show what the warning means", ActionCheck, path)}, steps...)
	}
	return steps
}

// cowFor returns a name for the COW file of a disk: DISK.cow; of a part of a disk one without the separators of addresses.
func cowFor(name string) string {
	path := source.Path(name)
	if !source.IsFile(path) {
		return "NEW.cow"
	}
	part := strings.NewReplacer("#", "-", "/", "-", ":", "-").Replace(name[len(path):])
	return path + part + ".cow"
}

// withoutExtension removes the extension of a file name.
func withoutExtension(path string) string {
	if dot := strings.LastIndexByte(path, '.'); dot > strings.LastIndexByte(path, '/')+1 {
		return path[:dot]
	}
	return path
}
