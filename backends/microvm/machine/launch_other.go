//go:build !linux

package machine

import (
	"errors"
	"os/exec"
)

// Group is a group of nobody's where there are no machines.
const Group = -1

func begin(*exec.Cmd, Config, bool) error { return errors.New("machines need Linux") }

// Separates says that there are no machines.
func Separates(int) bool { return false }
