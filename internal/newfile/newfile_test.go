package newfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dmsnap/dmsnap/block"
)

// text returns a fill that writes a string.
func text(s string) func(*os.File) error {
	return func(f *os.File) error {
		_, err := f.WriteString(s)
		return err
	}
}

func write(t *testing.T, path, s string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
		t.Fatal(err)
	}
}

// wantFiles wants these files, and no others, in a directory: name and content alternate.
func wantFiles(t *testing.T, dir string, want ...string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != len(want)/2 {
		t.Errorf("%s: %v", dir, list)
	}
	for i := 0; i < len(want); i += 2 {
		if b, err := os.ReadFile(filepath.Join(dir, want[i])); err != nil || string(b) != want[i+1] {
			t.Errorf("%s: %q, %v; want %q", want[i], b, err, want[i+1])
		}
	}
}

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	defer unix.Umask(unix.Umask(0o777)) // the mode does not depend on it
	out := filepath.Join(dir, "out")
	if err := Write(out, Options{}, text("first")); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, dir, "out", "first")
	if info, err := os.Stat(out); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := Write(out, Options{}, text("second")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("an existing file: %v", err)
	}
	if err := Write(out, Options{Replace: true, Inputs: []string{out}}, text("second")); err == nil || !strings.Contains(err.Error(), "same file") {
		t.Errorf("an input: %v", err)
	}
	failed := errors.New("failed")
	if err := Write(out, Options{Replace: true}, func(f *os.File) error {
		f.WriteString("half")
		return failed
	}); !errors.Is(err, failed) {
		t.Errorf("a fill that fails: %v", err)
	}
	wantFiles(t, dir, "out", "first")
	if err := Write(out, Options{Replace: true}, text("second")); err != nil {
		t.Error(err)
	}
	wantFiles(t, dir, "out", "second")
	long := strings.Repeat("n", 255)
	if err := Write(filepath.Join(dir, long), Options{}, text("long")); err != nil {
		t.Error(err)
	}
	wantFiles(t, dir, "out", "second", long, "long")
}

// What killed processes left is removed, and nothing else: neither what another call fills now, nor other names and kinds of files.
func TestRemoveLeft(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	for _, name := range []string{".out.12.part", ".out.3.part", ".out.x.part", ".out..part", ".outer.12.part", "out.12.part", ".out.12.partial"} {
		write(t, filepath.Join(dir, name), name)
	}
	if err := errors.Join(os.Chmod(filepath.Join(dir, ".out.3.part"), 0o400), os.Mkdir(filepath.Join(dir, ".out.4.part"), 0o700),
		os.Symlink("out", filepath.Join(dir, ".out.5.part"))); err != nil {
		t.Fatal(err)
	}
	err := Write(out, Options{RemoveLeft: true}, func(f *os.File) error {
		write(t, filepath.Join(dir, ".out.6.part"), "left")
		if err := Write(out, Options{RemoveLeft: true}, text("the second one")); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(f.Name()); err != nil {
			t.Error(err)
		}
		return text("the first one")(f)
	})
	if !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, ".out.4.part")), os.Remove(filepath.Join(dir, ".out.5.part"))); err != nil {
		t.Error(err)
	}
	wantFiles(t, dir, ".out..part", ".out..part", ".out.12.partial", ".out.12.partial", ".out.x.part", ".out.x.part", ".outer.12.part", ".outer.12.part",
		"out", "the second one", "out.12.part", "out.12.part")
}

func TestWriteDevice(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	err := WriteDevice(out, Options{}, 4096, func(f *block.File) error {
		if _, err := block.Open(f.Path(), block.Options{}); !errors.Is(err, block.ErrInUse) {
			t.Errorf("it is not locked: %v", err)
		}
		_, err := f.WriteAt([]byte("data"), 512)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(out); err != nil || len(b) != 4096 || string(b[512:516]) != "data" {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// What is not a regular file is refused, whatever the options.
func TestSpecialTargets(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(unix.Mkfifo(at("fifo"), 0o600), os.Mkdir(at("folder"), 0o700), os.Symlink("none", at("dangling")),
		os.Symlink("/dev/null", at("null"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"fifo", "folder", "dangling", "null", "missing/file"} {
		for _, replace := range []bool{false, true} {
			o := Options{Replace: replace}
			if err := o.refuses(at(name)); err == nil {
				t.Errorf("%s, replace %v: not refused", name, replace)
			} else if special := name != "dangling" && name != "missing/file"; errors.Is(err, ErrNotRegular) != special {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if err := Write("-", Options{Replace: true}, text("")); err != ErrStandardOutput {
		t.Errorf("-: %v", err)
	}
	list, err := os.ReadDir(dir)
	if err != nil || len(list) != 4 {
		t.Errorf("%v, %v", list, err)
	}
}

// refuses returns the error of Check, which must be that of Write.
func (o Options) refuses(path string) error {
	err := Check(path, o)
	if again := Write(path, o, text("")); err == nil || again == nil || err.Error() != again.Error() {
		return nil
	}
	return err
}

// A file that is in use is not replaced; while it is being replaced nobody begins to use it.
func TestTargetInUse(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	write(t, out, "served")
	for _, o := range []block.Options{{}, {ReadOnly: true}} {
		held, err := block.Open(out, o)
		if err != nil {
			t.Fatal(err)
		}
		if err := (Options{Replace: true}).refuses(out); !errors.Is(err, block.ErrInUse) {
			t.Errorf("%+v: %v", o, err)
		}
		held.Close()
	}
	wantFiles(t, dir, "out", "served")
	if err := Write(out, Options{Replace: true}, func(f *os.File) error {
		for _, o := range []block.Options{{}, {ReadOnly: true}} {
			if _, err := block.Open(out, o); !errors.Is(err, block.ErrInUse) {
				t.Errorf("%+v while it is replaced: %v", o, err)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	wantFiles(t, dir, "out", "")
}

// What takes the name meanwhile stays.
func TestTargetAppears(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	for _, replace := range []bool{false, true} {
		err := Write(out, Options{Replace: replace}, func(*os.File) error {
			write(t, out, "others")
			return nil
		})
		if !errors.Is(err, fs.ErrExist) {
			t.Errorf("replace %v: %v", replace, err)
		}
		wantFiles(t, dir, "out", "others")
		os.Remove(out)
	}
	write(t, out, "old")
	err := Write(out, Options{Replace: true}, func(*os.File) error {
		os.Remove(out)
		write(t, out, "others")
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), "replaced meanwhile") {
		t.Errorf("the old file was replaced meanwhile: %v", err)
	}
	wantFiles(t, dir, "out", "others")
}

// The new file has the mode, the owner and the extended attributes of the one that it replaces, behind a link too.
func TestKeepsAccess(t *testing.T) {
	dir := t.TempDir()
	real, out := filepath.Join(dir, "real"), filepath.Join(dir, "out")
	write(t, real, "old")
	if err := os.Symlink("real", out); err != nil {
		t.Fatal(err)
	}
	uid, gid := os.Getuid(), os.Getgid()
	if uid == 0 {
		uid, gid = 1234, 4321
	}
	// An access list: owner rw, user 1000 r, group none, mask r, others none.
	acl := []byte{2, 0, 0, 0}
	for _, e := range [][3]byte{{1, 6, 0xff}, {2, 4, 0}, {4, 0, 0xff}, {16, 4, 0xff}, {32, 0, 0xff}} {
		id := []byte{0xe8, 3, 0, 0}
		if e[2] == 0xff {
			id = []byte{0xff, 0xff, 0xff, 0xff}
		}
		acl = append(append(acl, e[0], 0, e[1], 0), id...)
	}
	if err := errors.Join(os.Chown(real, uid, gid), os.Chmod(real, 0o440)); err != nil {
		t.Fatal(err)
	}
	noUser := unix.Setxattr(real, "user.note", []byte("kept"), 0)
	noACL := unix.Setxattr(real, accessList, acl, 0)
	var before unix.Stat_t
	if err := unix.Stat(real, &before); err != nil {
		t.Fatal(err)
	}
	if err := Write(out, Options{Replace: true}, text("new")); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, dir, "out", "new", "real", "new")
	if to, err := os.Readlink(out); to != "real" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	var after unix.Stat_t
	if err := unix.Stat(real, &after); err != nil {
		t.Fatal(err)
	}
	if after.Mode != before.Mode || after.Uid != before.Uid || after.Gid != before.Gid || after.Ino == before.Ino {
		t.Errorf("mode %o, owner %d:%d; want mode %o, owner %d:%d", after.Mode, after.Uid, after.Gid, before.Mode, before.Uid, before.Gid)
	}
	for name, want := range map[string][]byte{"user.note": []byte("kept"), accessList: acl} {
		if name == accessList && noACL != nil || name != accessList && noUser != nil {
			t.Logf("SKIPPED: %s: %v", name, errors.Join(noACL, noUser))
			continue
		}
		if got, err := readAttribute(real, name); err != nil || string(got) != string(want) {
			t.Errorf("%s: %x, %v; want %x", name, got, err, want)
		}
	}

	// A directory's default list does not get to a file that had none.
	if noACL == nil && unix.Setxattr(dir, "system.posix_acl_default", acl, 0) == nil {
		plain := filepath.Join(dir, "plain")
		write(t, plain, "old")
		if err := errors.Join(unix.Removexattr(plain, accessList), os.Chmod(plain, 0o604)); err != nil {
			t.Fatal(err)
		}
		if err := Write(plain, Options{Replace: true}, text("new")); err != nil {
			t.Fatal(err)
		}
		names, err := attributes(plain)
		if info, _ := os.Stat(plain); err != nil || strings.Contains(strings.Join(names, " "), accessList) || info.Mode() != 0o604 {
			t.Errorf("%q, mode %v, %v", names, info.Mode(), err)
		}
	}
}
