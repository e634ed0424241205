package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// loadModules loads modules by name with what modules.dep says they need. One that the kernel has built
// in, or has loaded already, is fine.
func loadModules(names ...string) error {
	dir := os.Getenv("DMSNAP_MODULES")
	if dir == "" {
		return nil // an initramfs had them
	}
	text, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return err
	}
	needs := map[string][]string{} // module's name → its path and those of its needs
	for line := range strings.Lines(string(text)) {
		path, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		needs[moduleName(path)] = append([]string{path}, strings.Fields(rest)...)
	}
	for _, name := range names {
		paths := needs[moduleName(name)]
		// The last need is the deepest.
		for i := len(paths) - 1; i >= 0; i-- {
			if err := insert(filepath.Join(dir, paths[i]), ""); err != nil {
				return err
			}
		}
	}
	return nil
}

func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

func insert(path, parameters string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), parameters, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", path, err)
	}
	return nil
}
