//go:build !linux

package lxc

import (
	"fmt"
	"os"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/process"
)

type users struct{ lacks string }

func measure(string) users { return users{lacks: "containers need Linux"} }

func (u users) maps(backends.Workload, process.Place) string { return u.lacks }

func (users) close() error { return nil }

// Guest says that containers run on Linux only.
func Guest([]string) int {
	fmt.Fprintln(os.Stderr, "kmo: LXC needs Linux")
	return 1
}

func mapped() map[int]bool { return map[int]bool{} }
