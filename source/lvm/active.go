package lvm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/dmsnap/dmsnap/block"
)

// ErrActive reports a group that is active on this host.
var ErrActive = errors.New("active on this host")

// CheckInactive returns an error that wraps ErrActive and block.ErrInUse where device-mapper of this host has devices of the group: then the
// kernel uses the disks, and what is read here may change from one call to the next. The devices are known by the UUIDs
// of the group and its volumes (docs/spec/lvm2.md §8.7), so a copy of a disk of an active group counts too. sysfs is where that file
// system is mounted; where it is not, nothing is found.
func (g *Group) CheckInactive(sysfs string) error {
	files, err := filepath.Glob(filepath.Join(sysfs, "block/dm-*/dm/uuid"))
	if err != nil {
		return err
	}
	prefix := "LVM-" + strings.ReplaceAll(g.ID, "-", "")
	var names []string
	for _, file := range files {
		uuid, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed meanwhile
		}
		if err != nil {
			return fmt.Errorf("which volume groups are active: %w", err)
		}
		if !strings.HasPrefix(string(uuid), prefix) {
			continue
		}
		name, err := os.ReadFile(filepath.Join(filepath.Dir(file), "name"))
		if err != nil {
			name = []byte(filepath.Base(filepath.Dir(filepath.Dir(file))))
		}
		names = append(names, fmt.Sprintf("%q", strings.TrimSpace(string(name))))
	}
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("volume group %q is %w, as %s: %w", g.Name, ErrActive, strings.Join(names, ", "), block.ErrInUse)
}
