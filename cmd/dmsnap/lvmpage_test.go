package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// lvmPageDisks are the images that docs/lvm.md uses: their names there, and the fixtures.
var lvmPageDisks = map[string][2]string{"vm.img": {"gpt", "disk0.img"}, "pv0.img": {"two-pvs", "disk0.img"},
	"pv1.img": {"two-pvs", "disk1.img"}, "full.img": {"overflow", "disk0.img"}}

// TestLVMPage runs the commands of docs/lvm.md in order, and holds what they print against the page.
func TestLVMPage(t *testing.T) {
	if testing.Short() {
		t.Skip("long")
	}
	dir := t.TempDir()
	if err := os.Symlink(program(t), filepath.Join(dir, "dmsnap")); err != nil {
		t.Fatal(err)
	}
	for name, from := range lvmPageDisks {
		writeFile(t, filepath.Join(dir, name), lvmCase(t, from[0])[from[1]])
	}
	runPage(t, "../../docs/lvm.md", dir, 12)
}

// runPage runs the commands of a page in order, in a folder, and holds what they print against the page, which has at least so many.
func runPage(t *testing.T, page, dir string, least int) {
	t.Helper()
	text := string(readFile(t, page))
	var made strings.Builder
	commands := 0
	for i, part := range strings.Split(text, "```") {
		if i > 0 {
			made.WriteString("```")
		}
		block, is := strings.CutPrefix(part, "console\n")
		if i%2 == 0 || !is {
			made.WriteString(part)
			continue
		}
		made.WriteString("console\n")
		for line := range strings.Lines(block) {
			command, is := strings.CutPrefix(line, "$ ")
			if !is {
				continue // what it printed when the page was written
			}
			commands++
			c := exec.Command("bash", "-c", command)
			c.Dir, c.Env = dir, append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
			out, err := c.CombinedOutput()
			if err != nil {
				t.Errorf("%s%v: %s", line, err, out)
			}
			made.WriteString(line + string(out))
		}
	}
	if commands < least {
		t.Errorf("%d commands", commands)
	}
	if *update {
		writeFile(t, page, []byte(made.String()))
	} else if made.String() != text {
		t.Errorf("the page says otherwise; with -update it becomes\n%s", made.String())
	}
}
