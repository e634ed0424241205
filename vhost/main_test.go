package vhost_test

import (
	"os"
	"testing"

	"github.com/dmsnap/dmsnap/block/blocktest"
)

// Goroutines that a test leaves behind fail the package.
func TestMain(m *testing.M) { os.Exit(blocktest.RunAll(m)) }
