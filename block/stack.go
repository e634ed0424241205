package block

import (
	"bufio"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// stack reads from the kernel which block devices lie on others, and what uses them.
type stack struct {
	sys              string // where sysfs is mounted
	mountInfo, swaps string // files
	depth            int
}

var kernelStack = stack{"/sys", "/proc/self/mountinfo", "/proc/swaps", 16}

// A range is a part of a disk, by the disk's identity.
type extent struct {
	disk     string
	from, to int64 // bytes
	exact    bool  // all of it is used; otherwise an unknown part
}

// Overlap reports whether a change of one file can change the other: the same disk, also as a whole and its partition,
// a loop device and the file behind it, a device-mapper or RAID device and what it lies on. What can't be found out
// (without /sys) counts as not overlapping.
func Overlap(a, b *File) bool { return kernelStack.overlap(a.identity, b.identity) }

func (k stack) overlap(a, b string) bool {
	if a == b {
		return true
	}
	whole := func(id string) extent { return extent{id, 0, math.MaxInt64, true} }
	x, y := append(k.below(a), whole(a)), append(k.below(b), whole(b))
	return slices.ContainsFunc(x, func(p extent) bool {
		return slices.ContainsFunc(y, func(q extent) bool {
			return p.disk == q.disk && p.from < q.to && q.from < p.to && (p.exact && q.exact || p.disk == a || q.disk == b)
		})
	})
}

// below returns what a disk lies on, all the way down.
func (k stack) below(disk string) []extent {
	return k.descend(extent{disk, 0, math.MaxInt64, true}, k.depth)
}

func (k stack) descend(s extent, depth int) (list []extent) {
	dir := k.dir(s.disk)
	if dir == "" || depth == 0 {
		return nil
	}
	add := func(under extent) {
		list = append(append(list, under), k.descend(under, depth-1)...)
	}
	move := func(disk string, start, size int64) extent {
		to := size
		if s.to < size {
			to = s.to
		}
		return extent{disk, start + s.from, start + to, s.exact}
	}
	size := k.number(dir+"/size") * SectorSize
	if disk := k.whole(dir); disk != "" {
		add(move(disk, k.number(dir+"/start")*SectorSize, size))
	} else if file := k.backing(dir); file != "" {
		if id := identityOf(file); id != "" {
			add(move(id, k.number(dir+"/loop/offset"), size))
		}
	}
	slaves, _ := filepath.Glob(dir + "/slaves/*")
	for _, slave := range slaves {
		if id := k.device(slave); id != "" {
			add(extent{id, 0, math.MaxInt64, false})
		}
	}
	return list
}

// dir is the directory of a block device in sysfs, "" where there is none.
func (k stack) dir(disk string) string {
	number, special := strings.CutPrefix(disk, specialPrefix)
	if !special {
		return ""
	}
	dir, err := filepath.EvalSymlinks(k.sys + "/dev/block/" + number)
	if err != nil {
		return ""
	}
	return dir
}

// device is the identity of the block device whose directory in sysfs is dir.
func (k stack) device(dir string) string {
	if number := k.text(dir + "/dev"); number != "" {
		return specialPrefix + number
	}
	return ""
}

// whole is the disk of which dir is a partition, "" if it is none.
func (k stack) whole(dir string) string {
	if k.text(dir+"/partition") == "" {
		return ""
	}
	return k.device(filepath.Dir(dir))
}

// backing is the path of the file behind a loop device, "" if it is none.
func (k stack) backing(dir string) string { return k.text(dir + "/loop/backing_file") }

func (k stack) text(path string) string {
	b, _ := os.ReadFile(path)
	return strings.TrimSuffix(string(b), "\n")
}

func (k stack) number(path string) int64 {
	n, _ := strconv.ParseInt(k.text(path), 10, 54)
	return n
}

// users lists the other users of a disk and of its partitions: mounts, swap space, and devices that lie on it. With
// toRead, file systems that are mounted read-only don't count.
func (k stack) users(disk string, toRead bool) (list []string) {
	dir := k.dir(disk)
	if dir == "" {
		return append(k.swapping(disk), k.loopUsers(disk, toRead)...)
	}
	list = k.deviceUsers(dir, toRead)
	if whole := k.whole(dir); whole != "" {
		list = append(list, k.claims(k.dir(whole), toRead)...)
	}
	return list
}

// deviceUsers are the users of a block device and of its partitions.
func (k stack) deviceUsers(dir string, toRead bool) []string {
	list := k.claims(dir, toRead)
	partitions, _ := filepath.Glob(dir + "/*/partition")
	for _, p := range partitions {
		list = append(list, k.claims(filepath.Dir(p), toRead)...)
	}
	return list
}

// claims are the users of a block device itself.
func (k stack) claims(dir string, toRead bool) []string {
	disk, name := k.device(dir), filepath.Base(dir)
	list := k.swapping(disk)
	for _, point := range k.mounted(disk, toRead) {
		list = append(list, fmt.Sprintf("%s is mounted on %s", name, point))
	}
	holders, _ := filepath.Glob(dir + "/holders/*")
	for _, h := range holders {
		list = append(list, fmt.Sprintf("%s is held by %s", name, filepath.Base(h)))
	}
	return append(list, k.loopUsers(disk, toRead)...)
}

// loopUsers are the users of loop devices over a disk. An unused loop device does not count.
func (k stack) loopUsers(disk string, toRead bool) (list []string) {
	loops, _ := filepath.Glob(k.sys + "/block/loop*/loop/backing_file")
	for _, l := range loops {
		if identityOf(k.text(l)) == disk {
			list = append(list, k.deviceUsers(filepath.Dir(filepath.Dir(l)), toRead)...)
		}
	}
	return list
}

// mounted returns where a block device is mounted.
func (k stack) mounted(disk string, toRead bool) (points []string) {
	number := strings.TrimPrefix(disk, specialPrefix)
	for fields := range k.lines(k.mountInfo) {
		// "36 35 98:0 /root /mount/point rw,noatime master:1 - ext4 /dev/sda1 rw,errors=continue"
		dash := slices.Index(fields, "-")
		if dash < 6 || len(fields) < dash+4 {
			continue
		}
		source, options := fields[dash+2], strings.Split(fields[dash+3], ",")
		// Some file systems (btrfs) have a device number of their own.
		if fields[2] != number && (!strings.HasPrefix(source, "/") || identityOf(source) != disk) {
			continue
		}
		if !toRead || !slices.Contains(options, "ro") {
			points = append(points, fields[4])
		}
	}
	return points
}

// swapping lists the use of a disk as swap space.
func (k stack) swapping(disk string) []string {
	for fields := range k.lines(k.swaps) {
		if strings.HasPrefix(fields[0], "/") && identityOf(fields[0]) == disk {
			return []string{fields[0] + " is used as swap space"}
		}
	}
	return nil
}

// lines iterates over the words of each line of a file that has any.
func (k stack) lines(path string) func(yield func([]string) bool) {
	return func(yield func([]string) bool) {
		f, err := os.Open(path)
		if err != nil {
			return
		}
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			if words := strings.Fields(s.Text()); len(words) > 0 && !yield(words) {
				return
			}
		}
	}
}

// specialPrefix begins the identity of a block special file; its device number follows.
const specialPrefix = "block device "

// identityOf is File.Identity of what is at a path, "" where nothing is.
func identityOf(path string) string {
	var st unix.Stat_t
	if err := retry(func() error { return unix.Stat(path, &st) }); err != nil {
		return ""
	}
	return identityOfStat(&st)
}

func identityOfStat(st *unix.Stat_t) string {
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return fmt.Sprintf("%s%d:%d", specialPrefix, unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)))
	}
	return fmt.Sprintf("file %d:%d", st.Dev, st.Ino)
}

// CheckUnused returns ErrInUse when the kernel itself uses f or a part of it: a file system on it is mounted, it is
// swap space, or it belongs to another device (LVM, RAID); also through a loop device. For a File that is open for
// reading, file systems that are mounted read-only do not count.
func (f *File) CheckUnused() error {
	users := kernelStack.users(f.identity, f.ReadOnly())
	if len(users) == 0 {
		return nil
	}
	return fmt.Errorf("%s: %w: %s", f.path, ErrInUse, strings.Join(users, ", "))
}

// lockBacking locks the file behind a loop device as the device is locked, since others may use the file by its own
// name. It returns the descriptor that holds the locks, -1 where there is no such file or it can't be opened.
func (f *File) lockBacking(mode LockMode) (int, error) {
	path := ""
	if dir := kernelStack.dir(f.identity); dir != "" {
		path = kernelStack.backing(dir)
	}
	var st unix.Stat_t
	if path == "" || unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, nil
	}
	fd, err := openDescriptor(path, unix.O_RDONLY, 0)
	if err != nil {
		return -1, nil
	}
	if _, err := lockFile(fd, path, mode); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("%s: the file behind it: %w", f.path, err)
	}
	return fd, nil
}
