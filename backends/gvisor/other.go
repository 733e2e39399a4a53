//go:build !linux

package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// Guest says that sandboxes run on Linux only.
func Guest([]string) int {
	fmt.Fprintln(os.Stderr, "kmo: running gVisor needs Linux")
	return 1
}

func measure(context.Context, Options) (runtime, error) {
	return runtime{}, errors.New("runsc needs Linux")
}

func platform() string { return "" }
