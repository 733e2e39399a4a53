package conformance

import (
	"testing"

	"github.com/kindos/kmo/backends"
)

func routes() []route {
	return []route{
		{"value", func(_ *testing.T, b backends.Backend) (backends.Backend, func()) { return b, func() {} }},
	}
}
