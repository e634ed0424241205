package top_test

import (
	"fmt"
	"strings"

	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
	"github.com/dmsnap/dmsnap/top"
)

// One report as a table.
func ExampleText() {
	r := monitor.Report{Server: api.ServerOfOne, Elements: []monitor.Element{
		{Element: api.Element{Name: "origin", Kind: api.KindDisk, State: api.ElementOK, SizeBytes: 1 << 30}},
	}}
	fmt.Println(strings.Contains(top.Text(r, 100), "origin"))
	// Output: true
}
