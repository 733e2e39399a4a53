//go:build !linux

package main

import (
	"fmt"
	"runtime"

	"github.com/kindos/kmo/reconciler/template"
)

// measure says that only Linux hosts run anything.
func measure(*template.Host, string) error {
	return fmt.Errorf("a host that runs workloads needs Linux; this is %s, for writing, planning and approving", runtime.GOOS)
}
