//go:build !linux

package machine

import (
	"errors"
	"os/exec"
)

func begin(*exec.Cmd, Config) error { return errors.New("machines need Linux") }
