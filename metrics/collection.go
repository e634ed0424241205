package metrics

import (
	"strings"

	dto "github.com/prometheus/client_model/go"
)

// A metric is the place of a family in known, and in each collection.
type metric int

// known are the families of dmsnap, without numbers.
var known []*dto.MetricFamily

func define(kind dto.MetricType, name, help string) metric {
	name = "dmsnap_" + name
	known = append(known, &dto.MetricFamily{Name: &name, Help: &help, Type: &kind})
	return metric(len(known) - 1)
}

// label returns a label. Bytes that are no UTF-8, which a path may have, are replaced: the text format can't have them.
func label(name, value string) *dto.LabelPair {
	value = strings.ToValidUTF8(value, "\uFFFD")
	return &dto.LabelPair{Name: &name, Value: &value}
}

// A collection has the numbers of one report, each family at its metric's place.
type collection []*dto.MetricFamily

func newCollection() collection {
	c := make(collection, len(known))
	for i, f := range known {
		c[i] = &dto.MetricFamily{Name: f.Name, Help: f.Help, Type: f.Type}
	}
	return c
}

// made returns the families that have numbers.
func (c collection) made() (list []*dto.MetricFamily) {
	for _, f := range c {
		if len(f.Metric) > 0 {
			list = append(list, f)
		}
	}
	return list
}

// number adds a gauge or a counter. The labels are kept; they are sorted by their names.
func (c collection) number(m metric, value float64, labels ...*dto.LabelPair) {
	f := c[m]
	if *f.Type == counter {
		n := &struct { // one allocation
			metric  dto.Metric
			counter dto.Counter
			value   float64
		}{value: value}
		n.counter.Value, n.metric.Counter, n.metric.Label = &n.value, &n.counter, labels
		f.Metric = append(f.Metric, &n.metric)
		return
	}
	n := &struct {
		metric dto.Metric
		gauge  dto.Gauge
		value  float64
	}{value: value}
	n.gauge.Value, n.metric.Gauge, n.metric.Label = &n.value, &n.gauge, labels
	f.Metric = append(f.Metric, &n.metric)
}
