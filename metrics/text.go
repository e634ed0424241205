package metrics

import (
	"math"
	"strconv"
	"strings"
)

// A family is the numbers of one name, in the text format of Prometheus.
type family struct {
	kind, name, help string
}

const (
	gauge   = "gauge"
	counter = "counter"
	times   = "histogram"
)

func define(kind, name, help string) family {
	return family{kind: kind, name: "dmsnap_" + name, help: help}
}

// A text is the text of one scrape. Its bytes are used again for another one.
type text []byte

// begin adds the lines above a family's numbers.
func (t *text) begin(f family) {
	b := *t
	b = append(b, "# HELP "...)
	b = append(b, f.name...)
	b = append(b, ' ')
	b = append(b, f.help...) // of this package: without line breaks and backslashes
	b = append(b, "\n# TYPE "...)
	b = append(b, f.name...)
	b = append(b, ' ')
	b = append(b, f.kind...)
	*t = append(b, '\n')
}

// sample adds a number. labels are as label returns them, joined by commas; "": there are none.
func (t *text) sample(name, suffix, labels, more string, value float64) {
	b := *t
	b = append(b, name...)
	b = append(b, suffix...)
	if labels != "" || more != "" {
		b = append(b, '{')
		b = append(b, labels...)
		if labels != "" && more != "" {
			b = append(b, ',')
		}
		b = append(b, more...)
		b = append(b, '}')
	}
	b = append(b, ' ')
	switch {
	case value == math.Trunc(value) && math.Abs(value) < 1e6: // the same text, in less time
		b = strconv.AppendInt(b, int64(value), 10)
	case math.IsInf(value, 1):
		b = append(b, "+Inf"...)
	default:
		b = strconv.AppendFloat(b, value, 'g', -1, 64)
	}
	*t = append(b, '\n')
}

var escape = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

// label returns a label. Bytes that are no UTF-8, which a path may have, are replaced: the text format can't have them.
func label(name, value string) string {
	return name + `="` + escape.Replace(strings.ToValidUTF8(value, "\uFFFD")) + `"`
}
