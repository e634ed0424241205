package daemon

import "testing"

// An image in a registry is opened by its digest alone: a tag may name another disk at the next start.
func TestRegistrySources(t *testing.T) {
	d := &Daemon{}
	for source, allowed := range map[string]bool{
		"oci://host/golden@sha256:0000000000000000000000000000000000000000000000000000000000000000":    true,
		"oci://host/golden@sha256:0000000000000000000000000000000000000000000000000000000000000000#p1": true,
		"oci://host/golden:1":  false,
		"s3://bucket/key":      false,
		"https://host/disk":    false,
		"http://127.0.0.1/x":   false,
		"nbd+unix:///?socket=": false,
	} {
		if _, err := d.allowSource(source); (err == nil) != allowed {
			t.Errorf("%s: %v", source, err)
		}
	}
}
