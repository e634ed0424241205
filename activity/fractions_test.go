package activity_test

import (
	"errors"
	"math"
	"slices"
	"testing"

	"github.com/dmsnap/dmsnap/activity"
	"github.com/dmsnap/dmsnap/block"
)

// disk describes a disk by the lengths of extents that have the flag and have it not, by turns. It says at most few of
// them in one call.
func disk(few int, lengths ...int64) (size int64, extents func(off, n int64) ([]block.Extent, error)) {
	for _, l := range lengths {
		size += l
	}
	return size, func(off, n int64) (list []block.Extent, err error) {
		at := int64(0)
		for i, l := range lengths {
			from, to := max(at, off), min(at+l, off+n)
			if at += l; from >= to || len(list) == few {
				continue
			}
			list = append(list, block.Extent{Length: to - from, Flags: block.ExtentFlags((i + 1) % 2)})
		}
		return list, nil
	}
}

func TestFractions(t *testing.T) {
	for few := 1; few <= 6; few++ {
		size, extents := disk(few, 1000, 1000, 500, 1500, 4000)
		got, err := activity.Fractions(size, 4, 1, extents)
		if want := []float64{0.5, 0.25, 1, 1}; err != nil || !slices.Equal(got, want) {
			t.Errorf("%d extents a call: %v, %v; want %v", few, got, err, want)
		}
	}
	size, extents := disk(3, 1<<61, 1<<60, 1<<60)
	if got, err := activity.Fractions(size, 7, 1, extents); err != nil || got[0] != 1 || math.Abs(got[4]) > 1e-9 || got[6] < 0.9 {
		t.Errorf("a huge disk: %v, %v", got, err)
	}
	if got, err := activity.Fractions(512, 100, 1, func(int64, int64) ([]block.Extent, error) { return []block.Extent{{Length: 512, Flags: 1}}, nil }); err != nil || !slices.Equal(got, []float64{1}) {
		t.Errorf("a disk of one sector: %v, %v", got, err)
	}
}

// However many extents a disk has, the calls are bounded.
func TestFractionsAreBounded(t *testing.T) {
	calls := 0
	got, err := activity.Fractions(1<<50, 64, 1, func(off, n int64) ([]block.Extent, error) {
		calls++
		return []block.Extent{{Length: 512, Flags: block.ExtentFlags(off / 512 % 2)}}, nil
	})
	if err != nil || calls > 64*16 {
		t.Fatalf("%d calls, %v", calls, err)
	}
	for i, f := range got {
		if f < 0.4 || f > 0.6 {
			t.Errorf("part %d: %v", i, f)
		}
	}
}

func TestFractionsFail(t *testing.T) {
	bad := errors.New("bad disk")
	if _, err := activity.Fractions(4096, 4, 1, func(int64, int64) ([]block.Extent, error) { return nil, bad }); err != bad {
		t.Error(err)
	}
	if got, err := activity.Fractions(4096, 4, 1, func(int64, int64) ([]block.Extent, error) { return nil, nil }); err != nil || slices.Max(got) != 0 {
		t.Errorf("nothing is known: %v, %v", got, err)
	}
}
