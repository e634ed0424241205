// Package kernelcase holds stores that a running Linux kernel wrote, with the operations that led to
// them: the reference that fits in a unit test. Only tests import it.
//
// testdata/kernel-6.1 has a directory a case: case.json with the operations and with what the kernel said of the
// result, and the images of COW device and origin afterwards (for merges: after the merge). The origin before the first
// operation is the stream of a seed, see [Stream].
package kernelcase

import (
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"io"
	"io/fs"
	"testing"
)

//go:embed testdata
var testdata embed.FS

const root = "testdata/kernel-6.1"

// A Case is one run of the kernel. Sizes are in sectors, digests are SHA-256 in hexadecimal.
type Case struct {
	Name          string
	Kind          string
	Store         string // "P", "PO" or "N"
	ChunkSectors  uint32 `json:"chunk_sectors"`
	OriginSectors int64  `json:"origin_sectors"`
	COWSectors    int64  `json:"cow_sectors"`
	OriginSeed    uint64 `json:"origin_seed"`
	Steps         []Step

	Kernel struct {
		Status       string // after the steps
		Table        string
		Snap, Origin string // digests of the devices as the kernel showed them, after the steps
		MergeStatus  string `json:"mstatus"`
		MergeStopped string `json:"mstatus2"`
		MergedOrigin string `json:"morigin"`
	}
	OriginBefore string `json:"origin_before_sha256"`
	OriginAfter  string `json:"origin_sha256"`
	COWAfter     string `json:"cow_sha256"`

	Header *struct {
		Valid        uint32
		Version      uint32
		ChunkSectors uint32 `json:"chunk_sectors"`
	} `json:"cow"`
	Exceptions [][2]uint64 // old, new, in the order of the slots
}

// A Step is one operation: [target, "w", byte offset, bytes, seed] or [target, "d", byte offset, bytes].
type Step struct {
	Target string // "snap" or "origin"
	Op     string // "w" writes the seed's stream, "d" discards
	Off, N int64
	Seed   uint64
}

// UnmarshalJSON reads the list form.
func (s *Step) UnmarshalJSON(b []byte) error {
	fields := []any{&s.Target, &s.Op, &s.Off, &s.N, &s.Seed}
	return json.Unmarshal(b, &fields)
}

// All returns the cases in the order of their names; with -short every third of them, for unpacking takes time.
func All(t testing.TB) []Case {
	t.Helper()
	dirs, err := fs.ReadDir(testdata, root)
	if err != nil {
		t.Fatal(err)
	}
	if len(dirs) != 24 {
		t.Fatalf("%d cases, want 24", len(dirs))
	}
	var cases []Case
	for n, d := range dirs {
		if testing.Short() && n%3 != 0 {
			continue
		}
		b, err := fs.ReadFile(testdata, root+"/"+d.Name()+"/case.json")
		if err != nil {
			t.Fatal(err)
		}
		var c Case
		if err := json.Unmarshal(b, &c); err != nil {
			t.Fatalf("%s: %v", d.Name(), err)
		}
		cases = append(cases, c)
	}
	return cases
}

// COW returns the image of the COW device after the steps.
func (c Case) COW() ([]byte, error) { return c.image("cow") }

// Origin returns the image of the origin after the steps.
func (c Case) Origin() ([]byte, error) { return c.image("origin") }

func (c Case) image(name string) ([]byte, error) {
	f, err := testdata.Open(root + "/" + c.Name + "/" + name + ".gz")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

// Digest is the SHA-256 of b as cases have it.
func Digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// Stream returns n bytes of the stream of seed from byte off on; both are multiples of 512. Each sector
// repeats one little-endian 64-bit word.
func Stream(seed uint64, off, n int64) []byte {
	b := make([]byte, n)
	for s := int64(0); s < n/512; s++ {
		x := seed*0x9E3779B97F4A7C15 + uint64(off/512+s)*0xBF58476D1CE4E5B9 + 0x94D049BB133111EB
		x ^= x >> 30
		x *= 0xBF58476D1CE4E5B9
		x ^= x >> 27
		x *= 0x94D049BB133111EB
		x ^= x >> 31
		for i := s * 512; i < (s+1)*512; i += 8 {
			binary.LittleEndian.PutUint64(b[i:], x)
		}
	}
	return b
}
