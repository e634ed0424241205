package blocktest_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/block"
	"github.com/dmsnap/dmsnap/block/blocktest"
)

// letters writes one letter a sector, "ab" at sector 3 filling 3 with a and 4 with b.
func letters(dev block.Device, sector int64, s string) {
	if _, err := dev.WriteAt(spread(s), sector*512); err != nil {
		panic(err)
	}
}

func spread(s string) []byte {
	var p []byte
	for i := range s {
		p = append(p, bytes.Repeat([]byte{s[i]}, 512)...)
	}
	return p
}

// gather is the opposite of spread, and panics at a torn sector.
func gather(p []byte) string {
	s := ""
	for i := 0; i < len(p); i += 512 {
		if !bytes.Equal(p[i:i+512], bytes.Repeat(p[i:i+1], 512)) {
			panic(fmt.Sprintf("sector %d is torn", i/512))
		}
		s += string(p[i])
	}
	return s
}

// images lists the disks that a cut may leave, in the order shown.
func images(dev *blocktest.Crash, o blocktest.Choices) []string {
	var list []string
	for image := range dev.Power().Cut().Images(o) {
		list = append(list, gather(image.Disk(dev)))
	}
	return list
}

// possible is the same as a set.
func possible(dev *blocktest.Crash) string {
	list := images(dev, blocktest.Choices{All: 1 << 20})
	n := len(list)
	slices.Sort(list)
	if list = slices.Compact(list); len(list) != n {
		panic("an image was shown twice")
	}
	return strings.Join(list, " ")
}

func expect(t *testing.T, dev *blocktest.Crash, want string) {
	t.Helper()
	if got := possible(dev); got != want {
		t.Errorf("possible disks: %s, want %s", got, want)
	}
}

func TestCrashModel(t *testing.T) {
	dev := blocktest.NewCrash(spread("...."))
	expect(t, dev, "....")

	letters(dev, 0, "a")
	letters(dev, 2, "b")
	expect(t, dev, ".... ..b. a... a.b.")
	if got := gather(dev.Bytes()); got != "a.b." {
		t.Errorf("reads see %s", got)
	}
	if got := gather(dev.Durable()); got != "...." {
		t.Errorf("durable is %s", got)
	}

	// A second version of a sector: any of the two may be left.
	letters(dev, 0, "c")
	expect(t, dev, ".... ..b. a... a.b. c... c.b.")

	// A durable write makes its own sectors durable and leaves the others open.
	if err := dev.WriteDurableAt(spread("D"), 512); err != nil {
		t.Fatal(err)
	}
	expect(t, dev, ".D.. .Db. aD.. aDb. cD.. cDb.")

	// Over a sector that was open it settles that sector.
	if err := dev.WriteDurableAt(spread("E"), 0); err != nil {
		t.Fatal(err)
	}
	expect(t, dev, "ED.. EDb.")

	if err := dev.Flush(); err != nil {
		t.Fatal(err)
	}
	expect(t, dev, "EDb.")

	// What was flushed is not lost by a later write, and zeroing is a write.
	if err := block.Zero(dev, 0, 1024, 0); err != nil {
		t.Fatal(err)
	}
	expect(t, dev, "\x00\x00b. \x00Db. E\x00b. EDb.")
}

func TestCrashIsBySectors(t *testing.T) {
	dev := blocktest.NewCrash(spread("..."))
	// 100 bytes over an edge touch two sectors, each whole or not at all.
	if _, err := dev.WriteAt(bytes.Repeat([]byte("x"), 100), 512-50); err != nil {
		t.Fatal(err)
	}
	n := 0
	for image := range dev.Power().Cut().Images(blocktest.Choices{}) {
		disk := image.Disk(dev)
		n += bytes.Count(disk, []byte("x"))
		if c := bytes.Count(disk[:512], []byte("x")); c != 0 && c != 50 {
			t.Errorf("%d bytes of the first sector", c)
		}
	}
	if n != 0+50+50+100 {
		t.Errorf("%d bytes in all images together", n)
	}
	// Two writes of one sector: the later contains the earlier.
	dev = blocktest.NewCrash(make([]byte, 700))
	dev.WriteAt([]byte("1"), 600)
	dev.WriteAt([]byte("2"), 601)
	var list []string
	for image := range dev.Power().Cut().Images(blocktest.Choices{}) {
		list = append(list, string(image.Disk(dev)[600:602]))
	}
	if got := fmt.Sprintf("%q", list); got != `["\x00\x00" "1\x00" "12"]` {
		t.Error(got)
	}
}

// A flush is of one device; a cut is of all at one moment.
func TestDevicesLosePowerTogether(t *testing.T) {
	var power blocktest.Power
	a := power.NewCrash("A", spread(".."))
	b := power.NewCrash("B", spread("..."))
	letters(a, 0, "1")
	letters(b, 1, "2")
	letters(a, 1, "3")
	if got := strings.Join(power.Pending(), ", "); got != "A 0, B 1, A 1" {
		t.Errorf("pending: %s", got)
	}
	show := func(o blocktest.Choices) string {
		var list []string
		for image := range power.Cut().Images(o) {
			list = append(list, gather(image.Disk(a))+gather(image.Disk(b)))
		}
		return strings.Join(list, " ")
	}
	// Prefixes go over all devices in the order of writing; so do omissions and lone survivors.
	want := ".. ... 13 .2." + // extremes
		" 1. ... 1. .2." + // prefixes
		" .3 .2. 13 ... 1. .2." + // omissions
		" 1. ... .. .2. .3 ..." // lone
	if got := show(blocktest.Choices{All: 1}); got != joinPairs(want) {
		t.Errorf("systematic images: %s", got)
	}
	if err := a.Flush(); err != nil {
		t.Fatal(err)
	}
	if got := show(blocktest.Choices{}); got != "13... 13.2." {
		t.Errorf("after a flush of A: %s", got)
	}
	// The cut stays as it was when the devices go on.
	cut := power.Cut()
	letters(b, 0, "4")
	b.Flush()
	for image := range cut.Images(blocktest.Choices{}) {
		if got := gather(image.Disk(b)); got != "..." && got != ".2." {
			t.Errorf("an old cut shows %s", got)
		}
	}
	if cut.Count(100) != 2 || cut.Count(1) != 1 {
		t.Errorf("count %d", cut.Count(100))
	}
}

// joinPairs writes "A B A B" as "AB AB".
func joinPairs(s string) string {
	words := strings.Fields(s)
	var list []string
	for i := 0; i < len(words); i += 2 {
		list = append(list, words[i]+words[i+1])
	}
	return strings.Join(list, " ")
}

func TestSystematicImages(t *testing.T) {
	dev := blocktest.NewCrash(spread("..."))
	letters(dev, 0, "a")
	letters(dev, 1, "b")
	letters(dev, 0, "c")
	got := strings.Join(images(dev, blocktest.Choices{All: 1}), " ")
	want := "... cb. " + // nothing, everything
		"a.. ab. " + // prefixes
		".b. c.. ab. " + // without a (and so without c), without b, without c
		"a.. .b. c.." // alone
	if got != want {
		t.Errorf("images: %s\nwant:   %s", got, want)
	}
	// Random ones follow, the same for the same seed, and never anything impossible.
	set := strings.Fields(possible(dev))
	random := func(seed uint64) []string {
		return images(dev, blocktest.Choices{All: 1, Random: 50, Seed: seed})[10:]
	}
	for _, s := range random(1) {
		if !slices.Contains(set, s) {
			t.Errorf("impossible: %s", s)
		}
	}
	if len(random(1)) != 50 || !slices.Equal(random(1), random(1)) || slices.Equal(random(1), random(2)) {
		t.Error("the seed does not decide the random images")
	}
	// Limit bounds each series.
	letters(dev, 0, strings.Repeat("x", 3))
	letters(dev, 0, strings.Repeat("y", 3))
	if n := len(images(dev, blocktest.Choices{All: 1, Limit: 3, Random: 4})); n != 2+3*3+4 {
		t.Errorf("%d images", n)
	}
	// A consumer may stop at any time.
	for range dev.Power().Cut().Images(blocktest.Choices{All: 1}) {
		break
	}
	for range dev.Power().Cut().Images(blocktest.Choices{All: 1000}) {
		break
	}
}

// The observer sees the moment within a durable write at which only a part of it may be durable.
func TestObserve(t *testing.T) {
	dev := blocktest.NewCrash(spread("..."))
	var seen []string
	dev.Power().Observe(func(op blocktest.Op) { seen = append(seen, op.String()+": "+possible(dev)) })
	letters(dev, 0, "a")
	block.WriteDurable(dev, spread("bc"), 512)
	dev.Flush()
	dev.Power().Observe(nil)
	letters(dev, 0, "z")
	want := []string{
		"W 0+1: ... a..",
		"WD 1+2: ... ..c .b. .bc a.. a.c ab. abc",
		"WD 1+2: .bc abc",
		"F: abc",
	}
	if !slices.Equal(seen, want) {
		t.Errorf("seen:\n%s\nwant:\n%s", strings.Join(seen, "\n"), strings.Join(want, "\n"))
	}
}

func TestImageString(t *testing.T) {
	var power blocktest.Power
	dev := power.NewCrash("COW", spread("..."))
	letters(dev, 0, "ab")
	letters(dev, 1, "c")
	var list []string
	for image := range power.Cut().Images(blocktest.Choices{}) {
		list = append(list, image.String())
	}
	if list[0] != "0 of 2 unflushed sectors survived" ||
		list[len(list)-1] != "2 of 2 unflushed sectors survived: COW 0, COW 1 (write 2 of 2)" {
		t.Errorf("%q", list)
	}
}

func TestCrashGrow(t *testing.T) {
	dev := blocktest.NewCrash(make([]byte, 700))
	dev.WriteAt([]byte("x"), 699)
	if err := dev.Grow(2000); err != nil {
		t.Fatal(err)
	}
	dev.WriteAt([]byte("y"), 1999)
	for image := range dev.Power().Cut().Images(blocktest.Choices{}) {
		disk := image.Disk(dev)
		if len(disk) != 2000 || disk[700] != 0 {
			t.Errorf("%d bytes", len(disk))
		}
	}
	if err := dev.Flush(); err != nil {
		t.Fatal(err)
	}
	if b := dev.Durable(); len(b) != 2000 || b[699] != 'x' || b[1999] != 'y' {
		t.Error("the content did not survive")
	}
}
