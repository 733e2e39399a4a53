package appimage

import (
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
)

func Benchmark(b *testing.B) {
	backend := open(b, b.TempDir())
	defer backend.Close()
	conformance.Bench(b, conformance.Race{Backend: backend, Format: backends.AppImage, Image: packed(b), Many: 100})
}
