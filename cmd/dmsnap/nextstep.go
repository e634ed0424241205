package main

import (
	"slices"
	"strings"

	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/image"
	"github.com/dmsnap/dmsnap/inspect"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/snapshot"
	"github.com/dmsnap/dmsnap/source"
)

// next returns the commands that apply to what was found, the most likely first. groups are those of all disks.
func (i *inspection) next(groups []inspect.Group) []nextStep {
	kind := i.Content.Kind
	switch {
	case i.Store != nil:
		return nextForStore(i.Store, i.Path, i.InUse)
	case kind.Role == image.Own && i.Kind == "undo":
		return []nextStep{{command("repair", "COW", "--undo-apply", i.Path), "to undo the change of COW"}}
	case kind.Role == image.Own:
		return []nextStep{{command("restore", i.Path, "NEWCOW"), "to make a store from it"}}
	case kind.Name == source.QCOW2:
		stem := withoutEnd(i.Path)
		return []nextStep{{command("serve", i.Path, stem+".cow", "--create", "--socket", "nbd.sock"), "to serve a snapshot of the disk in it"},
			{command("export", i.Path, stem+".img"), "to write the disk in it to a raw image"}}
	case kind.Role == image.Container:
		raw := withoutEnd(i.Path) + ".img"
		return []nextStep{{words("qemu-img", "convert", "-O", "raw", i.Path, raw), "to convert it to a raw disk, which dmsnap requires"}}
	case kind.Role == image.Packed:
		return []nextStep{{command("inspect", withoutEnd(i.Path)), "after it is unpacked"}}
	case kind.Role != image.RawDisk:
		return []nextStep{}
	}
	steps := nextForVolumes(i.Path, groups)
	inGroup := slices.ContainsFunc(groups, func(g inspect.Group) bool { return slices.Contains(g.Images, i.Path) })
	steps = i.nextForDisk(steps, inGroup)
	if kind == image.Unknown {
		steps = append(steps, nextStep{command("repair", i.Path, "NEWCOW", "--chunk-size", "4KiB"), "if it was a COW device whose header is lost"})
	}
	return steps
}

// nextForDisk returns the commands for a disk, which can be an origin, after those for the volumes on it. inGroup says that it is
// part of a volume group.
func (i *inspection) nextForDisk(steps []nextStep, inGroup bool) []nextStep {
	if m := i.Merging; m != nil && m.COW != "" {
		return append(steps, nextStep{command("merge", i.Path, m.COW), "to complete the merge that has begun"})
	}
	for _, b := range i.Beside {
		switch {
		case b.InUse:
			steps = append(steps, nextStep{command("status", b.Path), "to show the status of the served snapshot"})
		case b.State == "damaged":
			steps = append(steps, nextStep{command("check", b.Path), "to show the problems of the store beside it"})
		case b.State == "invalid":
			steps = append(steps, nextStep{command("rescue", i.Path, b.Path, "OUT"), "to recover data from the invalid snapshot beside it"})
		case !b.Fits:
			steps = append(steps, nextStep{command("check", b.Path, "--origin", i.Path), "the store beside it belongs to a larger disk"})
		default:
			steps = append(steps, nextStep{command("diff", i.Path, b.Path), "to show where the snapshot beside it differs"},
				nextStep{command("serve", i.Path, b.Path, "--export-origin", "--socket", "nbd.sock"), "to serve both"},
				nextStep{command("merge", i.Path, b.Path), "to merge the snapshot into the disk"})
		}
	}
	if len(steps) == 0 && !inGroup {
		why := "to create a snapshot of this disk"
		if i.Content.Kind == image.Unknown || i.Content.Kind == image.Zeros {
			why = "if it is a raw disk, to create a snapshot of it"
		}
		steps = append(steps, nextStep{command("create", i.Path, i.Path+".cow"), why})
	}
	return steps
}

// nextForVolumes returns the commands for the first snapshots of each state in the groups whose addresses are those of a disk.
func nextForVolumes(path string, groups []inspect.Group) []nextStep {
	steps, seen := []nextStep{}, map[string]bool{}
	for _, g := range groups {
		if len(g.Images) == 0 || g.Images[0] != path {
			continue
		}
		if len(g.Missing) > 0 {
			steps = append(steps, nextStep{command(append(append([]string{"inspect"}, g.Images...), "DISK")...), "to list the volumes together with the disk that holds a missing physical volume"})
		}
		for _, v := range g.Volumes {
			if v.Status == nil || !v.Visible {
				continue
			}
			found := []nextStep{{"export OUT", "to write what a snapshot in it shows to a raw image"}}
			if g.Writable(v.Origin) {
				found = append(found, nextStep{"serve --socket nbd.sock", "to serve the origin of a snapshot with all its snapshots"},
					nextStep{"merge", "to merge a snapshot into its origin"})
			}
			if v.State == api.State(snapshot.StateInvalid) {
				found = []nextStep{{"rescue OUT", "to recover data from an invalid snapshot in it"}}
			} else if !v.Readable {
				continue
			}
			for _, step := range found {
				if seen[step.Command] {
					continue
				}
				seen[step.Command] = true
				args := strings.Fields(step.Command)
				args = slices.Insert(args, 1, v.Address)
				for _, pv := range g.Images[1:] {
					args = append(args, "--pv", pv)
				}
				steps = append(steps, nextStep{command(args...), step.Why})
			}
		}
	}
	return steps
}

// nextForStore returns the commands for a store.
func nextForStore(f *inspect.Store, path string, inUse bool) []nextStep {
	origin := f.Origin
	if origin == "" {
		origin = "ORIGIN"
	}
	stem := withoutEnd(path)
	switch {
	case inUse:
		return []nextStep{{command("status", "--control", "PATH"), "to show the status of the server that uses it"}}
	case f.Report.Has(check.MarkedInvalid):
		return []nextStep{{command("rescue", origin, path, stem+".rescued.img"), "to recover its data"}}
	case f.Report.Worst() == check.Error:
		return []nextStep{{command("check", path), "to show its problems"},
			{command("repair", path, stem+".repaired.cow"), "to make a sound store from it"}}
	}
	steps := []nextStep{{command("diff", origin, path), "to show where the snapshot differs from its origin"},
		{command("export", origin, path, stem+".snapshot.img"), "to write its content to a raw image"},
		{command("merge", origin, path), "to merge it into its origin"},
		{command("map", path), "to show a map of it"}}
	if f.Report.Worst() == check.Warning {
		steps = append([]nextStep{{command("check", path), "to show what the warning means"}}, steps...)
	}
	return steps
}

func command(args ...string) string { return words(append([]string{"dmsnap"}, args...)...) }

// words quotes arguments for a shell.
func words(args ...string) string {
	quoted := make([]string, len(args))
	for i, a := range args {
		quoted[i] = shellWord(a)
	}
	return strings.Join(quoted, " ")
}

func shellWord(s string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./=:+,@%"
	if s != "" && strings.Trim(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// withoutEnd removes the extension of a file name.
func withoutEnd(path string) string {
	if dot := strings.LastIndexByte(path, '.'); dot > strings.LastIndexByte(path, '/')+1 {
		return path[:dot]
	}
	return path
}
