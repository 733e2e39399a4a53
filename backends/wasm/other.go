//go:build !linux

package wasm

import (
	"fmt"
	"os"
	"os/exec"
)

// Guest says that guests run on Linux only.
func Guest([]string) int {
	fmt.Fprintln(os.Stderr, "kmo: running WASM guests needs Linux")
	return statusRunner
}

func withoutRights(*exec.Cmd, string, int) error { return nil }
