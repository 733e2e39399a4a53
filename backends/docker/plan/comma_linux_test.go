package plan

import (
	"errors"
	"testing"

	"github.com/kindos/kmo/backends"
)

// A comma in a path would be another option of a mount for Podman, such as another source.
func TestCommaIsRefused(t *testing.T) {
	p := &Plan{State: t.TempDir()}
	for name, w := range map[string]backends.Workload{
		"kept path": {Name: "relay-00000001", Unit: "relay", Overlay: backends.Overlay{Keep: []string{"/data,source=/root"}}},
		"mount":     {Name: "relay-00000001", Unit: "relay", Mounts: []backends.Mount{{From: "/srv", To: "/m,source=/etc,U=true"}}},
		"a quote":   {Name: "relay-00000001", Unit: "relay", Overlay: backends.Overlay{Keep: []string{`/a"b`}}},
		"its place": {Name: "relay-00000001", Unit: "relay", Mounts: []backends.Mount{{From: "/srv,readonly=false", To: "/m"}}},
	} {
		var fault *backends.StartError
		if _, err := p.mounts(w); !errors.As(err, &fault) {
			t.Errorf("%s: error %v, want a *StartError", name, err)
		}
	}
}
