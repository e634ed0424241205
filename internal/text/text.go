// Package text writes names and counts as people read them.
package text

import (
	"fmt"
	"strconv"
	"strings"
)

// Name is a name as it is printed: quoted if it has spaces or control characters.
func Name(name string) string {
	if q := strconv.Quote(name); q != `"`+name+`"` || strings.Contains(name, " ") {
		return q
	}
	return name
}

// Count is "1 range" or "2 ranges".
func Count(n uint64, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// AppendInt adds n in decimal to b, with spaces before it up to a width.
func AppendInt(b []byte, width int, n int64) []byte {
	return padLeft(strconv.AppendInt(b, n, 10), len(b), width)
}

// AppendRange adds the n numbers from first on to b, "7" or "7-9", with spaces before them up to a width.
func AppendRange(b []byte, width int, first, n uint64) []byte {
	at := len(b)
	b = strconv.AppendUint(b, first, 10)
	if n != 1 {
		b = strconv.AppendUint(append(b, '-'), first+n-1, 10)
	}
	return padLeft(b, at, width)
}

const spaces = "                                                                "

// padLeft moves what is in b from at on to the right, so that it ends width after at. It does no more than 64 spaces.
func padLeft(b []byte, at, width int) []byte {
	pad := min(width-(len(b)-at), len(spaces))
	if pad <= 0 {
		return b
	}
	b = append(b, spaces[:pad]...)
	copy(b[at+pad:], b[at:len(b)-pad])
	copy(b[at:], spaces[:pad])
	return b
}

// ShellWords quotes arguments for a shell.
func ShellWords(args ...string) string {
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
