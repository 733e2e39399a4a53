package machine

import (
	"fmt"
	"os/exec"

	"golang.org/x/sys/unix"

	"github.com/kindos/kmo/backends/process/stage"
)

// begin starts a VMM in its machine's network.
func begin(cmd *exec.Cmd, c Config) (err error) {
	stage.OnThread(func() {
		if c.Network != "" {
			err = join(c.Network)
		}
		if err == nil {
			err = cmd.Start()
		}
	})
	return err
}

// join makes a network this thread's.
func join(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd)
		err = unix.Setns(fd, unix.CLONE_NEWNET)
	}
	if err != nil {
		return fmt.Errorf("entering the machine's network: %v", err)
	}
	return nil
}
