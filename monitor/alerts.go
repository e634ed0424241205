package monitor

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dmsnap/dmsnap/server/api"
)

// AlertKind is what an alert is about.
type AlertKind string

// The kinds of alerts.
const (
	AlertFill        AlertKind = "fill"         // the COW device is filled beyond a threshold
	AlertTimeToFull  AlertKind = "time_to_full" // it will be full soon
	AlertFull        AlertKind = "full"         // there was no space for a write
	AlertInvalid     AlertKind = "invalid"      // the content of the snapshot is lost
	AlertFailed      AlertKind = "failed"       // an error of a device: writes are refused, or flushes fail
	AlertMergeDone   AlertKind = "merge_done"
	AlertMergeFailed AlertKind = "merge_failed"
	AlertRefused     AlertKind = "changes_refused" // the server accepts no changes
)

// An Alert says that something began, or that it ended.
type Alert struct {
	Time     time.Time `json:"time"`
	Kind     AlertKind `json:"kind"`
	State    string    `json:"state"`    // firing or resolved
	Severity string    `json:"severity"` // info, warning or critical
	Disk     string    `json:"disk,omitempty"`
	Name     string    `json:"name,omitempty"` // the element
	Message  string    `json:"message"`        // for people
	Value    float64   `json:"value,omitempty"`
	// Threshold is what Value has passed: percent, or seconds.
	Threshold float64 `json:"threshold,omitempty"`
}

// Key is the same for the beginning and the end of one thing.
func (a Alert) Key() string {
	if a.Kind == AlertFill || a.Kind == AlertTimeToFull {
		return fmt.Sprintf("%s %s %v", a.Kind, a.Name, a.Threshold)
	}
	return string(a.Kind) + " " + a.Name
}

// Thresholds are when alerts begin.
type Thresholds struct {
	Fill       []float64     // percent of a COW device; nil: 80, 90 and 95
	TimeToFull time.Duration // 0: one hour; negative: never
}

// Alerts follows reports. The zero value has the default thresholds. It is not for concurrent use.
type Alerts struct {
	Thresholds
	firing map[string]Alert
}

const (
	firing, resolved        = "firing", "resolved"
	info, warning, critical = "info", "warning", "critical"

	fillMargin = 2   // percent below a threshold at which an alert ends, so that it does not begin again and again
	timeMargin = 1.5 // times the threshold
)

// Step returns what began and what ended since the last report, in the order of the elements.
func (a *Alerts) Step(r Report) []Alert {
	if a.firing == nil {
		a.firing = map[string]Alert{}
	}
	var news []Alert
	still := map[string]bool{}
	// An alert that is begins, and one that is not goes on if it has begun. Most elements have none, so that a text is made
	// only of one that may be.
	on := func(is bool, alert Alert) {
		key := alert.Key()
		_, before := a.firing[key]
		if !is && !before {
			return
		}
		still[key] = true
		if before {
			return
		}
		alert.Time, alert.State = r.At, firing
		a.firing[key] = alert
		news = append(news, alert)
	}
	once := func(alert Alert) { on(true, alert) }
	if r.Error != "" {
		once(Alert{Kind: AlertRefused, Severity: critical, Message: "changes are refused: " + r.Error})
	}
	for i := range r.Elements {
		a.judge(&r.Elements[i], on, once)
	}
	var ended []Alert
	for key, was := range a.firing {
		if still[key] {
			continue
		}
		delete(a.firing, key)
		if was.Kind == AlertMergeDone { // it is nothing that ends
			continue
		}
		was.Time, was.State = r.At, resolved
		was.Message = "no longer: " + was.Message
		ended = append(ended, was)
	}
	slices.SortFunc(ended, func(x, y Alert) int { return strings.Compare(x.Key(), y.Key()) })
	return append(news, ended...)
}

// judge looks at one element.
func (a *Alerts) judge(e *Element, on func(is bool, alert Alert), once func(alert Alert)) {
	base := Alert{Disk: e.Disk, Name: e.Name}
	with := func(kind AlertKind, severity, format string, args ...any) Alert {
		alert := base
		alert.Kind, alert.Severity, alert.Message = kind, severity, e.Name+": "+fmt.Sprintf(format, args...)
		return alert
	}
	failed := e.State == api.ElementFailed
	reason := e.Error
	if f := e.Figures; f != nil && e.Kind != api.KindCheckpoint {
		thresholds := a.Fill
		if thresholds == nil {
			thresholds = []float64{80, 90, 95}
		}
		for _, t := range thresholds {
			if f.Percent < t-fillMargin {
				continue
			}
			alert := with(AlertFill, warning, "the COW device is %.1f %% full", f.Percent)
			if t >= 95 {
				alert.Severity = critical
			}
			alert.Value, alert.Threshold = f.Percent, t
			on(f.Percent >= t, alert)
		}
		limit, left := a.timeToFull(), e.Rates.SecondsToFull
		if limit > 0 && left != nil && *left < limit.Seconds()*timeMargin {
			alert := with(AlertTimeToFull, warning, "the COW device is full in %s at the rate of the last %s",
				Duration(*left), Duration(e.Rates.WindowSeconds))
			alert.Value, alert.Threshold = *left, limit.Seconds()
			on(*left < limit.Seconds(), alert)
		}
		invalid := f.State == api.StateInvalid
		if f.Full && !invalid {
			once(with(AlertFull, critical, "the COW device is full: writes that need space fail or wait"))
		}
		if invalid {
			once(with(AlertInvalid, critical, "the snapshot is invalid: its content is lost"))
		}
		if f.State == api.StateMergeFailed {
			once(with(AlertMergeFailed, critical, "the merge failed: %s", f.Error))
		}
		if f.Error != "" && !invalid && f.State != api.StateMergeFailed {
			failed, reason = true, f.Error
		}
	}
	if failed {
		once(with(AlertFailed, critical, "failed: %s", reason))
	}
	switch m := e.Merge; {
	case m == nil:
	case m.State == api.MergeDone:
		once(with(AlertMergeDone, info, "the merge into %s is done", m.Disk))
	case m.State == api.MergeFailed:
		once(with(AlertMergeFailed, critical, "the merge into %s failed: %s", m.Disk, m.Error))
	}
}

func (a *Alerts) timeToFull() time.Duration {
	if a.TimeToFull == 0 {
		return time.Hour
	}
	return a.TimeToFull
}

// Duration writes a number of seconds for people: "40 s", "12 min", "3.5 h", "12 days".
func Duration(seconds float64) string {
	switch {
	case seconds < 100:
		return fmt.Sprintf("%.0f s", seconds)
	case seconds < 100*60:
		return fmt.Sprintf("%.0f min", seconds/60)
	case seconds < 48*3600:
		return fmt.Sprintf("%.1f h", seconds/3600)
	}
	return fmt.Sprintf("%.0f days", seconds/86400)
}
