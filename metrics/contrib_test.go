package metrics_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/dmsnap/dmsnap/monitor"
)

const (
	rules     = "../contrib/prometheus/dmsnap.rules.yml"
	dashboard = "../contrib/grafana/dmsnap.json"
)

// TestContribNamesMetrics: rules, dashboard and page name metrics that there are.
func TestContribNamesMetrics(t *testing.T) {
	r := report()
	all := scrape(t, func() (monitor.Report, error) { return r, nil })
	name := regexp.MustCompile(`dmsnap_[a-z_]+[a-z]`)
	known := map[string]bool{}
	for _, n := range name.FindAllString(all, -1) {
		known[n] = true
	}
	for _, file := range []string{rules, dashboard, "../docs/operations.md"} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		names := name.FindAllString(string(b), -1)
		for _, n := range names {
			if !known[n] {
				t.Errorf("%s: there is no metric %s", file, n)
			}
		}
		if len(names) < 10 {
			t.Errorf("%s names %d metrics", file, len(names))
		}
	}
}

func TestRulesAreValid(t *testing.T) {
	tool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("SKIPPED: no promtool (Debian: prometheus)")
	}
	if out, err := exec.Command(tool, "check", "rules", rules).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// TestDashboardIsValid has promtool read each query of the dashboard, as the rule of a file.
func TestDashboardIsValid(t *testing.T) {
	b, err := os.ReadFile(dashboard)
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &d); err != nil || len(d.Panels) < 8 {
		t.Fatalf("%d panels, %v", len(d.Panels), err)
	}
	tool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("SKIPPED: no promtool (Debian: prometheus)")
	}
	var file strings.Builder
	file.WriteString("groups:\n- name: x\n  rules:\n")
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			expr := strings.ReplaceAll(target.Expr, "$__rate_interval", "5m")
			text, err := json.Marshal(expr)
			if err != nil {
				t.Fatal(err)
			}
			file.WriteString("  - {record: \"x\", expr: " + string(text) + "}\n")
		}
	}
	path := t.TempDir() + "/queries.yml"
	if err := os.WriteFile(path, []byte(file.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(tool, "check", "rules", "--lint=none", path).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
