// Files writes files on a file system that may be taken away under it, and says afterwards whether each one
// that was made durable is there.
//
//	files write DIR LOG SEED DEVICE   until something fails, which is its proper end
//	files verify DIR LOG              prints what it found; status 1 when something is missing or wrong
//
// LOG is on another file system, which stays. Before a file is replaced or deleted a line says so, and one says so when
// that is durable: a file that was written under another name, made durable, renamed, and whose directory was made
// durable. A file system that keeps its word then shows each file as the last durable change left it, or as one that
// was begun later, whole.
//
// An fsync that succeeded isn't enough to say so. When another writer's commit fails because the device is gone,
// and takes our change with it, ext4 of Linux 6.1 may find no transaction left to wait for and report success
// (one of twenty kills). DEVICE, which never comes back while it is mounted, is therefore read afterwards,
// past the cache: if that succeeds it was there during the fsync.
package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/internal/kernelcase"
)

func main() {
	status := 2
	switch {
	case len(os.Args) == 6 && os.Args[1] == "write":
		status = write(os.Args[2], os.Args[3], os.Args[4], os.Args[5])
	case len(os.Args) == 4 && os.Args[1] == "verify":
		status = verify(os.Args[2], os.Args[3])
	default:
		fmt.Fprintln(os.Stderr, "usage: files write DIR LOG SEED DEVICE | files verify DIR LOG")
	}
	os.Exit(status)
}

// writers write at the same time, each to files of its own, so that commits of the journal are shared.
const (
	writers        = 3
	filesOfAWriter = 12
)

// A version is what a file holds: size bytes of a stream, or, with seed 0, that it is not there.
type version struct {
	seed uint64
	size int64
}

func write(dir, logName, seedText, deviceName string) int {
	seed, err := strconv.ParseUint(seedText, 10, 64)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	log, err := os.OpenFile(logName, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	device, err := openDirect(deviceName)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	defer device.Close()
	var all sync.WaitGroup
	for n := range writers {
		r := rand.New(rand.NewPCG(seed, uint64(n)))
		all.Go(func() {
			for {
				name := fmt.Sprintf("w%d-%d", n, r.IntN(filesOfAWriter))
				v := version{r.Uint64() | 1, r.Int64N(60_000)}
				if r.IntN(5) == 0 {
					v = version{}
				}
				// One write call is one line, also when others append.
				fmt.Fprintf(log, "begin %s %d %d\n", name, v.seed, v.size)
				if err := errors.Join(replace(dir, name, v), device.isThere()); err != nil {
					fmt.Println("ended by", err)
					return
				}
				fmt.Fprintf(log, "done %s %d %d\n", name, v.seed, v.size)
			}
		})
	}
	all.Wait()
	return 0
}

// replace makes a file hold a version, durably and at once.
func replace(dir, name string, v version) error {
	path := filepath.Join(dir, name)
	if v.seed == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return syncFolder(dir)
	}
	f, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	_, err = f.Write(kernelcase.Stream(v.seed, 0, v.size))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncFolder(dir)
}

// A direct is a block device that is read past the cache.
type direct struct{ *os.File }

func openDirect(name string) (direct, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_DIRECT, 0)
	return direct{f}, err
}

// isThere fails when the device can't be read any more.
func (d direct) isThere() error {
	page, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(page)
	_, err = d.ReadAt(page, 0)
	return err
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// verify also ends the changes that were under way: what is found now is what was kept.
func verify(dir, logName string) int {
	may, done, err := readLog(logName)
	if err != nil {
		fmt.Println(err)
		return 2
	}
	log, err := os.OpenFile(logName, os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		fmt.Println(err)
		return 2
	}
	wrong := 0
	for name, versions := range may {
		content, err := os.ReadFile(filepath.Join(dir, name))
		i := slices.IndexFunc(versions, func(v version) bool {
			if v.seed == 0 {
				return errors.Is(err, fs.ErrNotExist)
			}
			return err == nil && bytes.Equal(content, kernelcase.Stream(v.seed, 0, v.size))
		})
		if i < 0 {
			wrong++
			fmt.Printf("%s: %d bytes (%v), may be one of %v; lately:\n%s", name, len(content), err, versions, lastLines(logName, name))
			continue
		}
		fmt.Fprintf(log, "found %s %d %d\n", name, versions[i].seed, versions[i].size)
	}
	fmt.Printf("%d files, %d durable changes\n", len(may), done)
	if wrong > 0 {
		return 1
	}
	return 0
}

// lastLines returns the end of what the log says of a file, with the numbers of the lines.
func lastLines(logName, file string) string {
	log, err := os.ReadFile(logName)
	if err != nil {
		return err.Error()
	}
	var all []string
	for i, line := range strings.Split(string(log), "\n") {
		if strings.Contains(line, " "+file+" ") {
			all = append(all, fmt.Sprintf("\t%d: %s\n", i+1, line))
		}
	}
	return strings.Join(all[max(0, len(all)-6):], "")
}

// readLog returns what each file may hold, and how many changes were made durable.
func readLog(name string) (may map[string][]version, done int, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	may = map[string][]version{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var what, file string
		var v version
		if _, err := fmt.Fscan(strings.NewReader(lines.Text()), &what, &file, &v.seed, &v.size); err != nil {
			return nil, 0, fmt.Errorf("%s: %q: %w", name, lines.Text(), err)
		}
		if may[file] == nil {
			may[file] = []version{{}}
		}
		switch what {
		case "begin":
			may[file] = append(may[file], v)
		case "done":
			done++
			fallthrough
		case "found":
			may[file] = []version{v}
		}
	}
	return may, done, lines.Err()
}
