package block

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// A reader becomes a writer while it is read from, unless others exclude that, and after a refusal everything is as
// before.
func TestAllowWrites(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(o Options) (*File, error) {
		f, err := Open(path, o)
		if err == nil {
			t.Cleanup(func() { f.Close() })
		}
		return f, err
	}
	f, err := open(Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	other, err := open(Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.AllowWrites(); !errors.Is(err, ErrInUse) {
		t.Fatalf("beside another reader: %v", err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, ErrReadOnly) {
		t.Errorf("a write after the refusal: %v", err)
	}
	if third, err := open(Options{ReadOnly: true}); err != nil {
		t.Errorf("a reader after the refusal: %v", err)
	} else {
		third.Close()
	}
	other.Close()
	shared, err := open(Options{ReadOnly: true, Lock: LockShared}) // excludes nobody
	if err != nil {
		t.Fatal(err)
	}
	defer shared.Close()

	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for buf := make([]byte, 4096); ; {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := f.ReadAt(buf, 8192); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 3 {
		if err := f.AllowWrites(); err != nil {
			t.Fatal(err)
		}
		if _, err := open(Options{ReadOnly: true}); !errors.Is(err, ErrInUse) {
			t.Fatalf("a reader beside a writer: %v", err)
		}
		if err := f.DenyWrites(); err != nil {
			t.Fatal(err)
		}
		if _, err := open(Options{}); !errors.Is(err, ErrInUse) {
			t.Fatalf("a writer beside a reader: %v", err)
		}
	}
	close(stop)
	readers.Wait()

	if err := os.Rename(path, path+".moved"); err != nil { // it is the file that counts
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("another file"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.AllowWrites(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("here"), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if b, err := os.ReadFile(path); err != nil || string(b) != "another file" {
		t.Errorf("the file that took the path: %q, %v", b, err)
	}
	path += ".moved"
	if b, err := os.ReadFile(path); err != nil || string(b[:4]) != "here" {
		t.Errorf("the file: %q, %v", b[:4], err)
	}
	if again, err := open(Options{}); err != nil {
		t.Errorf("locks are left after Close: %v", err)
	} else {
		again.Close()
	}
}
