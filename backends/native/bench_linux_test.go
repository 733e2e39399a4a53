package native

import (
	"os/exec"
	"syscall"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
)

// Benchmark is beside the same program with nothing around it.
func Benchmark(b *testing.B) {
	images := content(b)
	plain := conformance.Foreground("exec",
		func(string) (*exec.Cmd, error) { return exec.Command(images[backends.Native].Content, "wait"), nil },
		func(_ string, running *exec.Cmd) error { return running.Process.Signal(syscall.SIGTERM) })
	for format, image := range images {
		b.Run(string(format), func(b *testing.B) {
			backend := open(b, b.TempDir())
			defer backend.Close()
			conformance.Bench(b, conformance.Race{Backend: backend, Format: format, Image: image, Many: 100, Rival: plain})
		})
	}
}
