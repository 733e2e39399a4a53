package conformance

import (
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/plugin"
)

func routes() []route {
	return []route{
		{"value", func(_ *testing.T, b backends.Backend) (backends.Backend, func()) { return b, func() {} }},
		{"wire", func(t *testing.T, b backends.Backend) (backends.Backend, func()) {
			seen, hangUp, err := plugin.InProcess(b)
			if err != nil {
				t.Fatal(err)
			}
			return seen, hangUp
		}},
	}
}
