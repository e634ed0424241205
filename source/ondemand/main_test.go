package ondemand_test

import (
	"flag"
	"os"
	"testing"
)

// The parallel tests here wait for servers, so more than processors run at a time.
func TestMain(m *testing.M) {
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}
