// Package bytesize reads and writes numbers of bytes as people do.
package bytesize

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// units are the suffixes of a size: s for sectors, powers of 1024, and, as in GNU tools, powers of 1000 with a plain
// B. Case is ignored.
var units = map[string]int64{
	"": 1, "b": 1, "s": 512,
	"k": 1 << 10, "ki": 1 << 10, "kib": 1 << 10, "kb": 1e3,
	"m": 1 << 20, "mi": 1 << 20, "mib": 1 << 20, "mb": 1e6,
	"g": 1 << 30, "gi": 1 << 30, "gib": 1 << 30, "gb": 1e9,
	"t": 1 << 40, "ti": 1 << 40, "tib": 1 << 40, "tb": 1e12,
	"p": 1 << 50, "pi": 1 << 50, "pib": 1 << 50, "pb": 1e15,
}

// Parse reads a size: "4KiB", "64M", "4k", "16s" (sectors), "1048576". It returns bytes.
func Parse(s string) (int64, error) {
	digits := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	unit, known := units[strings.ToLower(s[len(digits):])]
	n, err := strconv.ParseUint(digits, 10, 63)
	if !known || err != nil && !isRange(err) {
		return 0, fmt.Errorf("%q is not a size such as 4096, 16s (sectors), 4KiB, 64M or 10GiB", s)
	}
	if err != nil || int64(n) > math.MaxInt64/unit {
		return 0, fmt.Errorf("size %q is too large", s)
	}
	return int64(n) * unit, nil
}

func isRange(err error) bool {
	e, ok := err.(*strconv.NumError)
	return ok && e.Err == strconv.ErrRange
}

// Text formats a number of bytes: "1.5 GiB".
func Text(n int64) string { return string(Append(nil, n)) }

var unitNames = [...]string{" KiB", " MiB", " GiB", " TiB", " PiB", " EiB"}

// Append adds Text(n) to b.
func Append(b []byte, n int64) []byte {
	if n < 1<<10 {
		return append(strconv.AppendInt(b, n, 10), " bytes"...)
	}
	f, unit := float64(n)/(1<<10), 0
	for f >= 1024 && unit < len(unitNames)-1 {
		f, unit = f/1024, unit+1
	}
	if f == math.Trunc(f) {
		b = strconv.AppendInt(b, int64(f), 10)
	} else {
		b = strconv.AppendFloat(b, f, 'f', 1, 64)
	}
	return append(b, unitNames[unit]...)
}
