package main

import (
	"errors"

	"github.com/spf13/cobra"
)

type liveMerge struct {
	control             string
	pause, resume, wait bool
}

func (l *liveMerge) run(c *cobra.Command, args []string, asJSON bool) error {
	return errors.New("not yet")
}

func serverStatus(c *cobra.Command, control string, asJSON bool) error { return errors.New("not yet") }
