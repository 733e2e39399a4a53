//go:build !linux

package main

import (
	"fmt"
	"runtime"

	"github.com/kindos/kmo/reconciler/template"
)

// runsHere says what works on a system that no host runs on.
func runsHere() error {
	return fmt.Errorf("hosts run on Linux, and 'kmo plan' compares with what one runs; this is %s, which has kmo site, image, policy, key and approve", runtime.GOOS)
}

func measure(*template.Host, string) error { return runsHere() }
