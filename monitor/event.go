package monitor

import (
	"encoding/json"
	"strconv"

	"github.com/dmsnap/dmsnap/notify"
)

// Event returns the alert as it is delivered: JSON, and for a program also environment variables.
func (a Alert) Event() notify.Event {
	body, err := json.Marshal(a)
	if err != nil {
		panic(err) // there are only numbers and text; a forecast is never infinite
	}
	return notify.Event{Key: a.Key(), Body: body, Env: []string{
		"DMSNAP_KIND=" + string(a.Kind), "DMSNAP_STATE=" + a.State, "DMSNAP_SEVERITY=" + a.Severity,
		"DMSNAP_DISK=" + a.Disk, "DMSNAP_NAME=" + a.Name, "DMSNAP_MESSAGE=" + a.Message,
		"DMSNAP_VALUE=" + strconv.FormatFloat(a.Value, 'g', -1, 64), "DMSNAP_THRESHOLD=" + strconv.FormatFloat(a.Threshold, 'g', -1, 64)}}
}
