package main

import (
	"strings"

	"github.com/dmsnap/dmsnap/check"
	"github.com/dmsnap/dmsnap/image"
)

// next says which commands help with what was found, the likeliest first.
func (i *inspection) next() []nextStep {
	switch {
	case i.Store != nil:
		return i.Store.next(i.Path, i.InUse)
	case i.kind.Role == image.Own && i.Kind == "undo":
		return []nextStep{{command("repair", "COW", "--undo-apply", i.Path), "to take back what was done to COW"}}
	case i.kind.Role == image.Own:
		return []nextStep{{command("restore", i.Path, "NEWCOW"), "to make a store of it again"}}
	case i.kind.Role == image.Container:
		raw := withoutEnd(i.Path) + ".img"
		return []nextStep{{words("qemu-img", "convert", "-O", "raw", i.Path, raw), "dmsnap works on raw disks; this makes one"}}
	case i.kind.Role == image.Packed:
		return []nextStep{{command("inspect", withoutEnd(i.Path)), "once it is unpacked"}}
	case i.kind.Role != image.RawDisk:
		return []nextStep{}
	}
	steps := i.nextForDisk()
	if i.Kind == "lvm2-pv" {
		steps = append(steps, nextStep{command("inspect", "/dev/VG/LV-cow"), "stores of LVM are on the volumes with such names, and not on the disk itself"})
	}
	if i.kind == image.Unknown {
		steps = append(steps, nextStep{command("repair", i.Path, "NEWCOW", "--chunk-size", "4KiB"), "if it was a COW device, and its header is lost"})
	}
	return steps
}

// nextForDisk is for what can be an origin.
func (i *inspection) nextForDisk() []nextStep {
	steps := []nextStep{}
	for _, b := range i.Beside {
		switch {
		case b.InUse:
			steps = append(steps, nextStep{command("status", b.Path), "how the snapshot fares that is being served"})
		case b.State == "damaged":
			steps = append(steps, nextStep{command("check", b.Path), "what is wrong with the store beside it"})
		case b.State == "invalid":
			steps = append(steps, nextStep{command("rescue", i.Path, b.Path, "OUT"), "what can still be had of the invalid snapshot beside it"})
		case !b.Fits:
			steps = append(steps, nextStep{command("check", b.Path, "--origin", i.Path), "the store beside it is for a larger disk"})
		default:
			steps = append(steps, nextStep{command("diff", i.Path, b.Path), "where the snapshot beside it differs"},
				nextStep{command("serve", i.Path, b.Path, "--export-origin", "--socket", "nbd.sock"), "to use both"},
				nextStep{command("merge", i.Path, b.Path), "to make the snapshot's content the disk's"})
		}
	}
	if len(steps) == 0 {
		why := "to put a snapshot beside this disk"
		if i.kind == image.Unknown || i.kind == image.Zeros {
			why = "if it is a raw disk, to put a snapshot beside it"
		}
		steps = append(steps, nextStep{command("create", i.Path, i.Path+".cow"), why})
	}
	return steps
}

// next is for a store.
func (f *storeFacts) next(path string, inUse bool) []nextStep {
	origin := f.Origin
	if origin == "" {
		origin = "ORIGIN"
	}
	stem := withoutEnd(path)
	switch {
	case inUse:
		return []nextStep{{command("status", "--control", "PATH"), "to ask the server that uses it"}}
	case f.report.Has(check.MarkedInvalid):
		return []nextStep{{command("rescue", origin, path, stem+".rescued.img"), "what can still be had, and what it is worth"}}
	case f.report.Worst() == check.Error:
		return []nextStep{{command("check", path), "what is wrong, with places"},
			{command("repair", path, stem+".repaired.cow"), "a sound store of what is sound"}}
	}
	steps := []nextStep{{command("diff", origin, path), "where the snapshot differs from its origin"},
		{command("export", origin, path, stem+".snapshot.img"), "its content as a raw image"},
		{command("merge", origin, path), "to make its content the origin's"},
		{command("map", path), "a picture of it"}}
	if f.report.Worst() == check.Warning {
		steps = append([]nextStep{{command("check", path), "what the warning means"}}, steps...)
	}
	return steps
}

func command(args ...string) string { return words(append([]string{"dmsnap"}, args...)...) }

// words writes a command so that a shell reads these words again.
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

// withoutEnd leaves out what stands behind the last dot of the file's name.
func withoutEnd(path string) string {
	if dot := strings.LastIndexByte(path, '.'); dot > strings.LastIndexByte(path, '/')+1 {
		return path[:dot]
	}
	return path
}
