package process

import (
	"slices"
	"testing"

	"github.com/kindos/kmo/backends"
)

func TestArgvAndEnv(t *testing.T) {
	w := backends.Workload{
		Image: backends.Image{Config: backends.ImageConfig{Entrypoint: []string{"/a"}, Cmd: []string{"b"}, Env: []string{"X=1", "Y=2=3", "broken"}}},
		Run:   backends.Run{Env: map[string]string{"X": "4"}, Ports: []backends.Port{{Name: "web-ui", Port: 8}}},
	}
	if got, want := Argv(w), []string{"/a", "b"}; !slices.Equal(got, want) {
		t.Errorf("argv %q, want %q", got, want)
	}
	w.Run.Args = []string{"c"}
	if got, want := Argv(w), []string{"/a", "c"}; !slices.Equal(got, want) {
		t.Errorf("argv %q, want %q", got, want)
	}
	env := Env(w)
	for name, want := range map[string]string{"X": "4", "Y": "2=3", "KMO_PORT_WEB_UI": "8"} {
		if env[name] != want {
			t.Errorf("%s=%q, want %q", name, env[name], want)
		}
	}
	if len(env) != 4 {
		t.Errorf("environment %v, want those and PATH", env)
	}
}
