//go:build !linux

package thishost

import (
	"fmt"
	"runtime"

	"github.com/kindos/kmo/reconciler/template"
)

// Supported says what works on a system that no host runs on.
func Supported() error {
	return fmt.Errorf("hosts run on Linux, and 'kmo plan' compares with what one runs; this is %s, which has kmo site, image, policy, key and approve", runtime.GOOS)
}

// Measure is Supported.
func Measure(*template.Host, string) error { return Supported() }

// Doors is none.
func Doors(string) (folder string, release func()) { return "", func() {} }
